"""Optimizer and learning rate schedule, made by timm."""

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
    """Optimizer. No weight decay for one-dimensional parameters and those in the model's no_weight_decay()."""

    name: str = "adamw"
    """Any timm optimizer: adamw, lamb, sgd ..."""
    lr: float = 1e-3
    """Peak learning rate."""
    lr_batch: int | None = None
    """Total batch size that lr is chosen for: lr is scaled by total batch / lr_batch. null: no scaling."""
    weight_decay: float = 0.05
    """Weight decay coefficient; multiplied by the learning rate at each update."""
    layer_decay: float | None = None
    """Layer-wise learning rate decay: factor from each layer to the one below, 0..1. null: one rate for all layers."""
    clip_grad: float | None = None
    """Maximum norm of the whole gradient; null: no clipping."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Other optimizer arguments: betas, eps, momentum ..."""

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
    """Learning rate schedule, by update: linear warm-up to optim.lr, then cosine decay to min_lr, or steps."""

    epochs: int = 300
    """Length of the run in epochs, warm-up included."""
    warmup_epochs: float = 5.0
    """Length of the warm-up in epochs; fractions allowed."""
    warmup_lr: float = 1e-6
    """Learning rate of the first update."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    steps: list[float] | None = None
    """Step decay: epochs at which the learning rate drops to a tenth; fractions allowed. null: cosine decay."""

    def __post_init__(self):
        if self.steps is not None and not all(self.warmup_epochs <= s < self.epochs for s in self.steps):
            raise ValueError(f"schedule.steps must lie between warmup_epochs and epochs, got {self.steps}")
        if self.epochs < 1:
            raise ValueError(f"schedule.epochs must be at least 1, got {self.epochs}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"schedule.warmup_epochs must be in 0 .. epochs {self.epochs}, got {self.warmup_epochs}")
        if self.steps is not None and self.min_lr != ScheduleConfig.min_lr:
            raise ValueError("schedule.min_lr is the end of the cosine, which schedule.steps replaces; set one of them")
        for name in ("warmup_lr", "min_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} must be 0 or more, got {getattr(self, name)}")


def create_optimizer(model: nn.Module, config: OptimConfig, total_batch: int, fused: bool = True) -> Optimizer:
    """Create the optimizer: one parameter group with weight decay and one without; with layer decay, two per layer.

    Args:
        model: its no_weight_decay() names the parameters without weight decay, besides all one-dimensional ones; its
            group_matcher() defines the layers.
        total_batch: images per update, over all processes and accumulated steps; scales the learning rate.
        fused: use torch's fused kernels if the optimizer has them and the model is on a GPU.
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
    """Linear warm-up, then a cosine or steps. `step_update(n)` sets the learning rate of update n, counted from 0.

    The cosine starts at the end of the warm-up and ends with the run. (In the authors' code it starts with the run:
    with 5 warm-up epochs of 300, the rate drops by 0.07 % at the end of the warm-up.) Do not let accelerate prepare
    the schedule: it would step it once per process.
    """
    updates = round(config.warmup_epochs * updates_per_epoch)
    warmup: dict[str, Any] = {"warmup_t": updates, "warmup_lr_init": config.warmup_lr, "t_in_epochs": False}
    schedule: Scheduler
    if config.steps is not None:
        steps = [round(step * updates_per_epoch) + 1 for step in config.steps]  # timm drops one update early
        schedule = MultiStepLRScheduler(optimizer, decay_t=steps, decay_rate=0.1, warmup_prefix=False, **warmup)
    else:
        rest = config.epochs * updates_per_epoch - updates
        schedule = CosineLRScheduler(optimizer, t_initial=rest, lr_min=config.min_lr, warmup_prefix=True, **warmup)
    schedule.step_update(0)
    return schedule
