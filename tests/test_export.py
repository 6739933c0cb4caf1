"""Exported models: what other processes make of the files, and that only a right file is kept."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from image_tree import write_image_tree
from safetensors.torch import save_file
from torch.testing import assert_close

import vim  # noqa: F401  (registers the models)
from vim.export import ExportConfig, export_model, programs
from vim.training.errors import ConfigError, RunError

KWARGS = {"img_size": [20, 12], "patch_size": 4, "in_chans": 1, "depth": 1, "num_classes": 5}
# 15 patches and a class token: the last chunk of the scan is not full.


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A folder with images/ and weights.safetensors, and the model of those weights, whose outputs differ by image."""
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
    defaults = {"checkpoint": str(path / "weights.safetensors"), "kwargs": KWARGS, "images": str(path / "images")}
    return ExportConfig("vim_nano", **defaults | {"batch_size": 3, "output": str(path / "out")} | changes)


@pytest.fixture(scope="module")
def exported(setting):
    path, model = setting
    return export_model(config(path)), path / "out", model


def images(batch):
    return torch.randn(batch, 1, 20, 12, generator=torch.Generator().manual_seed(batch))


def test_report(exported):
    report, folder, _ = exported
    written = json.loads((folder / "export.json").read_text())
    assert written["input"]["shape"] == ["batch", 1, 20, 12]
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


def test_an_older_export_goes_as_a_whole(setting, monkeypatch):
    """Else export.json of one model would stand beside files of another."""
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
    path, _ = setting
    model = timm.create_model("test_vit", num_classes=3)
    save_file(model.state_dict(), path / "vit.safetensors")
    export = ExportConfig("test_vit", str(path / "vit.safetensors"), {"num_classes": 3}, ["pt2"], str(path / "images"))
    export.output = str(path / "vit")
    assert export_model(export)["pt2"]["max_abs_error"] < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": ["tflite"]}, "formats must be some of"),
        ({"formats": []}, "at least one"),
        ({"threads": 0}, "threads"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        ExportConfig(**changes)
