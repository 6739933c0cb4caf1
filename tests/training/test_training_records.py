"""What a run writes and prints: non-finite numbers, complete files, and one line for disk errors."""

import io
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from image_tree import write_image_tree
from safetensors.torch import load_file, save_file
from torch import nn
from whole_runs import config, one_thread  # noqa: F401  (the fixture)

from vim import files
from vim.console import ConfigParser, RunError, environment, plain_errors, progress
from vim.data import EvalDataConfig, TrainImages
from vim.training import Classification, TrainConfig, ValidateConfig, plots, run, train, trainer, validate
from vim.training.diagnosis import first_not_finite, gradient_norms, largest_activations
from vim.training.optim import ScheduleConfig
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
    """Parse strict JSON."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_an_epoch_without_an_update_has_no_loss(tree, tmp_path, monkeypatch, capsys):
    backward = trainer.Trainer._backward

    def poisoned(self, inputs, step):
        inputs[0].fill_(float("nan") if self.state.epoch == 1 else 0.5)
        return backward(self, inputs, step)

    monkeypatch.setattr(trainer.Trainer, "_backward", poisoned)
    train(config(tree, tmp_path))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 2/3"))
    assert "train loss nan  (4 non-finite updates skipped)" in line
    records = [strict(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(record["train_loss"] is None, record["skipped"]) for record in records] == [
        (False, 0),
        (True, 4),
        (False, 0),
    ]
    assert strict((tmp_path / "summary.json").read_text())["skipped_updates"] == 4


def test_times_and_speeds_add_up(tree, tmp_path, monkeypatch, capsys):
    """With a fake clock: a batch takes 1 s, a step 2 s (6 s in the second epoch), an evaluation 3 s."""
    now, epochs = [100.0], ScheduleConfig(epochs=2, warmup_epochs=0)

    def takes(owner, name, seconds):
        function = getattr(owner, name)

        def slow(self, *args):
            now[0] += seconds(self)
            return function(self, *args)

        monkeypatch.setattr(owner, name, slow)

    takes(TrainImages, "collate", lambda images: 1)
    takes(Classification, "batch_loss", lambda run: 6 if run.state.epoch else 2)
    takes(Classification, "evaluate", lambda run: 3)
    for module in (trainer, run):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    summary = train(config(tree, tmp_path, schedule=epochs))
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["seconds"], second["seconds"], summary["train_seconds"]) == (4 + 8 + 3, 4 + 24 + 3, 46)
    assert [record["images_per_second"] for record in (first, second)] == pytest.approx([64 / 12, 64 / 28])
    assert [record["data_wait"] for record in (first, second)] == pytest.approx([4 / 12, 4 / 28])
    assert summary["images_per_second"] == pytest.approx(2 * 64 / (12 + 28))
    assert summary["data_wait"] == pytest.approx((4 / 12 + 4 / 28) / 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.rpartition("  ")[2] for line in lines] == ["0:00:15 left", "0:00:00 left"]


def test_the_revision_is_the_commit_and_whether_files_are_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "code.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_revision() is None
    (tmp_path / "code.py").write_text("1")
    author = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    made = [*author, "commit", "-qm", "first"], [*author, "tag", "-am", "first", "v1"]
    for command in (["init", "-q"], ["add", "code.py"], *made):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    commit = subprocess.check_output(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], text=True).strip()
    assert environment.git_revision() == commit
    (tmp_path / "code.py").write_text("2")
    assert environment.git_revision() == f"{commit}-dirty"


@pytest.mark.skipif(sys.platform == "win32", reason="peak_memory_mib has no answer there")
def test_peak_memory_is_that_of_this_process():
    """In MiB, without that of the larger parent process."""
    code = """
import torch
from vim.training.summary import peak_memory_mib
held = bytearray(300 * 2**20)  # more than the imports have freed
before = peak_memory_mib(torch.device("cpu"))
more = bytearray(300 * 2**20)
print(before, peak_memory_mib(torch.device("cpu")) - before)
"""
    larger = bytearray(3 * 2**29)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    before, more = map(float, subprocess.check_output([sys.executable, "-c", code], env=environment).split())
    assert before < len(larger) / 2**20
    assert more == pytest.approx(300, abs=30)


def test_progress_is_a_line_a_minute_or_a_bar_and_nothing_on_other_processes(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def go(enabled, terminal=False):
        shown, screen = progress.Progress(enabled), io.StringIO()
        shown.console = progress.plain_console(file=screen, force_terminal=terminal, width=80)
        shown.line("begun")
        with shown.bar("epoch 3", 100, done=10) as advance:
            for step in range(1, 8):
                now[0] += 25
                advance(f"loss {step}")
        return screen.getvalue() or capsys.readouterr().out

    assert go(True) == "begun\nepoch 3  13/100  loss 3\nepoch 3  16/100  loss 6\n"
    bar = go(True, terminal=True)
    assert "17/100" in bar
    assert "epoch 3  loss 7" in bar
    assert [go(False), go(False, terminal=True)] == ["", ""]


class TwiceScaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]), nn.Linear(1, 1)

    def forward(self, numbers):
        first = self.blocks[0](self.blocks[0](numbers))
        return {"logits": [self.head(self.blocks[1](first))]}


def test_a_diagnosis_measures_blocks():
    """Norms over all parameters of a block; the largest absolute value of all its calls."""
    model = TwiceScaled()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (-0.25, 0.0, 3.0, 0.0, math.inf, 0.0), strict=True):
            parameter.fill_(value)
    for parameter, value in zip(model.parameters(), (3.0, -4.0, 0.0, math.nan, 2.0), strict=False):
        parameter.grad = torch.full_like(parameter, value)
    norms = gradient_norms(model)
    assert (norms["blocks.0"], norms["head"]) == (5, 2)
    assert math.isnan(norms["blocks.1"])
    assert first_not_finite(norms) == "first in blocks.1 (nan)"
    peaks = largest_activations(model, lambda: model(torch.tensor([[8.0], [-16.0]])))
    assert peaks == {"blocks.0": 4, "blocks.1": 3, "head": math.inf}
    assert first_not_finite(peaks) == "first in head (inf)"
    assert first_not_finite({"a": 2.0, "b": 3.0}) == "finite in all blocks, largest in b (3)"


def test_plots_show_the_numbers_of_a_run(tmp_path, monkeypatch):
    """Curves by epoch; in the confusion matrix a row per true class, coloured by fraction."""
    from matplotlib.axes import Axes

    curves, shown, texts = {}, [], {}
    plot, imshow, text = Axes.plot, Axes.imshow, Axes.text

    def noted(self, x, y, *args, label, **options):
        curves[label] = list(x), list(y)
        return plot(self, x, y, *args, label=label, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    monkeypatch.setattr(Axes, "imshow", lambda self, image, **o: shown.append(image) or imshow(self, image, **o))
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **o: texts.update({(y, x): s}) or text(self, x, y, s, **o))
    names = {"train_loss": "training", "loss": "validation", "top1": "top-1", "top5": "top-5"}
    names["ema_top1"] = "EMA top-1"
    history = [{"epoch": e, **{name: 10.0 * place + e for place, name in enumerate(names)}} for e in (1, 2)]
    plots.write_plots(history, torch.tensor([[3, 1, 0], [0, 0, 0], [0, 2, 6]]), ["a", "b", "c"], tmp_path)
    want = {label: ([1, 2], [10.0 * place + 1, 10.0 * place + 2]) for place, label in enumerate(names.values())}
    assert curves == want
    assert shown[0].tolist() == [[0.75, 0.25, 0], [0, 0, 0], [0, 0.25, 0.75]]
    assert [texts[place] for place in ((0, 0), (0, 1), (2, 1), (2, 2))] == ["3", "1", "2", "6"]


def test_non_finite_weights_count_as_wrong_with_a_warning(tree, finished, tmp_path, capsys):
    folder, output = tmp_path / "run", tmp_path / "v.json"
    shutil.copytree(finished, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: torch.full_like(w, torch.nan) for k, w in weights.items()}, folder / "model.safetensors")
    results = validate(ValidateConfig(str(folder), data=EvalDataConfig(str(tree), num_workers=0), output=str(output)))
    assert (results["top1"], results["top5"], results["not_finite"]) == (0, 0, 15)
    assert "the logits of 15 of 15 images are not finite; they count as wrong" in capsys.readouterr().out
    assert strict(output.read_text())["loss"] is None


def test_one_class_teaches_nothing(tmp_path, capsys):
    one = write_image_tree(tmp_path / "images", {"train": 16, "val": 2}, classes=1)
    train(config(one, tmp_path / "run", **SHORT))
    assert f"warning: {one / 'train'} has one class, 'a': " in capsys.readouterr().out


def test_a_folder_s_own_configuration_means_that_folder(tree, finished, tmp_path):
    """A copy means the copy, unless --run_dir is given."""
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
    """The folder is synced after the rename."""
    synced = []

    def synchronise(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.listdir(tmp_path)))

    monkeypatch.setattr(files.os, "fsync", synchronise)
    files.write_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": (-float("inf"),)}, tmp_path / "a.json")
    assert synced == [(str(tmp_path / ".a.tmp.json"), [".a.tmp.json"]), (str(tmp_path), ["a.json"])]
    assert strict((tmp_path / "a.json").read_text()) == {"a": None, "b": [None, 1.5], "c": [None]}


def test_a_file_that_is_not_written_whole_leaves_the_former_one(tmp_path):
    """And leftovers of a killed process do not affect the next attempt."""
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
    want = {"link": "it is a broken symbolic link", "file": "Not a directory", "name": "name is too long"}
    with pytest.raises(SystemExit), plain_errors():
        train(config(tree, tmp_path / run_dir, **SHORT))
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert want[kind] in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["log.jsonl", "summary.json", "model.safetensors"])
def test_a_disk_that_fills_loses_nothing(tree, finished, tmp_path, monkeypatch, capsys, name):
    """Whichever file fails: once there is space, the run resumes or is complete."""
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


def test_a_leftover_lock_file_locks_nothing(tree, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / ".lock").write_text("process 1 on another host")
    train(config(tree, run_dir, **SHORT), resume=True)
    assert not (run_dir / ".lock").exists()
    with pytest.raises(RunError, match="exists; resume it"):
        RunFolder(run_dir, "").begin(config(tree, run_dir), resume=False)
