"""A training run, from a configuration to a folder with the trained model."""

import time
from typing import Any

import torch

from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .errors import InterruptedRunError
from .progress import Progress
from .run_folder import RunFolder
from .summary import epoch_line, summarise, write_plots
from .trainer import Trainer, create_accelerator


def train(config: TrainConfig, resume: bool = False) -> dict[str, Any]:
    """Train, evaluate after every epoch, and write the run folder.

    Args:
        config: everything about the run.
        resume: go on with the run in config.run_dir, from its last checkpoint.

    Returns: the content of summary.json.
    Raises: DataError, ConfigError or RunError, with a message for the user.
    """
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    accelerator = create_accelerator(config.precision, config.accumulate)
    progress = Progress(accelerator.is_main_process)
    run = RunFolder(config.run_dir)
    run.check(config, resume)
    trainer = Trainer(config, accelerator, progress)
    state, epochs = trainer.state, config.schedule.epochs
    accelerator.wait_for_everyone()  # every process has looked at the folder before one writes to it
    if accelerator.is_main_process and not resume:
        run.create(config)
    if resume and run.last.exists():
        state.load_state_dict(load_checkpoint(run.last))
    progress.line(trainer.describe())

    evaluation = None
    try:
        for epoch in range(state.epoch, epochs):
            start = time.perf_counter()
            record = {"epoch": epoch + 1, **trainer.train_epoch()}
            evaluation, metrics = trainer.evaluate()
            state.history.append(record | metrics | {"seconds": time.perf_counter() - start})
            if accelerator.is_main_process:
                if state.best() is state.history[-1]:
                    save_checkpoint(state.state_dict(), run.best)
                save_checkpoint(state.state_dict(), run.last)
                run.write_log(state.history)
            progress.line(epoch_line(state.history, epochs))
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted in epoch {epoch + 1}; go on with: {run.resume_command}") from None

    if evaluation is None:  # the run was complete already
        evaluation, _ = trainer.evaluate()
    summary = summarise(config, state, evaluation, accelerator.device)
    if accelerator.is_main_process:
        run.export(state.model, config.model.kwargs, trainer.data_config, trainer.classes)
        if state.ema is not None:
            run.export(state.ema.module, config.model.kwargs, trainer.data_config, trainer.classes, "ema")
        run.write_summary(summary)
        plots = write_plots(state.history, evaluation.confusion, trainer.classes, run.path)
        progress.line(
            f"top-1 {summary['top1']:.2f} %, top-5 {summary['top5']:.2f} % on {summary['val_images']} images after "
            f"{epochs} epochs in {summary['train_seconds']:.0f} s\nresults: {run.summary}\n{plots}"
        )
    accelerator.end_training()
    return summary
