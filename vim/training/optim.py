"""Optimizer and learning rate, by timm."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from .config import OptimConfig, ScheduleConfig
from .errors import ConfigError, did_you_mean

FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def create_optimizer(model: nn.Module, config: OptimConfig, total_batch: int, fused: bool = True) -> Optimizer:
    """Optimizer with two groups, parameters with weight decay and without; with layer decay, two for each layer.

    Args:
        model: its no_weight_decay() names what to spare, besides all one-dimensional parameters; its group_matcher()
            names its layers.
        total_batch: images in an update, over all processes and accumulated steps; scales the learning rate.
        fused: choose torch's fused kernels, where it has them, for a model on a GPU.
    """
    if config.name not in list_optimizers():
        hint = did_you_mean(config.name, map(str, list_optimizers()), "see timm.optim.list_optimizers()")
        raise ConfigError(f"no optimizer {config.name!r} in timm{hint}")
    kernels = {}
    if fused and get_optimizer_class(config.name, bind_defaults=False) in FUSED and next(model.parameters()).is_cuda:
        kernels["fused"] = True
    lr = config.lr * total_batch / config.lr_batch if config.lr_batch else config.lr
    try:
        return create_optimizer_v2(
            model,
            config.name,
            lr=lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **kernels | config.kwargs,
        )
    except TypeError as error:
        raise ConfigError(f"optim.kwargs do not fit {config.name}: {error}") from error


def create_schedule(optimizer: Optimizer, config: ScheduleConfig, updates_per_epoch: int) -> Scheduler:
    """Linear warm-up and one cosine, or steps, by updates: `step_update(n)` sets the rate of update n, counted from 0.

    The cosine starts where the warm-up ends and ends with the run. (The authors' starts with the run, so that the rate
    falls by 0.07 % as 5 of 300 warm-up epochs end.) Not to be prepared by accelerate, which would step it once for
    every process.
    """
    warmup = round(config.warmup_epochs * updates_per_epoch)
    rise: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": config.warmup_lr, "t_in_epochs": False}
    schedule: Scheduler
    if config.steps is not None:
        steps = [round(step * updates_per_epoch) + 1 for step in config.steps]  # timm's come one update early
        schedule = MultiStepLRScheduler(optimizer, decay_t=steps, decay_rate=0.1, warmup_prefix=False, **rise)
    else:
        rest = config.epochs * updates_per_epoch - warmup
        schedule = CosineLRScheduler(optimizer, t_initial=rest, lr_min=config.min_lr, warmup_prefix=True, **rise)
    schedule.step_update(0)
    return schedule
