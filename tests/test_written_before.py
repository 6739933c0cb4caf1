"""Runs, checkpoints and exports of an earlier version still load: tests/fixtures/e99c037, described in its README."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from arithmetic_images import write_arithmetic_images
from torch.testing import assert_close

import vim.features
from vim.checkpoint import load_checkpoint

os.environ["ACCELERATE_USE_CPU"] = "true"
TOOLS = Path(__file__).parent.parent / "tools"
WRITTEN = Path(__file__).parent / "fixtures" / "e99c037"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
LOOSE = {"rtol": 1e-3, "atol": 1e-4}  # another processor or version of torch rounds differently


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the files, with the images of the runs, as working directory."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    write_arithmetic_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(monkeypatch):
    def call(tool, *args):
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, args)])
        runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")

    return call


def test_a_finished_run_is_a_timm_model():
    model = timm.create_model(f"local-dir:{WRITTEN / 'finished'}", pretrained=True).eval()
    images = torch.arange(2 * 16 * 16).reshape(2, 1, 16, 16) % 23 / 10 - 1
    with torch.no_grad():
        assert_close(model(images), torch.tensor(EXPECTED["logits"]), **LOOSE)


@pytest.mark.parametrize(
    ("weights", "epoch", "prefix"),
    [([], 3, ""), (["--checkpoint", "finished/checkpoints/best.pt"], 2, "ema_")],
)
def test_a_finished_run_scores_as_its_log_says(folder, call, weights, epoch, prefix):
    """The weights of the run folder, and the averaged ones of its best checkpoint."""
    call("validate", "--model", "finished", *weights, "--data.root", "images", "--output", "out.json")
    found = json.loads(Path("out.json").read_text())
    log = [json.loads(line) for line in Path("finished/log.jsonl").read_text().splitlines()][epoch - 1]
    assert found["top1"] == log[f"{prefix}top1"]
    assert found["loss"] == pytest.approx(log[f"{prefix}loss"], rel=1e-3)


def test_a_finished_run_has_nothing_left_to_train(folder, call, capsys):
    before = json.loads(Path("finished/summary.json").read_text())
    call("train", "--config", "finished/config.yaml", "--resume")
    assert "train loss" not in capsys.readouterr().out
    after = json.loads(Path("finished/summary.json").read_text())
    assert before.items() >= {key: after[key] for key in ("top1", "best_top1", "epochs", "updates")}.items()


@pytest.mark.parametrize(
    ("run", "arguments"),
    [
        ("unfinished", ["--config", "unfinished/config.yaml", "--resume"]),
        ("again", ["--config", "finished/config.yaml", "--run_dir", "again"]),
        ("from_recipe", ["--config", "recipe.yaml", "--run_dir", "from_recipe"]),
    ],
)
def test_a_run_resumed_or_repeated_ends_like_the_finished_one(folder, call, capsys, run, arguments):
    assert load_checkpoint(Path("unfinished/checkpoints/last.pt"))["update"] == 5  # of 9, of which an epoch has 3
    call("train", *arguments)
    ends = [load_checkpoint(Path(name, "checkpoints", "last.pt")) for name in (run, "finished")]
    assert [end["update"] for end in ends] == [9, 9]
    for part in ("model", "model_ema"):
        assert_close(*(end[part] for end in ends), **LOOSE)
    found, want = ([record["train_loss"] for record in end["history"]] for end in ends)
    assert found == pytest.approx(want, rel=1e-3)
    assert ("has no record of the data" in capsys.readouterr().out) == (run == "unfinished")


def test_an_old_run_resumes_only_with_its_total_batch(folder, call, capsys):
    with pytest.raises(SystemExit):
        call("train", "--config", "unfinished/config.yaml", "--resume", "--data.batch_size", 4)
    assert "the run has 8 images an update, now they would be 4" in capsys.readouterr().err
    call("train", "--config", "unfinished/config.yaml", "--resume", "--data.batch_size", 4, "--accumulate", 2)


def test_an_export_reads_back():
    rows = vim.features.load(WRITTEN / "features")
    want = EXPECTED["features"]
    assert (list(rows.paths), rows.labels.tolist(), rows.index.tolist()) == (
        want["paths"], want["labels"], want["index"]
    )  # fmt: skip
    assert rows.columns.keys() == want["columns"].keys() == {"token", "avg"}
    for name, column in want["columns"].items():
        assert np.array_equal(rows.columns[name], np.array(column, "float32"))
