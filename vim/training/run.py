"""A training run: from a configuration to a folder with the trained model."""

import time
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from vim.console.interruption import Interruption, interruptible
from vim.console.progress import Progress
from vim.timm_models.accelerator import create_accelerator
from vim.timm_models.config import ModelConfig

from .checkpointer import Checkpointer
from .classification import Classification
from .config import RunConfig
from .launcher import end_with_the_launcher
from .run_folder import RunFolder, flat, plain
from .summary import epoch_line
from .trainer import Trainer


def train(config: RunConfig, resume: bool = False, task: type[Trainer] = Classification) -> dict[str, Any]:
    """Train, evaluate after every epoch, and write the run folder.

    A run that is stopped at any point and resumed gives the same result as an uninterrupted one.

    Args:
        config: the task's configuration.
        resume: continue the run in config.run_dir from its last checkpoint.
        task: what to train.

    Returns: the content of summary.json.
    Raises: DataError, ConfigError or RunError, with a message for the user; InterruptedRunError after a signal, once
        the state is saved.
    """
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    accelerator = create_accelerator(config.precision, config.accumulate, config.trackers, config.run_dir)
    run = RunFolder(config.run_dir, config.TOOL)
    run.check(config, resume)
    end_with_the_launcher()

    def how_to_resume() -> str:
        return f"resume with: {run.resume_command}" if run.config.is_file() else "the run had not begun"

    try:
        with interruptible(how_to_resume) as interruption:
            summary = _train(config, resume, task, accelerator, run, interruption)
    finally:
        run.lock.release()
    accelerator.end_training()
    return summary


def _train(
    config: RunConfig,
    resume: bool,
    task: type[Trainer],
    accelerator: Accelerator,
    run: RunFolder,
    interruption: Interruption,
) -> dict[str, Any]:
    main, epochs = accelerator.is_main_process, config.schedule.epochs
    progress = Progress(main)
    continues = resume and bool(run.saved)
    trainer = task(_without_weights(config) if continues else config, accelerator, progress)
    state = trainer.state
    accelerator.wait_for_everyone()  # all processes must check the folder before one writes to it
    if main:
        if (warning := run.begin(config, resume)) is not None:
            progress.line(warning)
        run.note_start(accelerator.num_processes, accelerator.device)
    if config.trackers:
        accelerator.init_trackers(run.path.name, {key: _loggable(v) for key, v in flat(plain(config)).items()})
    saved = run.load(progress.line) if resume else None
    if saved is not None:
        for warning in state.load_state_dict(saved):
            progress.line(warning)
    elif resume and main:
        run.write_config(config)  # no checkpoint yet; the fields that may change on a resume may have changed
    progress.line(trainer.describe())
    progress.line(trainer.initial_weights() if saved is None else "weights: from the run's checkpoint")

    checkpointer = Checkpointer(run, config.checkpoint, interruption, accelerator, state)
    complete = state.epoch == epochs
    with interruption.postponed():
        for _ in range(state.epoch, epochs):
            record = {"epoch": state.epoch + 1, **trainer.train_epoch(checkpointer)}
            checkpointer.save()  # so that a stopped evaluation can be repeated
            start = time.perf_counter()
            record |= trainer.evaluate(checkpointer.stop_if_asked)
            state.end_epoch(record | {"seconds": state.so_far.seconds + time.perf_counter() - start})
            kept = [record["epoch"] for record in state.ranking()[: config.checkpoint.keep]]
            also = [run.best] if state.best() is state.history[-1] else []
            checkpointer.save(*also, *[run.epoch(state.epoch)] * (state.epoch in kept))
            if main:
                run.keep_epochs(kept)
                run.write_log(state.history)
                run.write_bad_images(state.bad_images)
            accelerator.log(record, step=state.epoch)
            progress.line(epoch_line(state, epochs, trainer.headline(state.history[-1]), accelerator.device))
            checkpointer.stop_if_asked()
        if complete:
            trainer.evaluate(checkpointer.stop_if_asked)
    summary, models = trainer.summary(), state.models()
    if main:
        run.write_log(state.history)  # an earlier start may have been stopped right before writing them
        run.write_bad_images(state.bad_images)
        results = trainer.write_results(run, models)
        run.write_summary(summary)
        if state.bad_images:
            results += f"\nskipped {len(state.bad_images)} unreadable images: see {run.bad_images}"
        progress.line(f"{epochs} epochs in {summary['train_seconds']:.0f} s\n{results}\nsummary: {run.summary}")
    return summary


def _without_weights(config: RunConfig) -> RunConfig:
    """Leave out initial weights: a checkpoint will replace them, so they need not be read or downloaded."""
    model: ModelConfig = config.model  # type: ignore[attr-defined]  # the configuration of every task has it
    return replace(config, model=replace(model, pretrained=False, checkpoint=None))  # type: ignore[call-arg]


def _loggable(value: Any) -> Any:
    """A configuration value in a type that trackers accept."""
    return value if isinstance(value, int | float | str | bool) else str(value)
