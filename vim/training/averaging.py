"""Exponential moving average (EMA) of the weights."""

from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

Tensors = list[Tensor]


@dataclass
class EmaConfig:
    """Exponential moving average (EMA) of the weights, evaluated and saved in addition to them."""

    decay: float = 0.0
    """Decay: fraction of the EMA kept at each update, at least 0 and below 1. 0: no EMA."""
    warmup: bool = False
    """Start with a small decay, 1 - n ** (-2/3) at update n up to decay: in short runs the EMA forgets its start."""

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay must be at least 0 and below 1, got {self.decay}")
        if self.warmup and not self.decay:
            raise ValueError("ema.warmup needs ema.decay above 0; set both, or leave ema.warmup out")


class AveragedWeights(ModelEmaV3):
    """timm's EMA, bit for bit, without its overhead of building the state dicts of both models at every update.

    The model's tensors must be changed in place only, as optimizers, batch norm and load_state_dict do.
    """

    tensors: tuple[tuple[Tensors, Tensors], tuple[Tensors, Tensors]] | None = None

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        if self.tensors is None:  # at the first update, because sharding replaces the parameters
            self.tensors = self._pairs(model, floats=True), self._pairs(model, floats=False)
        (averages, weights), (own_counters, counters) = self.tensors
        torch._foreach_lerp_(averages, weights, weight=1.0 - decay)
        if counters:
            torch._foreach_copy_(own_counters, counters)

    def _pairs(self, model: nn.Module, floats: bool) -> tuple[Tensors, Tensors]:
        """Matching tensors of the EMA and of the model: floating point or integer."""
        pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        chosen = [pair for pair in pairs if pair[0].is_floating_point() == floats]
        return [average for average, _ in chosen], [weight for _, weight in chosen]
