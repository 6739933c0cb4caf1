"""The kill test reports differences from the uninterrupted run, and what the run was doing at each signal."""

import json
import signal
import time
from copy import deepcopy

import pytest
import torch

from vim.checkpoint import save_checkpoint
from vim.experiments.kill_test import KillTest, differences
from vim.training.run_folder import RunFolder

RECORD = {"epoch": 1, "loss": 0.5, "seconds": 3.0, "images_per_second": 7.0, "data_wait": 0.1}
# Two epochs of four updates, each of 8 images.
WHOLE = {
    "update": 8,
    "history": [RECORD, RECORD | {"epoch": 2}],
    "so_far": {"images": 0, "seconds": 0.0, "waited": 0.0},
    "split": {"batch_size": 4, "processes": 1, "accumulate": 2},
    "model": {"weight": torch.arange(4.0), "steps": torch.tensor(8)},
}


def write(folder, state):
    run = RunFolder(folder, "")
    run.checkpoints.mkdir(parents=True)
    save_checkpoint(state, run.last)
    run.log.write_text("".join(json.dumps(record) + "\n" for record in state["history"]))
    return folder


def changed(*keys, value):
    state = deepcopy(WHOLE)
    part = state
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return state


@pytest.mark.parametrize(
    ("state", "want"),
    [
        (WHOLE, []),
        (changed("model", "weight", value=torch.tensor([0.0, 1.0, 2.0, 3.001])), ["last.pt: model: weight"]),
        (changed("model", "weight", value=torch.arange(4.0).double()), ["last.pt: model: weight"]),
        (changed("model", "more", value=torch.zeros(1)), ["last.pt: model: more"]),
        (changed("update", value=8.0), ["last.pt: update"]),
        (changed("history", 1, "loss", value=0.6), ["last.pt: history[1]: loss", "log.jsonl[1]: loss"]),
        (changed("history", value=[RECORD]), ["last.pt: history", "log.jsonl"]),
        (changed("history", 1, "seconds", value=4.0), []),
        (changed("so_far", "waited", value=4.0), []),
    ],
)
def test_runs_are_compared_in_all_but_their_times(tmp_path, state, want):
    assert differences(write(tmp_path / "whole", WHOLE), write(tmp_path / "cut", state)) == want


# A fake training tool. It waits for a signal; uninterrupted or resumed runs finish at once.
TOOL = """
import shutil, signal, sys, time
from pathlib import Path

files, code, run_dir = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[sys.argv.index("--run_dir") + 1])
alone, resumed = run_dir.name == "whole", "--resume" in sys.argv
signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
shutil.copytree(files / ("begun" if not alone and not resumed else "ended"), run_dir, dirs_exist_ok=True)
(run_dir / "config.yaml").touch()
if not alone and not resumed:
    (run_dir / "ready").touch()
    time.sleep(1000)
"""


class PatientKillTest(KillTest):
    def _stop(self, process, result):
        while not list(self.folder.glob("run-*/ready")):
            time.sleep(0.01)
        super()._stop(process, result)


BEGUN = {
    "steps": changed("update", value=5) | {"history": [RECORD], "so_far": {"images": 8}},
    "evaluation": changed("update", value=4) | {"history": [], "so_far": {"images": 32}},
}


@pytest.mark.parametrize(
    ("number", "code", "moment", "ended", "want"),
    [
        ("SIGTERM", 143, "start", WHOLE, []),
        ("SIGTERM", 0, "steps", WHOLE, ["exit code 0"]),
        ("SIGTERM", 143, "evaluation", changed("update", value=9), ["last.pt: update"]),
        ("SIGKILL", 143, "results", WHOLE, []),
        ("SIGKILL", 143, "checkpoint", WHOLE, []),
    ],
)
def test_a_kill_reports_moment_exit_code_and_differences(tmp_path, number, code, moment, ended, want):
    (tmp_path / "tool.py").write_text(TOOL)
    write(tmp_path / "ended", WHOLE)
    if moment == "start":
        (tmp_path / "begun").mkdir()
    else:
        write(tmp_path / "begun", BEGUN.get(moment, WHOLE))
    if moment == "checkpoint":
        (tmp_path / "begun" / "checkpoints" / ".new.tmp.pt").touch()
    command = [str(tmp_path / "tool.py"), str(tmp_path), str(code)]
    test = PatientKillTest(command, tmp_path / "runs", signal.Signals[number], kills=1)
    save_checkpoint(ended, tmp_path / "ended" / "checkpoints" / "last.pt")
    killed = test.run(0)
    assert (killed.moments, killed.differences) == ([moment], want)
    assert killed.exit_seconds > 0
