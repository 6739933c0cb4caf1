"""The scripts in tools/, as a user runs them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from image_tree import write_image_tree

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
    monkeypatch.setenv("COLUMNS", "80")  # of tables

    def call(tool, *args):
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, args)])
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")

    return call


def test_train_resume_and_validate(setting, monkeypatch, capsys, call):
    command = [sys.executable, str(ROOT / "tools" / "train.py"), "--config", "config.yaml", "--run_dir", "runs/one"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=setting, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/2  train loss" in done.stdout  # plain lines where there is no terminal
    assert "\x1b" not in done.stdout
    assert f"plots: {Path('runs/one/learning_curve.png')}" in done.stdout

    # The rest in this process, which spares the imports.
    monkeypatch.chdir(setting)
    with pytest.raises(SystemExit) as exit_:
        call("train", "--config", "runs/one/config.yaml")
    assert exit_.value.code == 1
    message = "error: run folder runs/one exists; go on with it: python tools/train.py --config runs/one/config.yaml"
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
    out = capsys.readouterr().out
    for row, size in zip(rows, ("12 x 12", "16 x 16"), strict=True):
        line = next(line for line in out.splitlines() if "runs/one" in line and size in line)
        assert [cell.strip() for cell in line.split("│")[3:6]] == ["0.8", "9", f"{row['top1']:.2f}"]


@pytest.mark.parametrize(
    "tool",
    [
        "train",
        "validate",
        "prepare_mnist",
        "export_features",
        "knn",
        "linear_probe",
        "visualize",
        "export_model",
        "push_to_hub",
        "demo",
        "kill_and_resume",
    ],
)
def test_help(tool, call, capsys):
    with pytest.raises(SystemExit) as exit_:
        call(tool, "--help")
    assert exit_.value.code == 0
    assert f"python tools/{tool}.py" in capsys.readouterr().out


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
