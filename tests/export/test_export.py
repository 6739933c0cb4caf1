"""Exported models: the files run in other processes, and only a correct file is kept."""

import json
import subprocess
import sys
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
from vim.export import ExportConfig, export_model, programs

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
    run = programs.read_aoti(path / "compiled" / report["aoti"]["file"])
    with torch.no_grad():
        assert_close(run(images(4)), model(images(4)), atol=1e-5, rtol=1e-5)


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
        return export_model(config(path, **{"formats": ["pt2"], "output": str(tmp_path / "made")} | options))

    made.seen = {}  # type: ignore[attr-defined]
    monkeypatch.setattr(vim.export.export, "export_program", export)
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
