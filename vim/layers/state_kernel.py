"""The parameters shared by the kernels of S4 and S4D."""

import math

import torch
from torch import Tensor, nn

from .checks import check_even
from .linear_system import LinearSystem


class StateKernel(nn.Module):
    """Step sizes, poles, inputs B and outputs C of systems with N states each.

    One half of the states is kept; the other half is its conjugate. A subclass sets the initial values and computes the
    convolution kernel.

    Args:
        d_model: systems H. d_state: N, even. directions: 1, or 2 with one C each.
        dt_min, dt_max: initial step sizes are log-uniform between them.

    Raises: ValueError for an odd d_state.
    """

    def __init__(
        self, d_model: int, d_state: int, directions: int, dt_min: float, dt_max: float, *, device=None, dtype=None
    ):
        super().__init__()
        check_even(d_state)
        dd = {"device": device, "dtype": dtype}
        self.dt_min, self.dt_max = dt_min, dt_max
        half = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(d_model, **dd))
        self.A_log = nn.Parameter(torch.empty(d_model, half, **dd))
        self.A_imag = nn.Parameter(torch.empty(d_model, half, **dd))
        # Complex numbers as pairs of reals: not every optimizer, EMA and all-reduce takes complex tensors.
        self.B = nn.Parameter(torch.empty(d_model, half, 2, **dd))
        self.C = nn.Parameter(torch.empty(directions, d_model, half, 2, **dd))

    def system(self, rate: float = 1.0) -> LinearSystem:
        """The systems as recurrences, with steps `rate` times as long as in training."""
        raise NotImplementedError

    def _start(self, A: Tensor, B: Tensor) -> None:
        """Set poles and inputs (N / 2,), equal for all systems, and random outputs (mean square 1) and step sizes."""
        # Modes of LegT and FouT do not decay, which a logarithm cannot represent. The authors clamp to 1e-4, too.
        self.A_log.copy_((-A.real).clamp(min=1e-4).log().expand_as(self.A_log))
        self.A_imag.copy_(A.imag.expand_as(self.A_imag))
        self.B.copy_(torch.view_as_real(B).expand_as(self.B))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        nn.init.uniform_(self.log_dt, math.log(self.dt_min), math.log(self.dt_max))
