"""The kill test: a run that is killed at any moment and resumed must give the same result as an uninterrupted one."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vim.checkpoint import load_checkpoint
from vim.console.errors import RunError
from vim.training.run_folder import RunFolder
from vim.training.state import UpdateSplit

TIME_FIELDS = {"seconds", "waited", "images_per_second", "data_wait"}
WAIT = 600  # timeout of a whole run in seconds


@dataclass
class Killed:
    """Result of a killed run.

    moments: what the run was doing at each signal. exit_seconds: longest time from a signal to the end of the process.
    differences: from the uninterrupted run; empty if the test passed.
    """

    moments: list[str] = field(default_factory=list)
    exit_seconds: float = 0.0
    differences: list[str] = field(default_factory=list)


class KillTest:
    """Runs of one configuration on the CPU: one is uninterrupted, the others get signals at random moments.

    Args:
        command: a training tool and its arguments, without --run_dir.
        folder: for the runs; must be new.
        number: signal to send: SIGKILL to the process, any other signal to the process and its workers.
        kills: number of signals per run.
        seed: of the moments.
    """

    def __init__(self, command: list[str], folder: Path, number: signal.Signals, kills: int = 2, seed: int = 0):
        self.command, self.folder, self.number, self.kills, self.seed = command, folder, number, kills, seed
        folder.mkdir(parents=True)
        self.whole = folder / "whole"
        start = time.monotonic()
        process = self._start(self.whole)
        while process.poll() is None and not RunFolder(self.whole, "").config.exists():
            time.sleep(0.02)
        self.start_seconds = time.monotonic() - start
        self._finish(process, self.whole)
        self.run_seconds = time.monotonic() - start - self.start_seconds

    def run(self, index: int) -> Killed:
        """Start, kill and resume a run until it finishes, and compare it with the uninterrupted one."""
        random_moment = random.Random(f"{self.seed} {index}")
        run, result = RunFolder(self.folder / f"run-{index}", ""), Killed()
        for _ in range(self.kills):
            process = self._start(run.path)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.start_seconds + random_moment.uniform(0, self.run_seconds))
            if process.poll() is not None:
                break
            self._stop(process, result)
            result.moments.append(self._moment(run))
        self._finish(self._start(run.path), run.path)
        result.differences += differences(self.whole, run.path)
        return result

    def run_all(self, runs: int, jobs: int) -> list[Killed]:
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(self.run, range(runs)))

    def _start(self, run_dir: Path) -> subprocess.Popen:
        resume = ["--resume"] if RunFolder(run_dir, "").config.exists() else []
        log = run_dir.with_suffix(".txt").open("a")
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, *self.command, "--run_dir", str(run_dir), *resume]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _stop(self, process: subprocess.Popen, result: Killed) -> None:
        sent = time.monotonic()
        if self.number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, self.number)
        code = process.wait(WAIT)
        result.exit_seconds = max(result.exit_seconds, time.monotonic() - sent)
        if code not in (-self.number, 128 + self.number):  # -number: before the tool handled signals
            result.differences.append(f"exit code {code}")

    def _finish(self, process: subprocess.Popen, run_dir: Path) -> None:
        if process.wait(WAIT):
            log = run_dir.with_suffix(".txt")
            raise RunError(f"the run in {run_dir} failed with exit code {process.returncode}; see {log}")

    def _moment(self, run: RunFolder) -> str:
        """What a run was doing when it was stopped, judged by its files."""
        if any(run.checkpoints.glob(".*")) or (run.previous.exists() and not run.last.exists()):
            return "checkpoint"
        state = run.load(lambda warning: None)
        if state is None:
            return "start"
        whole = load_checkpoint(RunFolder(self.whole, "").last)
        if state["update"] == whole["update"] and len(state["history"]) == len(whole["history"]):
            return "results"
        return "evaluation" if state["so_far"]["images"] and _epoch_done(state, whole) else "steps"


def _epoch_done(state: dict[str, Any], whole: dict[str, Any]) -> bool:
    updates = whole["update"] // len(whole["history"])
    return state["so_far"]["images"] == updates * UpdateSplit(**state["split"]).total_batch


def differences(whole: Path, cut: Path) -> list[str]:
    """Names of values that differ between the last checkpoints and the log.jsonl of two run folders, except times."""
    runs = RunFolder(whole, ""), RunFolder(cut, "")
    states = [load_checkpoint(run.last) for run in runs]
    logs = [[json.loads(line) for line in run.log.read_text().splitlines()] for run in runs]
    return _unequal(states[0], states[1], "last.pt") + _unequal(logs[0], logs[1], "log.jsonl")


def _unequal(a: Any, b: Any, name: str) -> list[str]:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = (a.keys() | b.keys()) - TIME_FIELDS
        return [text for key in keys for text in _unequal(a.get(key), b.get(key), f"{name}: {key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [text for i, (x, y) in pairs for text in _unequal(x, y, f"{name}[{i}]")]
    return [] if type(a) is type(b) and a == b else [name]
