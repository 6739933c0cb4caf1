"""The scripts in tools/, run as a user runs them."""

import argparse
import ast
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from image_tree import write_image_tree

from vim.experiments.kill_test import Killed

ROOT = Path(__file__).parent.parent
CONFIG = {
    "model": {"name": "vim_nano", "kwargs": {"img_size": 12, "patch_size": 4, "in_chans": 1, "depth": 1}},
    "data": {"batch_size": 8, "num_workers": 0, "crop_pct": 1.0, "mean": [0.3], "std": [0.2]},
    "augment": {"scale": [1, 1], "ratio": [1, 1], "hflip": 0.0, "affine_degrees": 5.0},
    "optim": {"lr": 0.01, "lr_batch": 8},
    "schedule": {"epochs": 2, "warmup_epochs": 0},
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A folder with config.yaml and images/."""
    path = tmp_path_factory.mktemp("tools")
    write_image_tree(path / "images", {"train": 33, "val": 9}, classes=3)
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"data": {**CONFIG["data"], "root": "images"}}))
    return path


@pytest.fixture
def call(monkeypatch):
    """call(tool, *args): run a tool in this process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("COLUMNS", "80")  # width of tables

    def call(tool, *args):
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, args)])
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")

    return call


def test_train_resume_and_validate(setting, monkeypatch, capsys, call):
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "--config", "config.yaml", "--run_dir", "runs/one"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=setting, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/2  train loss" in done.stdout  # plain lines, because stdout is no terminal
    assert "\x1b" not in done.stdout
    assert f"plots: {Path('runs/one/learning_curve.png')}" in done.stdout

    # The rest runs in this process, to save the imports.
    monkeypatch.chdir(setting)
    with pytest.raises(SystemExit) as exit_:
        call("train", "--config", "runs/one/config.yaml")
    assert exit_.value.code == 1
    message = "error: run folder runs/one exists; resume it: python tools/train.py --config runs/one/config.yaml"
    assert capsys.readouterr().err.startswith(message)

    call("train", "--config", "runs/one/config.yaml", "--resume")
    assert "train loss" not in capsys.readouterr().out  # nothing left to train

    call("validate", "--model", "runs/one", "--data.root", "images", "--data.num_workers", 0, "--output", "out.json")
    summary, results = (json.loads(Path(name).read_text()) for name in ("runs/one/summary.json", "out.json"))
    assert (results["top1"], results["images"]) == (summary["top1"], 9)
    assert f"{summary['top1']:.2f}" in capsys.readouterr().out
    args = ("--data.root", "images", "--data.num_workers", 0, "--img_sizes", "[12, 16]", "--crop_pcts", "[0.8]")
    call("validate", "--model", "runs/one", *args)
    rows = json.loads(Path("validate.json").read_text())["rows"]
    shown = cells(capsys.readouterr().out)
    for row, size in zip(rows, ("12 x 12", "16 x 16"), strict=True):
        found = next(line for line in shown if "runs/one" in line and size in line)
        assert found[2:5] == ["0.8", "9", f"{row['top1']:.2f}"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [(("--steps", 0), "--steps must be at least 1, got 0"), (("--find_batch_size",), "needs one process with a GPU")],
)
def test_trying_out_a_run_trains_nothing(setting, monkeypatch, capsys, call, argument, message):
    monkeypatch.chdir(setting)
    with pytest.raises(SystemExit):
        call("train", "--config", "config.yaml", "--run_dir", "runs/tried", *argument)
    assert message in capsys.readouterr().err
    assert not Path("runs/tried").exists()


def cells(out):
    """The cells of the rows of a printed table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def test_compare_shows_every_seed_and_rates_at_the_end_of_the_grid(call, monkeypatch, capsys):
    result = {"parameters": 1234567, "test": [10.0, 14.0], "mean": 12.0, "deviation": 8**0.5}
    found = {name: result | {"lr": lr} for name, lr in (("low", 0.1), ("middle", 0.2), ("high", 0.4))}
    given = []
    monkeypatch.setattr(
        "vim.experiments.comparison.compare", lambda config: given.append(config) or {"contenders": found}
    )
    monkeypatch.setenv("COLUMNS", "160")
    call("compare", "--contenders", '{"low": {}}', "--lrs", "[0.2, 0.1, 0.4]", "--seeds", "[1, 2]")
    ends = {"low": "0.1 (end of the grid)", "middle": "0.2", "high": "0.4 (end of the grid)"}
    shown = ["10.00, 14.00", "12.00", "2.83"]
    assert cells(capsys.readouterr().out) == [[name, "1,234,567", lr, *shown] for name, lr in ends.items()]
    assert (given[0].lrs, given[0].seeds) == ([0.2, 0.1, 0.4], [1, 2])


def test_benchmark_loader_tries_each_number_of_workers(call, monkeypatch, capsys):
    given = []

    def speed(config, workers, seconds):
        given.append((config.data.root, workers, seconds))
        return 90.0 * (workers + 1)

    monkeypatch.setattr("vim.experiments.loader_speed.loader_speed", speed)
    call("benchmark_loader", "--data.root", "there", "--workers", 0, 2, "--seconds", 3)
    assert given == [("there", 0, 3), ("there", 2, 3)]
    assert cells(capsys.readouterr().out) == [["0", "90", "90"], ["2", "270", "135"]]


@pytest.mark.parametrize(("name", "differences", "code"), [("SIGTERM", ["exit code 0"], 1), ("SIGKILL", [], 0)])
def test_kill_and_resume_counts_runs_and_fails_for_one_that_differs(call, monkeypatch, capsys, name, differences, code):
    given = []

    class Test(SimpleNamespace):
        def __init__(self, *args):
            given.extend(args)
            super().__init__(start_seconds=1.0, run_seconds=2.0)

        def run_all(self, *args):
            given.extend(args)
            return [Killed(["steps", "start"], 1.5, []), Killed(["steps"], 2.5, differences)]

    monkeypatch.setattr("vim.experiments.kill_test.KillTest", Test)
    options = ["--signal", name, "--runs", 2, "--jobs", 3, "--kills", 4, "--seed", 5]
    with pytest.raises(SystemExit) as exit_:
        call("kill_and_resume", "runs/killed", *options, "--", "tools/train.py", "--config", "x.yaml")
    assert exit_.value.code == code
    assert given == [["tools/train.py", "--config", "x.yaml"], Path("runs/killed"), signal.Signals[name], 4, 5, 2, 3]
    out = capsys.readouterr().out
    assert f"run 0: {name} during steps, start: identical\n" in out
    assert f"{2 - len(differences)} of 2 identical; 3 signals: {{'steps': 2, 'start': 1}}\n" in out
    assert ("longest time from the signal to the end: 2.5 s" in out) == (name == "SIGTERM")


def test_split_folder_divides_by_share_and_seed(call, tmp_path, capsys):
    parts = []
    for seed in (1, 2):
        root = write_image_tree(tmp_path / str(seed), {"all": 24}, classes=3)
        call("split_folder", root, "--split", "all", "--parts", "fit=0.75", "rest=0.25", "--seed", seed)
        assert capsys.readouterr().out == f"{root}/fit: 18 images, {root}/rest: 6 images\n"
        parts.append({path.name for path in (root / "rest").rglob("*.png")})
    assert parts[0] != parts[1]
    with pytest.raises(SystemExit):
        call("split_folder", root, "--parts", "fit")
    assert "want NAME=SHARE, for example val=0.2, got 'fit'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "function", "arguments", "given", "returned", "said"),
    [
        (
            "prepare_jpegs",
            "vim.data.synthetic.write_jpegs",
            ["~/x", "--classes", 3, "--images", 5],
            ["/home/ann/x", 3, 5],
            None,
            "/home/ann/x written",
        ),
        ("prepare_elpv", "vim.data.elpv.write_elpv", ["x", "--size", 50], ["x", 50], None, "x written"),
        ("prepare_mnist", "vim.data.write_mnist5k", ["x"], ["x"], True, "MNIST-5k: written to x"),
        ("prepare_mnist", "vim.data.write_mnist5k", ["x"], ["x"], False, "MNIST-5k: already in x"),
        (
            "plot_state_spaces",
            "vim.visualize.state_spaces.plot_state_spaces",
            ["--output", "~/x.png"],
            ["/home/ann/x.png"],
            "there",
            "there",
        ),
    ],
)
def test_a_tool_passes_its_arguments_on(call, monkeypatch, capsys, tool, function, arguments, given, returned, said):
    monkeypatch.setenv("HOME", "/home/ann")
    seen = []
    monkeypatch.setattr(function, lambda *args: seen.extend(args) or returned)
    call(tool, *arguments)
    assert seen == given
    assert capsys.readouterr().out == f"{said}\n"


@pytest.mark.parametrize(
    ("output", "said"), [([], "pushed to there"), (["--output", "x"], "written to there, nothing was pushed")]
)
def test_push_to_hub_says_whether_it_did(call, monkeypatch, capsys, output, said):
    monkeypatch.setattr("vim.publish.push_to_hub", lambda config: "there")
    call("push_to_hub", "--run_dir", "run", "--repo", "ann/digits", "--license", "mit", *output)
    assert capsys.readouterr().out == f"{said}\n"


def test_benchmark_generation_reports_the_median_of_rounds_after_the_first(call, monkeypatch, tmp_path, capsys):
    """The model sets the clock: half a second a call, and 10, 20 and 60 ms a token in rounds 1 to 3."""
    now, calls = [0.0], [0]

    def generate(ids, new):
        assert ids.shape == (4, 16)
        calls[0] += 1
        now[0] += 0.5 + new * (1.0, 0.01, 0.02, 0.06)[calls[0] // 3]  # round 0 has no prompt-only call

    model = SimpleNamespace(generate=generate)
    model.to = model.eval = lambda *_: model
    monkeypatch.setattr("vim.models.mamba_lm.MambaLM", lambda *_, **__: model)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    call("benchmark_generation", "--batch_sizes", 4, "--tokens", 50, "--output", tmp_path / "g.json")
    (row,) = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert (row["batch"], row["who"]) == (4, "vim")
    assert row["rounds"] == pytest.approx([0.01, 0.02, 0.06])
    assert (row["step_seconds"], row["prompt_seconds"]) == pytest.approx((0.02, 0.52))
    assert cells(capsys.readouterr().out) == [["4", "vim", "20.00", "200", "520.0"]]


def test_profile_model_shows_what_it_writes(call, tmp_path, capsys):
    options = ("--img_size", 256, "--kwargs.depth", 2, "--kwargs.embed_dim", 512)
    call("profile_model", "--models", "[vim_nano]", *options, "--output", tmp_path / "p.json")
    (row,) = json.loads((tmp_path / "p.json").read_text())
    macs, with_scan = (f"{row[key] / 1e9:.2f}" for key in ("macs", "macs_with_scan"))
    parameters, activations = (f"{row[key] / 1e6:.1f} M" for key in ("parameters", "activations"))
    (shown,) = cells(capsys.readouterr().out)
    assert shown == ["vim_nano", "256 x 256", parameters, macs, with_scan, activations]
    assert len({parameters, macs, with_scan, activations}) == 4


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_help(tool, call, monkeypatch, capsys):
    """What the tool does, in a line; a command to copy; and a text for every option."""
    shown = []
    print_help = argparse.ArgumentParser.print_help
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: shown.append(self) or print_help(self))
    with pytest.raises(SystemExit) as exit_:
        call(tool, "--help")
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    first = ast.get_docstring(ast.parse((ROOT / "tools" / f"{tool}.py").read_text())).splitlines()[0]
    assert re.fullmatch(r"[A-Z][a-z]+ .*\.", first)
    assert re.search(rf"^usage: {tool}\.py .*?\n\n{re.escape(first)}\n", out, re.DOTALL)
    assert f"\npython tools/{tool}.py " in out
    actions = shown[0]._actions
    for action in actions:
        section = any(other.dest.startswith(f"{action.dest}.") for other in actions)
        if action.help != argparse.SUPPRESS and not section:
            assert re.search(r"\w", action.help or ""), f"{action.dest} has no text"
            words = r"\s+".join(map(re.escape, action.help.split()[:3]))  # argparse breaks lines
            assert re.search(words, out)


def test_generate(call, tmp_path, capsys):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from vim.models.mamba_lm import MambaLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    MambaLM(256, 16, 1).save_pretrained(tmp_path / "lm")
    common = ["--model", tmp_path / "lm", "--tokenizer", tmp_path / "tokenizer.json", "--max_new_tokens", "4"]
    call("generate", *common, "--prompts", '["Snakes"]')
    one = capsys.readouterr()
    assert one.out.startswith("Snakes")
    assert "4 tokens after each prompt" in one.err
    call("generate", *common, "--prompts", '["Snakes", "Eels"]', "--temperature", "1.0", "--seed", "3")
    assert capsys.readouterr().out.count("\n---\n") == 2
