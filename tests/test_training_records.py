"""What a run writes and says: numbers that are not finite, whole files, and one line for what the disk refuses."""

import json
import os
import shutil
import stat

import pytest
import torch
import yaml
from image_tree import write_image_tree
from safetensors.torch import load_file, save_file
from whole_runs import config, one_thread  # noqa: F401  (the fixture)

from vim import files
from vim.data import EvalDataConfig
from vim.training import ConfigParser, RunError, TrainConfig, ValidateConfig, plain_errors, train, trainer, validate
from vim.training.config import ScheduleConfig
from vim.training.run_folder import RunFolder

os.environ["ACCELERATE_USE_CPU"] = "true"
pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"schedule": ScheduleConfig(epochs=1, warmup_epochs=0)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_image_tree(tmp_path_factory.mktemp("records") / "images", {"train": 66, "val": 15}, classes=3)


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(config(tree, run_dir, **SHORT))
    return run_dir


def strict(text):
    """JSON as every reader takes it."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_an_epoch_without_an_update_has_no_loss(tree, tmp_path, monkeypatch, capsys):
    backward = trainer.Trainer._backward

    def poisoned(self, inputs, step):
        inputs[0].fill_(float("nan") if self.state.epoch == 1 else 0.5)
        return backward(self, inputs, step)

    monkeypatch.setattr(trainer.Trainer, "_backward", poisoned)
    train(config(tree, tmp_path))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 2/3"))
    assert "train loss nan  (4 updates skipped, not finite)" in line
    records = [strict(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(record["train_loss"] is None, record["skipped"]) for record in records] == [
        (False, 0),
        (True, 4),
        (False, 0),
    ]
    assert strict((tmp_path / "summary.json").read_text())["skipped_updates"] == 4


def test_weights_that_are_not_finite_have_no_plain_accuracy(tree, finished, tmp_path, capsys):
    folder, output = tmp_path / "run", tmp_path / "v.json"
    shutil.copytree(finished, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: torch.full_like(w, torch.nan) for k, w in weights.items()}, folder / "model.safetensors")
    results = validate(ValidateConfig(str(folder), data=EvalDataConfig(str(tree), num_workers=0), output=str(output)))
    assert (results["top1"], results["top5"], results["not_finite"]) == (0, 0, 15)
    assert "not finite for 15 of 15 images, which count as wrong" in capsys.readouterr().out
    assert strict(output.read_text())["loss"] is None


def test_one_class_teaches_nothing(tmp_path, capsys):
    one = write_image_tree(tmp_path / "images", {"train": 16, "val": 2}, classes=1)
    train(config(one, tmp_path / "run", **SHORT))
    assert f"warning: {one / 'train'} has one class, 'a': " in capsys.readouterr().out


def test_a_folder_s_own_configuration_means_that_folder(tree, finished, tmp_path):
    """Of a copy, too; but for a folder that is named."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    command = ["--config", str(copy / "config.yaml")]
    parsed, _ = ConfigParser(TrainConfig, "").parse_config(command)
    assert parsed.run_dir == str(copy)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    train(parsed, resume=True)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    parsed, _ = ConfigParser(TrainConfig, "").parse_config([*command, "--run_dir", "other"])
    assert parsed.run_dir == "other"
    (tmp_path / "recipe.yaml").write_text((copy / "config.yaml").read_text())
    parsed, _ = ConfigParser(TrainConfig, "").parse_config(["--config", str(tmp_path / "recipe.yaml")])
    assert parsed.run_dir == str(finished)


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    content = {
        "run_dir": "~/run",
        "data": {"root": "~/data"},
        "model": {"name": "local-dir:~/model", "checkpoint": "~/w"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    parsed, _ = ConfigParser(TrainConfig, "").parse_config(["--config", str(tmp_path / "c.yaml")])
    assert (parsed.run_dir, parsed.data.root, parsed.model.name, parsed.model.checkpoint) == (
        f"{tmp_path}/run", f"{tmp_path}/data", f"local-dir:{tmp_path}/model", f"{tmp_path}/w",
    )  # fmt: skip


def test_all_files_of_a_run_have_one_mode(finished):
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in finished.rglob("*") if path.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_what_a_killed_run_left_is_removed_at_the_next_start(tree, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / ".export-abc").mkdir()
    (run_dir / ".export-abc" / "model.safetensors").write_text("half")
    for name in (".log.tmp.jsonl", "checkpoints/.new.tmp.pt", "checkpoints/.best.pt.tmp", "ema/.model.tmp.safetensors"):
        (run_dir / name).write_text("half")
    train(config(tree, run_dir, **SHORT), resume=True)
    assert not list(run_dir.rglob(".*"))


def test_a_rename_reaches_the_disk(tmp_path, monkeypatch):
    """The folder that holds the name is synchronised, after the rename."""
    synced = []

    def synchronise(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.listdir(tmp_path)))

    monkeypatch.setattr(files.os, "fsync", synchronise)
    files.write_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": (-float("inf"),)}, tmp_path / "a.json")
    assert synced == [(str(tmp_path / ".a.tmp.json"), [".a.tmp.json"]), (str(tmp_path), ["a.json"])]
    assert strict((tmp_path / "a.json").read_text()) == {"a": None, "b": [None, 1.5], "c": [None]}


def test_a_file_that_is_not_written_whole_leaves_the_former_one(tmp_path):
    """Nor does what a killed process left of another attempt change the next."""
    path = tmp_path / "a.json"
    files.write_json([1], path)
    mode = path.stat().st_mode

    def write_half():
        with files.whole_file(path) as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert (os.listdir(tmp_path), strict(path.read_text())) == (["a.json"], [1])
    (tmp_path / ".a.tmp.json").write_text("half")
    (tmp_path / ".a.tmp.json").chmod(0o600)
    with files.whole_file(path) as unfinished, unfinished.open("a") as file:
        file.write("[2]")
    assert (path.stat().st_mode, strict(path.read_text())) == (mode, [2])


@pytest.mark.parametrize("kind", ["link", "file", "name"])
def test_a_run_folder_that_cannot_be_made_is_one_line(tree, tmp_path, capsys, kind):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    run_dir = {"link": "link", "file": "file/run", "name": 300 * "x"}[kind]
    want = {"link": "it is a link to a place that is not there", "file": "Not a directory", "name": "name is too long"}
    with pytest.raises(SystemExit), plain_errors():
        train(config(tree, tmp_path / run_dir, **SHORT))
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert want[kind] in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["log.jsonl", "summary.json", "model.safetensors"])
def test_a_disk_that_fills_loses_nothing(tree, finished, tmp_path, monkeypatch, capsys, name):
    """At any file: with room again the run goes on, or is done."""
    run_dir = tmp_path / "run"
    move = files.move_durably

    def full(source, path):
        if path.name == name:
            raise OSError(28, "No space left on device", str(path))
        move(source, path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "move_durably", full)
        with pytest.raises(SystemExit), plain_errors():
            train(config(tree, run_dir, **SHORT))
    assert capsys.readouterr().err == f"error: {run_dir / name}: the disk is full\n"
    train(config(tree, run_dir, **SHORT), resume=True)
    weights, others = load_file(finished / "model.safetensors"), load_file(run_dir / "model.safetensors")
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
    assert (run_dir / "summary.json").exists()


def test_what_the_disk_refuses_has_its_own_words():
    words = {
        name: files.why(OSError(getattr(files.errno, name), "x")) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS")
    }
    assert "disk is full" in words.pop("ENOSPC")
    assert not any("full" in text for text in words.values())


def test_a_lock_that_is_left_over_locks_nothing(tree, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / ".lock").write_text("process 1 on another host")
    train(config(tree, run_dir, **SHORT), resume=True)
    assert not (run_dir / ".lock").exists()
    with pytest.raises(RunError, match="exists; go on with it"):
        RunFolder(run_dir, "").begin(config(tree, run_dir), resume=False)
