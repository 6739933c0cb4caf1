"""A training run, from a configuration to a folder with the trained model."""

import time
from typing import Any

import torch

from .checkpoint import load_checkpoint, save_checkpoint
from .classification import Classification
from .config import RunConfig
from .errors import InterruptedRunError
from .progress import Progress
from .run_folder import RunFolder
from .summary import epoch_line
from .trainer import Trainer, create_accelerator


def train(config: RunConfig, resume: bool = False, task: type[Trainer] = Classification) -> dict[str, Any]:
    """Train, evaluate after every epoch, and write the run folder.

    Args:
        config: everything about the run, of the task's kind.
        resume: go on with the run in config.run_dir, from its last checkpoint.
        task: what is trained.

    Returns: the content of summary.json.
    Raises: DataError, ConfigError or RunError, with a message for the user.
    """
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    accelerator = create_accelerator(config.precision, config.accumulate)
    progress = Progress(accelerator.is_main_process)
    run = RunFolder(config.run_dir, config.TOOL)
    run.check(config, resume)
    trainer = task(config, accelerator, progress)
    state, epochs = trainer.state, config.schedule.epochs
    accelerator.wait_for_everyone()  # every process has looked at the folder before one writes to it
    if accelerator.is_main_process and not resume:
        run.create(config)
    if resume and run.last.exists():
        state.load_state_dict(load_checkpoint(run.last))
    progress.line(trainer.describe())

    if state.epoch == epochs:  # the run was complete already
        trainer.evaluate()
    try:
        for epoch in range(state.epoch, epochs):
            start = time.perf_counter()
            record = {"epoch": epoch + 1, **trainer.train_epoch()}
            record |= trainer.evaluate()
            state.history.append(record | {"seconds": time.perf_counter() - start})
            if accelerator.is_main_process:
                if state.best() is state.history[-1]:
                    save_checkpoint(state.state_dict(), run.best)
                save_checkpoint(state.state_dict(), run.last)
                run.write_log(state.history)
            progress.line(epoch_line(state, epochs, trainer.headline(state.history[-1])))
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted in epoch {epoch + 1}; go on with: {run.resume_command}") from None

    summary = trainer.summary()
    if accelerator.is_main_process:
        results = trainer.write_results(run)
        run.write_summary(summary)
        progress.line(f"{epochs} epochs in {summary['train_seconds']:.0f} s\n{results}\nsummary: {run.summary}")
    accelerator.end_training()
    return summary
