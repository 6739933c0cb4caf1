"""Exported models: the files run in other processes, and only a correct file is kept."""

import copy
import json
import subprocess
import sys
import zipfile
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from image_tree import write_image_tree
from safetensors.torch import save_file
from torch.testing import assert_close

import vim  # (registers the models)
import vim.export.export
from vim.console.errors import ConfigError, RunError
from vim.data import DataError, eval_transform, open_images
from vim.export import ExportConfig, export_model, load_compiled, programs

KWARGS = {"img_size": [20, 12], "patch_size": 4, "in_chans": 1, "depth": 1, "num_classes": 5}
# 15 patches and a class token: the last chunk of the scan is not full.


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A folder with images/ and weights.safetensors, and their model, whose outputs differ between images."""
    path = tmp_path_factory.mktemp("export")
    write_image_tree(path / "images", {"val": 6}, classes=3)
    torch.manual_seed(0)
    model = timm.create_model("vim_nano", **KWARGS).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("x_proj.weight", "out_proj.weight", "head.weight")):
                p.mul_(8)
    save_file(model.state_dict(), path / "weights.safetensors")
    return path, model


def config(path, **changes):
    defaults = {
        "model": "vim_nano",
        "checkpoint": str(path / "weights.safetensors"),
        "kwargs": KWARGS,
        "images": str(path / "images"),
    }
    return ExportConfig(**defaults | {"batch_size": 3, "output": str(path / "out")} | changes)


@pytest.fixture(scope="module", autouse=True)
def timed_in_a_moment():
    """Shorten the timing: the times do not matter here."""

    class Quick(vim.export.export.Timer):  # type: ignore[name-defined]
        def blocked_autorange(self, callback=None, min_run_time=0.0):
            return super().blocked_autorange(callback, 0.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vim.export.export, "Timer", Quick)
        yield


@pytest.fixture(scope="module")
def exported(setting):
    path, model = setting
    return export_model(config(path)), path / "out", model


def images(batch):
    return torch.randn(batch, 1, 20, 12, generator=torch.Generator().manual_seed(batch))


def test_report(exported):
    report, folder, _ = exported
    written = json.loads((folder / "export.json").read_text())
    assert [written["input"][key] for key in ("name", "shape", "dtype")] == ["images", ["batch", 1, 20, 12], "float32"]
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert written["output"]["shape"] == ["batch", 5]
    assert sorted(p.name for p in folder.iterdir()) == ["export.json", "model.onnx", "model.pt2"]
    for form in ("pt2", "onnx"):
        assert report[form]["max_abs_error"] < 1e-5
        assert report[form]["bytes"] == (folder / report[form]["file"]).stat().st_size
        assert set(written[form]["milliseconds"]) == {"1", "3"}


def test_pt2_runs_in_a_process_with_torch_alone(exported, tmp_path):
    _, folder, model = exported
    torch.save(images(5), tmp_path / "images.pt")
    code = f"""
import sys
for name in ("vim", "vim_kernels", "timm", "triton", "torchvision"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
program = torch.export.load({str(folder / "model.pt2")!r})
targets = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
assert len(targets) > 100 and {{t.namespace for t in targets}} == {{"aten"}}
assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in program.graph.nodes)
torch.save(program.module()(torch.load({str(tmp_path / "images.pt")!r})), {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with torch.no_grad():
        assert_close(torch.load(tmp_path / "out.pt"), model(images(5)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnx_takes_any_batch(exported, batch):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, folder, model = exported
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["output"], {"images": images(batch).numpy()})
    with torch.no_grad():
        assert np.abs(found - model(images(batch)).numpy()).max() < 1e-5


def test_onnx_runs_with_as_many_threads_as_are_asked_for(exported, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, folder, model = exported
    seen, session = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, **kw: seen.append(options) or session(path, options, **kw),
    )
    run = programs.read_onnx(folder / "model.onnx", 3)
    assert seen[0].intra_op_num_threads == 3
    with torch.no_grad():
        assert_close(run(images(2)), model(images(2)), atol=1e-5, rtol=1e-5)


def test_a_program_keeps_nothing_for_a_backward(exported):
    assert not programs.read_pt2(exported[1] / "model.pt2")(images(2)).requires_grad


def test_onnx_has_standard_operators_only_and_one_loop_a_block(exported):
    onnx = pytest.importorskip("onnx")
    _, folder, _ = exported
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert sum(node.op_type == "Scan" for node in model.graph.node) == KWARGS["depth"]


def test_compiled_package(setting, exported):
    path, model = setting
    report = export_model(config(path, formats=["aoti"], output=str(path / "compiled")))
    run = load_compiled(path / "compiled" / report["aoti"]["file"])
    with torch.no_grad():
        assert_close(run(images(4)), model(images(4)), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def with_operators(setting):
    """An export of aoti_cuda in bf16, on the CPU. The same code runs on a GPU (tests below, marked gpu)."""
    path, _ = setting
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(programs.FORMATS, "aoti_cuda", programs.FORMATS["aoti_cuda"]._replace(device="cpu"))
        patch.setattr(vim.export.export, "_captured", lambda run: run)
        report = export_model(config(path, formats=["aoti_cuda"], output=str(path / "operators")))
    return report, path / "operators" / "model_cuda.pt2"


def test_a_package_for_a_gpu_calls_the_operators_in_its_precision(setting, with_operators, tmp_path):
    """In a process with vim_kernels but without vim, for any number of images."""
    _, model = setting
    report, path = with_operators
    torch.save([images(batch) for batch in (1, 2, 7)], tmp_path / "images.pt")
    code = f"""
import sys
for name in ("vim", "timm", "torchvision"):
    sys.modules[name] = None
import torch, torch._inductor.codecache, vim_kernels
run = torch._inductor.aoti_load_package({str(path)!r})
outputs = [run(images) for images in torch.load({str(tmp_path / "images.pt")!r})]
torch.save(outputs, {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    found = torch.load(tmp_path / "out.pt")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for batch, outputs in zip((1, 2, 7), found, strict=True):
            assert outputs.dtype == torch.float32
            assert_close(outputs, model(images(batch)).float(), atol=1e-2, rtol=1e-2)
    with zipfile.ZipFile(path) as package:
        text = b"".join(package.read(name) for name in package.namelist() if name.endswith(".json"))
    assert {name for name in ("selective_scan", "causal_conv1d") if f"vim_kernels::{name}".encode() in text} == {
        "selective_scan",
        "causal_conv1d",
    }
    about = report["aoti_cuda"]
    assert 1e-4 < about["eager"]["max_abs_error"] < 0.1  # the rounding of bf16
    assert about["max_abs_error"] <= 2 * about["eager"]["max_abs_error"]
    assert set(about["milliseconds"]) == set(about["eager"]["milliseconds"]) == set(about["captured"]["milliseconds"])
    assert "eager" not in report


def test_a_program_for_a_package_has_no_empty_lists():
    """AOTInductor of torch 2.10 and 2.11 would pass None for them."""
    model = timm.create_model("vim_nano", **KWARGS).eval()
    program = programs.export_with_operators(programs.in_precision(model, "bf16"), images(2))

    def empty_lists():
        graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
        calls = [node for graph in graphs for node in graph.nodes if "vim_kernels" in str(node.target)]
        assert len(calls) == 2
        return [argument for node in calls for argument in node.args if isinstance(argument, list) and not argument]

    assert empty_lists()
    programs.without_empty_lists(program)
    assert not empty_lists()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_close(program.module()(images(3)), model(images(3)).float(), atol=1e-2, rtol=1e-2)


def test_a_rounded_file_may_have_twice_the_error_of_the_model_in_its_precision(made, monkeypatch):
    """The model itself is off by a hundredth."""

    class Rounded(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images) + 0.01

    monkeypatch.setattr(vim.export.export, "in_precision", lambda model, precision: Rounded(model))
    report = made(lambda outputs: outputs - 0.019, formats=["aoti_cuda"])["aoti_cuda"]
    assert report["eager"]["max_abs_error"] == pytest.approx(0.01, rel=1e-3)
    assert report["max_abs_error"] == pytest.approx(0.019, rel=1e-3)
    with pytest.raises(RunError, match=r"model\.pt2 differs from the model by 2\.1e-02, more than 2\.0e-02"):
        made(lambda outputs: outputs - 0.021, formats=["aoti_cuda"])


def test_a_package_for_a_gpu_needs_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="formats: aoti_cuda needs a GPU"):
        export_model(ExportConfig("vim_none", formats=["pt2", "aoti_cuda"]))


def changed(package, path, **about):
    """A copy of a package that says other things about itself. None of its code is in it."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if name.endswith("_metadata.json"):
                new.writestr(name, json.dumps(json.loads(old.read(name)) | about))
    return path


def test_a_package_that_cannot_run_here_says_why_in_one_line(with_operators, tmp_path, monkeypatch):
    package = with_operators[1]
    text, folder, empty = tmp_path / "text.pt2", tmp_path / "folder.pt2", tmp_path / "empty.pt2"
    text.write_text("text")
    folder.mkdir()
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("model/data.json", "{}")
    gpu = {"AOTI_DEVICE_KEY": "cuda", "AOTI_COMPUTE_CAPABILITY": "90"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for path, message in (
        (tmp_path / "none.pt2", "cannot read .*none.pt2: .*No such file"),
        (text, "cannot read .*text.pt2: File is not a zip file; give a package"),
        (folder, "cannot read .*folder.pt2: .*directory"),
        (empty, "empty.pt2 holds no compiled model; give a package"),
        (changed(package, tmp_path / "a.pt2", torch="1.0"), "compiled with torch 1.0, this is .*; export it again"),
        (changed(package, tmp_path / "b.pt2", **gpu), "compiled for a GPU, but torch finds no CUDA device"),
        (changed(package, tmp_path / "c.pt2"), "cannot load .*c.pt2: .*; export it again"),
    ):
        with pytest.raises(RunError, match=message) as caught:
            load_compiled(path)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(RunError, match="compiled for compute capability 90, this GPU has 80; export it again"):
        load_compiled(tmp_path / "b.pt2")


@pytest.mark.gpu
def test_a_package_runs_on_a_gpu(setting):
    path, model = setting
    report = export_model(config(path, formats=["aoti_cuda"], output=str(path / "gpu")))["aoti_cuda"]
    assert report["max_abs_error"] <= 2 * max(report["eager"]["max_abs_error"], 1e-4)
    assert all(ms > 0 for ms in report["captured"]["milliseconds"].values())
    run = load_compiled(path / "gpu" / "model_cuda.pt2")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        want = copy.deepcopy(model).cuda()(images(7).cuda()).float()
    assert_close(run(images(7).cuda()), want, atol=1e-2, rtol=1e-2)


def test_a_file_that_disagrees_is_not_kept(setting, monkeypatch):
    path, _ = setting
    right = programs.read_pt2

    def off_by_a_little(file):
        run = right(file)
        return lambda x: run(x) + 1e-3

    monkeypatch.setattr(programs, "read_pt2", off_by_a_little)
    with pytest.raises(RunError, match="differs from the model by 1"):
        export_model(config(path, formats=["pt2"], output=str(path / "wrong")))
    assert not list((path / "wrong").iterdir())


@pytest.fixture
def made(setting, tmp_path, monkeypatch):
    """made(wrong, **options): the report of an export to pt2 whose file returns wrong(outputs of the model).

    made.seen: the images of the check, and the threads of each timing and of the file's calls. Nothing is compiled,
    and timing is a fake.
    """
    path, model = setting

    def export(*args, **kw):
        return SimpleNamespace(seen=made.seen)  # type: ignore[attr-defined]

    def timer(*args, **kw):
        made.seen["timed"].append((kw["num_threads"], len(kw["globals"]["images"])))  # type: ignore[attr-defined]
        return SimpleNamespace(timeit=lambda n: None, blocked_autorange=lambda **kw: SimpleNamespace(median=0.001))

    def made(wrong=lambda outputs: outputs, truth=model, **options):
        made.seen.update(images=None, timed=[], called=None)  # type: ignore[attr-defined]

        def run(images):
            if made.seen["images"] is None:  # type: ignore[attr-defined]
                made.seen["images"] = images  # type: ignore[attr-defined]
            with torch.inference_mode():
                return wrong(truth(images))

        def read(path, threads):
            made.seen["called"] = threads  # type: ignore[attr-defined]
            return run

        form = programs.Format("model.pt2", False, lambda program, path: path.write_text("program"), read)
        monkeypatch.setitem(programs.FORMATS, "pt2", form)
        monkeypatch.setitem(programs.FORMATS, "aoti_cuda", form._replace(operators=True))
        return export_model(config(path, **{"formats": ["pt2"], "output": str(tmp_path / "made")} | options))

    made.seen = {}  # type: ignore[attr-defined]
    monkeypatch.setattr(vim.export.export, "export_program", export)
    monkeypatch.setattr(vim.export.export, "export_with_operators", export)
    monkeypatch.setattr(vim.export.export, "_captured", lambda run: run)
    monkeypatch.setattr(vim.export.export, "Timer", timer)
    return made


def one_wrong(at, by):
    """Outputs with one wrong number, for a batch of several images (at: all) or of one (at: one)."""

    def wrong(outputs):
        outputs = outputs.clone()
        if (len(outputs) == 1) == (at == "one"):
            outputs[-1, -1] += by
        return outputs

    return wrong


@pytest.mark.parametrize("at", ["one", "all"])
@pytest.mark.parametrize("scale", [1, 50])
def test_a_file_may_differ_by_a_ten_thousandth_of_the_largest_output_and_no_more(setting, made, tmp_path, at, scale):
    """The error is in one number, for several images or for one. A largest output below 1 counts as 1."""
    _, model = setting
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("head.weight", "head.bias"):
        weights[name] *= scale / 10
    save_file(weights, tmp_path / "weights.safetensors")
    model = timm.create_model("vim_nano", **KWARGS).eval()
    model.load_state_dict(weights)
    options = {"truth": model, "checkpoint": str(tmp_path / "weights.safetensors")}
    made(**options)
    with torch.no_grad():
        largest = model(made.seen["images"]).abs().max().item()
    assert (largest > 2) == (scale == 50), largest
    limit = 1e-4 * max(largest, 1)
    made(one_wrong(at, 0.9 * limit), **options)
    for wrong in (1.2 * limit, -1.2 * limit):
        with pytest.raises(RunError, match="differs from the model by"):
            made(one_wrong(at, wrong), **options)


def test_a_report_says_what_comes_out_and_in_what_time(made, monkeypatch):
    """Class names if the weights have them; milliseconds for one image and for all."""
    monkeypatch.setattr(vim.export.export, "label_names", lambda model: list("abcde"))
    report = made(batch_size=3)
    assert report["output"] == {"shape": ["batch", 5], "label_names": list("abcde")}
    for part in ("eager", "pt2"):
        assert report[part]["milliseconds"] == {1: 1.0, 3: 1.0}


def test_a_report_says_how_images_become_the_input(setting, made):
    """Images preprocessed as the report says equal those that the file was checked with."""
    path, model = setting
    report = made(batch_size=3)
    (mean,), (std,) = (report["input"][key] for key in ("mean", "std"))
    assert (mean, std) == tuple(pytest.approx(sum(model.pretrained_cfg[key]) / 3) for key in ("mean", "std"))
    settings = {key: report["input"][key] for key in report["input"].keys() - {"name", "shape", "dtype"}}
    source, transform = open_images(path / "images"), eval_transform(settings)
    every = torch.stack([transform(source.load(i, 1)) for i in range(6)])
    found = [(every == seen).flatten(1).all(1).nonzero().item() for seen in made.seen["images"]]
    assert found[0] == 0
    assert found[-1] > 3  # evenly spaced
    assert (report["model"], report["kwargs"]) == ("vim_nano", KWARGS)


def refused(made, match, **options):
    with pytest.raises((ConfigError, DataError), match=match):
        made(**options)
    return True


EFFECTS = {  # option -> what must hold for the report, the check and the timing
    "model": lambda made, at: refused(made, "vim_none", model="vim_none"),
    "checkpoint": lambda made, at: refused(made, "nowhere", checkpoint=str(at / "nowhere")),
    "kwargs": lambda made, at: refused(made, "head", kwargs=KWARGS | {"num_classes": 4}),
    "formats": lambda made, at: {"pt2", "onnx"} & set(made()) == {"pt2"},
    "images": lambda made, at: refused(made, "nowhere", images=str(at / "nowhere")),
    "batch_size": lambda made, at: made(batch_size=2) and [n for _, n in made.seen["timed"]] == [1, 2, 1, 2],
    "threads": lambda made, at: (
        made(threads=3)["threads"] == made.seen["called"] == 3 and {n for n, _ in made.seen["timed"]} == {3}
    ),
    "precision": lambda made, at: made(formats=["aoti_cuda"], precision="fp16")["aoti_cuda"]["precision"] == "fp16",
    "output": lambda made, at: made(output=str(at / "there")) and (at / "there" / "export.json").is_file(),
}


@pytest.mark.parametrize("option", [field.name for field in fields(ExportConfig)])
def test_each_option_has_its_effect(made, tmp_path, option):
    assert EFFECTS[option](made, tmp_path)


def test_an_older_export_goes_as_a_whole(setting, monkeypatch):
    """Otherwise export.json of one model would lie next to files of another."""
    path, _ = setting
    old = path / "old"
    old.mkdir()
    for name in ("model.onnx", "model_aoti.pt2", "export.json", "mine.txt"):
        (old / name).write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(programs, "read_pt2", lambda file: lambda x: torch.full((len(x), 5), torch.nan))
        with pytest.raises(RunError, match="differs from the model by nan"):
            export_model(config(path, formats=["pt2"], output=str(old)))
    assert {p.name for p in old.iterdir()} == {"model.onnx", "model_aoti.pt2", "mine.txt"}
    export_model(config(path, formats=["pt2"], output=str(old)))
    assert {p.name for p in old.iterdir()} == {"model.pt2", "export.json", "mine.txt"}


def test_an_output_that_cannot_be_written(setting):
    path, _ = setting
    for output in (path / "weights.safetensors", path / "weights.safetensors" / "new"):
        with pytest.raises(ConfigError, match=f"cannot write to {output}: .*; choose another output"):
            export_model(config(path, output=str(output)))


def test_any_timm_model(setting):
    """In eval mode, without dropout."""
    path, _ = setting
    model, kwargs = timm.create_model("test_vit", num_classes=3), {"num_classes": 3, "drop_rate": 0.5}
    save_file(model.state_dict(), path / "vit.safetensors")
    export = ExportConfig("test_vit", str(path / "vit.safetensors"), kwargs, ["pt2"], str(path / "images"))
    export.output = str(path / "vit")
    assert export_model(export)["pt2"]["max_abs_error"] < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adventurer_tiny", {"embed_dim": 16, "d_state": 6, "head_dim": 8, "flipped_blocks": [0]}),
        ("mambar_small", {"embed_dim": 16, "num_registers": 3, "register_dim": 4}),
    ],
)
def test_families(setting, name, options):
    """Both formats answer like the model; the program has ATen operators only."""
    path, _ = setting
    torch.manual_seed(0)
    kwargs = KWARGS | options
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    save_file(model.state_dict(), path / f"{name}.safetensors")
    report = export_model(
        config(path, model=name, checkpoint=str(path / f"{name}.safetensors"), kwargs=kwargs, output=str(path / name))
    )
    with torch.no_grad():
        assert model(images(2)).std() > 0.1
    assert max(report[form]["max_abs_error"] for form in ("pt2", "onnx")) < 1e-5
    nodes = torch.export.load(path / name / "model.pt2").graph.nodes
    assert {n.target.namespace for n in nodes if isinstance(n.target, torch._ops.OpOverload)} == {"aten"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": ["tflite"]}, "formats must be some of"),
        ({"formats": []}, "at least one"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        ExportConfig(**changes)
