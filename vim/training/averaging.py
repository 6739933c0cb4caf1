"""The moving average of the weights."""

from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

Tensors = list[Tensor]


@dataclass
class EmaConfig:
    """Exponential moving average of the weights, evaluated and saved beside them."""

    decay: float = 0.0
    """Part of the average that an update keeps; 0 for no average."""
    warmup: bool = False
    """Keep less at first, 1 - n ** (-2/3) at update n up to decay, so that a short run's average forgets its start."""

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay must be at least 0 and below 1, got {self.decay}")
        if self.warmup and not self.decay:
            raise ValueError("ema.warmup belongs to an average; give an ema.decay above 0 too, or leave it out")


class AveragedWeights(ModelEmaV3):
    """timm's average, to the last bit, without the state dicts of both models that it makes in every update.

    Whatever changes the model must do it in place, as optimizers, batch norm and load_state_dict do.
    """

    tensors: tuple[tuple[Tensors, Tensors], tuple[Tensors, Tensors]] | None = None

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        if self.tensors is None:  # not earlier: sharding makes other parameters
            self.tensors = self._tensors(model, floats=True), self._tensors(model, floats=False)
        (averages, weights), (counters, counts) = self.tensors
        torch._foreach_lerp_(averages, weights, weight=1.0 - decay)
        if counters:
            torch._foreach_copy_(counters, counts)

    def _tensors(self, model: nn.Module, floats: bool) -> tuple[Tensors, Tensors]:
        """Those of the average, and the model's."""
        pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        chosen = [pair for pair in pairs if pair[0].is_floating_point() == floats]
        return [own for own, _ in chosen], [other for _, other in chosen]
