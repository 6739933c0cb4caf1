"""A few updates of a run, to check that it works and how fast. Nothing is left on disk."""

import copy
import math
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from vim.console.errors import ConfigError
from vim.console.interruption import Interruption
from vim.console.progress import Progress
from vim.data import DataError
from vim.timm_models.accelerator import create_accelerator

from .checkpointer import Checkpointer
from .classification import Classification
from .config import CheckpointConfig, RunConfig, TrainConfig
from .run_folder import RunFolder
from .summary import peak_memory_mib
from .trainer import Trainer

TRIAL_STEPS = 3


class _DoneError(Exception):
    """All updates of the dry run are done."""


class _Stopwatch(Checkpointer):
    """Saves nothing. Notes when the warm-up update ends, and ends the run `steps` updates later."""

    steps: int
    ends: list[float]

    def due_at(self, update: int) -> bool:
        return update in (1, 1 + self.steps)

    def after_failure(self) -> None:
        pass

    def after_update(self, save: bool, stop: bool) -> None:
        if stop:
            self.stop()
        if self.due_at(self.state.update):
            self.ends.append(time.perf_counter())
            self.state.so_far.waited = 0.0 if len(self.ends) == 1 else self.state.so_far.waited
        if len(self.ends) == 2:
            raise _DoneError


def dry_run(config: RunConfig, steps: int, task: type[Trainer] = Classification) -> dict[str, Any]:
    """Run one warm-up update and `steps` more, then evaluate one batch. Images have full size from the start.

    Returns: images_per_second over all processes; data_wait, the fraction of time that this process waited for its
        dataloader; loss; first_update_seconds; peak_memory_mib.
    Raises: as `train`.
    """
    if steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {steps}")
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    if isinstance(config, TrainConfig):
        config = replace(config, data=replace(config.data, progressive=[]))
    accelerator = create_accelerator(config.precision, config.accumulate)
    progress = Progress(accelerator.is_main_process)
    with tempfile.TemporaryDirectory() as folder, Interruption() as interruption:
        run = RunFolder(folder, config.TOOL)
        report = _measure(task(config, accelerator, progress), steps, run, interruption, progress)
    progress.line(
        f"{steps} updates: {report['images_per_second']:.0f} images/s, {100 * report['data_wait']:.0f} % of the time "
        f"waiting for data, peak memory {report['peak_memory_mib'] or math.nan:.0f} MiB, loss {report['loss']:.3f}; "
        f"the first update took {report['first_update_seconds']:.1f} s"
    )
    accelerator.end_training()
    return report


def find_batch_size(config: RunConfig, task: type[Trainer] = Classification) -> int:
    """Find the largest power of two for data.batch_size that fits in GPU memory, with a few updates per size.

    Raises: ConfigError without a GPU, or with several processes.
    """
    accelerator = Accelerator()
    progress = Progress()
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1:
        raise ConfigError("--find_batch_size needs one process with a GPU; choose data.batch_size by hand")
    fits, size = 0, 2  # even, because mixing needs pairs
    while True:
        trial = copy.deepcopy(config)
        trial.data.batch_size = size  # type: ignore[attr-defined]  # the configuration of every task has it
        try:
            dry_run(trial, TRIAL_STEPS, task)
        except (torch.cuda.OutOfMemoryError, DataError) as error:
            why = str(error) if isinstance(error, DataError) else "out of memory"
            progress.line(f"data.batch_size {size}: {why}")
            if not fits:
                raise ConfigError(f"not even data.batch_size {size} fits: {why}") from error
            progress.line(f"largest data.batch_size: {fits}")
            return fits
        fits, size = size, 2 * size
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _measure(
    trainer: Trainer, steps: int, run: RunFolder, interruption: Interruption, progress: Progress
) -> dict[str, Any]:
    accelerator, state = trainer.accelerator, trainer.state
    progress.line(trainer.describe())
    progress.line(trainer.initial_weights())
    stopwatch = _Stopwatch(run, CheckpointConfig(None), interruption, accelerator, state)
    stopwatch.steps, stopwatch.ends = steps, []
    waited, start = 0.0, time.perf_counter()
    try:
        while True:  # a small data set takes several epochs
            trainer.train_epoch(stopwatch)
            waited += state.so_far.waited
            state.end_epoch({})
    except _DoneError:
        waited += state.so_far.waited
    inputs, *_ = next(iter(trainer.val_batches))
    trainer.model.eval()
    with torch.no_grad(), accelerator.autocast():
        trainer.model(inputs)
    seconds = stopwatch.ends[1] - stopwatch.ends[0]
    return {
        "images_per_second": steps * state.total_batch / seconds,
        "data_wait": waited / seconds,
        "loss": state.so_far.mean_loss,
        "first_update_seconds": stopwatch.ends[0] - start,
        "peak_memory_mib": peak_memory_mib(accelerator.device),
    }
