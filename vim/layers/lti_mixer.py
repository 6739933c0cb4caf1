"""Layers of linear time-invariant systems: everything except their kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_kernels.precision import own_precision

from . import official_s4
from .linear_system import LinearSystem, convolve
from .state_kernel import StateKernel


class LTIMixer(nn.Module):
    """Mix along axes, x (batch, *sizes, d_model) -> the same shape: GLU(W gelu(kernel * x + D x)).

    The kernel is the product of one kernel per axis.

    Args:
        d_model: channels, each with its own systems.
        kernel: a module for one axis, or a ModuleList for several. Each takes a length and a rate and returns
            (directions, d_model, length).
        dropout: applied before the output projection.
    """

    def __init__(self, d_model: int, kernel: nn.Module, dropout: float, *, device=None, dtype=None):
        super().__init__()
        self.kernel = kernel
        self.D = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, 2 * d_model, device=device, dtype=dtype)
        self.register_load_state_dict_pre_hook(official_s4.translate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.D)

    def forward(self, x: Tensor, rate: float = 1.0) -> Tensor:
        """x: (batch, *sizes, d_model). rate: length of a step relative to training, 0.5 for twice the resolution.

        Raises: ValueError for another number of axes or channels.
        """
        return self._out(self.convolve(x, rate))

    def convolve(self, x: Tensor, rate: float = 1.0) -> Tensor:
        """The linear part, kernel * x + D x."""
        kernels = list(self.kernel) if isinstance(self.kernel, nn.ModuleList) else [self.kernel]
        sizes = x.shape[1:-1]
        if len(sizes) != len(kernels) or x.shape[-1] != len(self.D):
            want = ", ".join(["batch", *["size"] * len(kernels), str(len(self.D))])
            raise ValueError(f"x must be ({want}), got {tuple(x.shape)}")
        if x.numel() == 0:
            return torch.zeros_like(x)
        with own_precision(x.device.type):  # half precision has no FFT, and kernels would lose their phase
            lags = [kernel(size, rate) for kernel, size in zip(kernels, sizes, strict=True)]
            return convolve(x, lags) + self.D * x

    def _out(self, y: Tensor) -> Tensor:
        return F.glu(self.out_proj(self.dropout(F.gelu(y))), dim=-1)


class LTICache:
    """The state of a layer after the steps so far, and its system at the time the cache was created.

    `step` replaces the state. Gradients pass through both, as through the whole sequence.
    """

    def __init__(self, system: LinearSystem, batch_size: int):
        self.system, self.state = system, system.initial_state(batch_size)


class SequenceLTIMixer(LTIMixer):
    """An LTIMixer over sequences (batch, length, d_model) that can also run step by step:

        cache = mixer.default_state(batch_size)
        y = mixer.step(x, cache)  # (batch, d_model), one step of mixer(sequence)

    The kernel can also run as a recurrence, see `StateKernel.system`.
    """

    kernel: StateKernel

    def default_state(self, batch_size: int, rate: float = 1.0) -> LTICache:
        """A cache for the start of a sequence.

        Raises: ValueError for a bidirectional layer.
        """
        if self.kernel.C.shape[0] > 1:
            raise ValueError(
                "a bidirectional layer has no step, because it sees the future; create it with bidirectional=False"
            )
        return LTICache(self.kernel.system(rate), batch_size)

    def step(self, x: Tensor, cache: LTICache) -> Tensor:
        """One step, x: (batch, d_model) -> (batch, d_model). The cache is updated in place."""
        y, cache.state = cache.system.step(x, cache.state)
        return self._out(y + self.D * x)
