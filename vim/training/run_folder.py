"""The folder of a run: configuration, log, checkpoints, summary, and the trained model in timm's format."""

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
    """Paths and files of a run. Only the main process writes.

    Args:
        path: the folder.
        tool: the tool that trains the run; for the command that resumes it.
    """

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
        """Existing checkpoints to resume from, newest first."""
        return [path for path in (self.last, self.previous) if path.exists()]

    @property
    def resume_command(self) -> str:
        return shlex.join(["python", self.tool, "--config", str(self.config), "--resume"])

    def check(self, config: RunConfig, resume: bool) -> None:
        """Raise RunError if a new run would overwrite one, or if there is no run with this configuration to resume."""
        if not resume:
            # Hidden files are left by a start that was stopped before it wrote its configuration.
            if self.path.exists() and (not self.path.is_dir() or any(p.name[0] != "." for p in self.path.iterdir())):
                hint = f"resume it: {self.resume_command}; or " if self.config.is_file() else ""
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
        """Create the folder of a new run, lock it, and remove half-written files of a killed run.

        Returns: a warning if the folder cannot be locked.
        Raises: RunError if the folder cannot be created, or another process is training in it.
        """
        if not resume:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                link = self.path.is_symlink() and not self.path.exists()
                reason = "it is a broken symbolic link" if link else why(error)
                raise RunError(f"cannot create run folder {self.path}: {reason}; choose another --run_dir") from error
        warning = self.lock.acquire()
        self.check(config, resume)  # again: another process may have written to the folder
        for folder in (self.path, self.path / "ema", self.checkpoints):
            for path in (*folder.glob(".*.tmp*"), *folder.glob(".export-*")):
                remove(path)
        if not resume:
            self.write_config(config)
        return warning

    def write_config(self, config: RunConfig) -> None:
        self._write(self.config, yaml.safe_dump(plain(config), sort_keys=False))

    def note_start(self, processes: int, device: torch.device) -> None:
        """Add a line to starts.jsonl: time, command, git revision, versions, device and number of processes."""
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
        """Rename new.pt to last.pt, and last.pt to previous.pt. At any moment one of the two is complete.

        Args:
            also: other paths for the new checkpoint; they exist before last.pt does.
        """
        for path in also:
            duplicate(self.new, path)
        if self.last.exists():
            replace(self.last, self.previous)
        replace(self.new, self.last)

    def load(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """Load the newest intact checkpoint; None if the run was never saved.

        Raises: RunError if there are checkpoints, but none can be loaded.
        """
        for path in (found := self.saved):
            try:
                return load_checkpoint(path)
            except RunError as error:
                if path == found[-1]:
                    raise
                warn(f"warning: {error}\nresuming from {self.previous}, the checkpoint before it")
        return None

    def epoch(self, number: int) -> Path:
        """Path of the checkpoint of an epoch."""
        return self.checkpoints / f"epoch-{number}.pt"

    def keep_epochs(self, numbers: Iterable[int]) -> None:
        """Remove the checkpoints of all other epochs."""
        kept = {self.epoch(number) for number in numbers}
        for path in self.checkpoints.glob("epoch-*.pt"):
            if path not in kept:
                remove(path)

    def write_log(self, history: list[dict[str, Any]]) -> None:
        """Write log.jsonl, one line per epoch. All of it each time: a crash may have hit between checkpoint and log."""
        self._write(self.log, "".join(to_json(record) + "\n" for record in history))

    def write_bad_images(self, paths: Iterable[str]) -> None:
        """Write bad_images.txt, one path per line, if there are any."""
        if text := "".join(f"{path}\n" for path in sorted(paths)):
            self._write(self.bad_images, text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(summary, self.summary)

    def export(
        self, model: nn.Module, model_kwargs: dict, data_config: dict, classes: list[str], name: str = ""
    ) -> None:
        """Write model.safetensors and config.json, for timm.create_model("local-dir:<folder>", pretrained=True).

        Args:
            model_kwargs: keyword arguments that the model was created with.
            data_config: input size, mean, std and crop of its evaluation.
            classes: names in label order.
            name: of a subfolder; empty: the run folder itself.
        """
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        model.pretrained_cfg.update(data_config)  # type: ignore[operator, union-attr]
        # Drop rates are settings of the training, not of the model.
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
    """The configuration as YAML reads it back: with lists instead of tuples."""
    return yaml.safe_load(yaml.safe_dump(asdict(config)))


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict with dotted keys: optim.lr."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values
