"""Optimizer and learning rate, by timm."""

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from vim.console.errors import ConfigError, did_you_mean

FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


@dataclass
class OptimConfig:
    """Optimizer. Weight decay spares one-dimensional parameters and those of the model's no_weight_decay()."""

    name: str = "adamw"
    """Any timm optimizer."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_batch: int | None = None
    """Total batch size that lr is meant for; lr is scaled by total batch / lr_batch. null: lr is taken as it is."""
    weight_decay: float = 0.05
    """Decay for each update, in units of the learning rate."""
    layer_decay: float | None = None
    """Factor of the learning rate from each layer to the one below, 0..1; null: the same rate for all layers."""
    clip_grad: float | None = None
    """Largest norm of the whole gradient; null for no clipping."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the optimizer: betas, eps, momentum ..."""

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")
        if self.lr_batch is not None and self.lr_batch < 1:
            raise ValueError(f"optim.lr_batch must be at least 1 image, got {self.lr_batch}")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay must be 0 or more, got {self.weight_decay}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay must be above 0 and at most 1, or null, got {self.layer_decay}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"optim.clip_grad must be positive, or null for no clipping, got {self.clip_grad}")


@dataclass
class ScheduleConfig:
    """Learning rate for each update: a linear rise to optim.lr, then a cosine down to min_lr, or steps."""

    epochs: int = 300
    """Length of the run."""
    warmup_epochs: float = 5.0
    """Length of the rise; part of epochs, fractions allowed."""
    warmup_lr: float = 1e-6
    """Learning rate of the first update."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    steps: list[float] | None = None
    """Instead of the cosine: a tenth of the rate from each of these epochs on, fractions allowed; null: the cosine."""

    def __post_init__(self):
        if self.steps is not None and not all(self.warmup_epochs <= s < self.epochs for s in self.steps):
            raise ValueError(f"schedule.steps must lie between warmup_epochs and epochs, got {self.steps}")
        if self.epochs < 1:
            raise ValueError(f"schedule.epochs must be at least 1, got {self.epochs}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"schedule.warmup_epochs must be in 0 .. epochs {self.epochs}, got {self.warmup_epochs}")
        if self.steps is not None and self.min_lr != ScheduleConfig.min_lr:
            raise ValueError("schedule.min_lr ends the cosine, which schedule.steps replace; give one of them")
        for name in ("warmup_lr", "min_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} must be 0 or more, got {getattr(self, name)}")


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
