"""The folder of a run: configuration, log, checkpoints, summary, and the trained model as timm loads it."""

import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import save_for_hf
from torch import nn

from vim.checkpoint import duplicate, load_checkpoint, remove, replace
from vim.console.environment import device_name, git_revision, versions
from vim.console.errors import RunError
from vim.console.free_on_resume import free_keys
from vim.files import to_json, whole_file, why, write_json

from .config import CONFIG_FILE, STARTS_FILE, RunConfig
from .run_lock import RunLock


class RunFolder:
    """Paths and files of a run, and the tool that made it. Only the main process writes."""

    def __init__(self, path: str | Path, tool: str):
        self.path, self.tool = Path(path), tool
        self.lock = RunLock(self.path)
        self.config = self.path / CONFIG_FILE
        self.log = self.path / "log.jsonl"
        self.starts = self.path / STARTS_FILE
        self.summary = self.path / "summary.json"
        self.bad_images = self.path / "bad_images.txt"
        self.checkpoints = self.path / "checkpoints"
        names = ("new", "last", "previous", "best")
        self.new, self.last, self.previous, self.best = (self.checkpoints / f"{name}.pt" for name in names)

    @property
    def saved(self) -> list[Path]:
        """The checkpoints to go on from that are there, newest first."""
        return [path for path in (self.last, self.previous) if path.exists()]

    @property
    def resume_command(self) -> str:
        return shlex.join(["python", self.tool, "--config", str(self.config), "--resume"])

    def check(self, config: RunConfig, resume: bool) -> None:
        """Raise RunError if the folder holds a run and should not, or the other way round, or another run's."""
        if not resume:
            # Hidden files are what a start left that was stopped before its configuration stood there.
            if self.path.exists() and (not self.path.is_dir() or any(p.name[0] != "." for p in self.path.iterdir())):
                hint = f"go on with it: {self.resume_command}; or " if self.config.is_file() else ""
                raise RunError(f"run folder {self.path} exists; {hint}choose another --run_dir, or remove it")
            return
        if not self.config.is_file():
            raise RunError(f"no run to resume in {self.path}: {self.config} is missing; start it without --resume")
        saved, given = (flat(c) for c in (yaml.safe_load(self.config.read_text()), plain(config)))
        kept = sorted((saved | given).keys() - free_keys(type(config)))
        if changed := [key for key in kept if saved.get(key) != given.get(key)]:
            was = ", ".join(f"{key} was {saved.get(key)!r}, is {given.get(key)!r}" for key in changed)
            raise RunError(f"a resumed run keeps its configuration, but {was}; resume with: {self.resume_command}")

    def begin(self, config: RunConfig, resume: bool) -> str | None:
        """Make the folder of a new run, lock it, and remove what a killed run has left half written in it.

        Returns: a warning where it cannot be locked.
        Raises: RunError for a folder that cannot be made, or in which another process trains.
        """
        if not resume:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                link = self.path.is_symlink() and not self.path.exists()
                reason = "it is a link to a place that is not there" if link else why(error)
                raise RunError(f"cannot make run folder {self.path}: {reason}; choose another --run_dir") from error
        warning = self.lock.acquire()
        self.check(config, resume)  # again: another process may have been here
        for folder in (self.path, self.path / "ema", self.checkpoints):
            for path in (*folder.glob(".*.tmp*"), *folder.glob(".export-*")):
                remove(path)
        if not resume:
            self.write_config(config)
        return warning

    def write_config(self, config: RunConfig) -> None:
        self._write(self.config, yaml.safe_dump(plain(config), sort_keys=False))

    def note_start(self, processes: int, device: torch.device) -> None:
        """Add a line to starts.jsonl: when, by which command, from which revision, with which versions and where."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "git_revision": git_revision(),
            "versions": versions(),
            "device": device_name(device),
            "processes": processes,
        }
        with self.starts.open("a") as file:
            file.write(to_json(line) + "\n")

    def keep_new(self, *also: Path) -> None:
        """Make new.pt, which is written, the last checkpoint; the one before becomes previous.pt. At any moment one of
        them is whole.

        Args:
            also: other names for the same, which are there before.
        """
        for path in also:
            duplicate(self.new, path)
        if self.last.exists():
            replace(self.last, self.previous)
        replace(self.new, self.last)

    def load(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest checkpoint that is whole; None if the run was never saved.

        Raises: RunError if there are checkpoints and none can be loaded.
        """
        for path in (found := self.saved):
            try:
                return load_checkpoint(path)
            except RunError as error:
                if path == found[-1]:
                    raise
                warn(f"warning: {error}\ngoing on from {self.previous}, the checkpoint before")
        return None

    def epoch(self, number: int) -> Path:
        """Checkpoint of an epoch that is kept."""
        return self.checkpoints / f"epoch-{number}.pt"

    def keep_epochs(self, numbers: Iterable[int]) -> None:
        """Remove the checkpoints of other epochs."""
        kept = {self.epoch(number) for number in numbers}
        for path in self.checkpoints.glob("epoch-*.pt"):
            if path not in kept:
                remove(path)

    def write_log(self, history: list[dict[str, Any]]) -> None:
        """Write log.jsonl, one line an epoch. Whole each time: a crash may have come between checkpoint and log."""
        self._write(self.log, "".join(to_json(record) + "\n" for record in history))

    def write_bad_images(self, paths: Iterable[str]) -> None:
        """Write bad_images.txt, a path a line, if there is any."""
        if text := "".join(f"{path}\n" for path in sorted(paths)):
            self._write(self.bad_images, text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(summary, self.summary)

    def export(
        self, model: nn.Module, model_kwargs: dict, data_config: dict, classes: list[str], name: str = ""
    ) -> None:
        """Write model.safetensors and config.json, for timm.create_model("local-dir:<folder>", pretrained=True).

        Args:
            model_kwargs: that the model was created with.
            data_config: input size, mean, std and crop of its evaluation.
            classes: names in label order.
            name: of a folder below this one; none for this one.
        """
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        model.pretrained_cfg.update(data_config)  # type: ignore[operator, union-attr]
        # Drop rates belong to the training, not to the model.
        arguments = {key: value for key, value in model_kwargs.items() if not key.endswith(("drop_rate", "path_rate"))}
        with tempfile.TemporaryDirectory(dir=self.path, prefix=".export-") as unfinished:
            save_for_hf(
                model,
                unfinished,
                model_config={"label_names": classes},
                model_args=arguments,
                safe_serialization=True,
            )
            for file in Path(unfinished).iterdir():
                with whole_file(folder / file.name) as copy:
                    file.replace(copy)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        with whole_file(path) as unfinished:
            unfinished.write_text(text, "utf-8")


def plain(config: RunConfig) -> dict[str, Any]:
    """As YAML gives it back: lists for tuples."""
    return yaml.safe_load(yaml.safe_dump(asdict(config)))


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys of sections dotted: optim.lr."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values
