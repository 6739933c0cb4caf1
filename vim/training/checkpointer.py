"""Saves a run regularly, and before a signal stops it."""

import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from vim.checkpoint import remove, save_checkpoint, save_shard
from vim.console.errors import InterruptedRunError
from vim.console.interruption import Interruption
from vim.files import write_json

from .config import CheckpointConfig
from .run_folder import RunFolder
from .state import TrainingState


class Checkpointer:
    """Saves a run between updates: as often as configured, and before a signal stops it.

    All processes call its methods together. The main process writes; for a sharded model, each process its shard.
    """

    def __init__(
        self,
        run: RunFolder,
        config: CheckpointConfig,
        interruption: Interruption,
        accelerator: Accelerator,
        state: TrainingState,
    ):
        self.run, self.config, self.interruption = run, config, interruption
        self.accelerator, self.state = accelerator, state
        self._saved_at, self._saved_update = time.monotonic(), state.update

    def requests(self) -> tuple[bool, bool]:
        """Whether this process asks for a checkpoint, because it is due by time, and for a stop, after a signal."""
        minutes = self.config.every_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return due, self.interruption.asked is not None

    def due_at(self, update: int) -> bool:
        """Whether a checkpoint is due after this update, by the count of updates."""
        updates = self.config.every_updates
        return updates is not None and update % updates == 0

    def after_update(self, save: bool, stop: bool) -> None:
        """Save if a checkpoint is due; stop if requested.

        Args:
            save, stop: whether any process requested it.

        Raises: InterruptedRunError, after saving, if a signal has come.
        """
        if save or stop or self.due_at(self.state.update):
            self.save()
        if stop:
            self.stop()

    def after_failure(self) -> None:
        """Save the updates since the last checkpoint of a run that cannot continue."""
        if self.state.update > self._saved_update:
            self.save()

    def stop_if_asked(self) -> None:
        """Raise InterruptedRunError on all processes if any of them got a signal. Saves nothing.

        A process that stopped alone would leave the others waiting for it.
        """
        asked = torch.tensor(float(self.interruption.asked is not None), device=self.accelerator.device)
        if self.accelerator.reduce(asked, "sum") > 0:
            self.stop()

    def stop(self) -> NoReturn:
        """End the run on all processes together."""
        self.accelerator.wait_for_everyone()  # a launcher may kill the others when the first process ends
        self.accelerator.end_training()
        self.interruption.obey()
        raise InterruptedRunError("stopped with another process", signal.SIGTERM)

    def save(self, *also: Path) -> None:
        """Write last.pt; before it, the same checkpoint under other paths."""
        self.state.bad_images = set().union(*gather_object([self.state.bad_images]))
        self._write(self.run.new)
        if self.accelerator.is_main_process:
            self.run.keep_new(*also)
        self._saved_at, self._saved_update = time.monotonic(), self.state.update

    def _write(self, path: Path) -> None:
        """Write the current state: one file, or for a sharded model a folder with one file per process."""
        accelerator, state = self.accelerator, self.state.state_dict()
        main, sharded = accelerator.is_main_process, self.state.unsharded is not None
        if main:
            remove(path)  # left by a save that did not finish
            (path if sharded else path.parent).mkdir(parents=True, exist_ok=True)
        if not sharded:
            if main:
                save_checkpoint(state, path)
            return
        accelerator.wait_for_everyone()
        save_shard(state, path, accelerator.process_index, accelerator.num_processes)
        accelerator.wait_for_everyone()

    def save_diagnosis(self, report: dict[str, Any], batch: Any) -> Path:
        """Write a diagnosis of the last update: a report and the batch of each process, and the weights.

        Returns: the folder.
        """
        folder = self.run.path / "not_finite"
        folder.mkdir(exist_ok=True)
        process = self.accelerator.process_index
        write_json(report, folder / f"report-{process}.json")
        save_checkpoint({"batch": batch}, folder / f"batch-{process}.pt")
        self._write(folder / "state.pt")
        self.accelerator.wait_for_everyone()
        return folder
