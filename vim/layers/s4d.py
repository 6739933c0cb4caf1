"""S4D: a linear state-space layer with diagonal matrices."""

import math

import torch
from torch import Tensor

from .checks import check_choice
from .discretize import RULES, Rule, discretize_diagonal
from .hippo import Diagonal, diagonal
from .linear_system import LinearSystem, vandermonde
from .lti_mixer import SequenceLTIMixer
from .precision import at_least_fp32
from .state_kernel import StateKernel


class DiagonalKernel(StateKernel):
    """Convolution kernels of diagonal systems, each with its own step size.

    Args:
        d_model: kernels H. d_state: N; one half is kept, the other is its conjugate.
        init, rule: see S4D. directions: 1, or 2 with one C each.
        bandlimit: leave out modes that alias at the step size of training: those with
            delta |Im A| / 2 pi >= bandlimit / 2. The rate does not count: a finer step would bring in modes that were
            never trained.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        init: Diagonal = "lin",
        rule: Rule = "zoh",
        directions: int = 1,
        bandlimit: float | None = None,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device=None,
        dtype=None,
    ):
        check_choice("rule", rule, RULES)
        super().__init__(d_model, d_state, directions, dt_min, dt_max, device=device, dtype=dtype)
        self.init, self.rule, self.bandlimit = init, rule, bandlimit
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self._start(*diagonal(self.init, 2 * self.A_log.shape[1]))

    def forward(self, length: int, rate: float = 1.0) -> Tensor:
        """(directions, H, L)."""
        log_dA, dB, C = self._discrete(rate)
        return vandermonde(log_dA, C * dB, length)

    def system(self, rate: float = 1.0) -> LinearSystem:
        log_dA, dB, C = self._discrete(rate)
        return LinearSystem(log_dA.exp(), dB, C[0])

    def _discrete(self, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """log dA, dB (H, N / 2) and C (directions, H, N / 2), doubled for the conjugates."""
        log_dt, A_log, A_imag, B, C = map(at_least_fp32, (self.log_dt, self.A_log, self.A_imag, self.B, self.C))
        delta = rate * log_dt.unsqueeze(-1).exp()
        A = torch.complex(-A_log.exp(), A_imag)
        dA, dB = discretize_diagonal(A, torch.view_as_complex(B), delta, self.rule)
        log_dA = delta * A if self.rule == "zoh" else dA.log()
        C = 2 * torch.view_as_complex(C)
        if self.bandlimit is not None:
            C = C * (delta / rate * A_imag.abs() / (2 * math.pi) < self.bandlimit / 2)
        return log_dA, dB, C


class S4D(SequenceLTIMixer):
    """Mix a sequence by diagonal linear systems; see SequenceLTIMixer.

    Args:
        d_model: channels. d_state: states N per channel, even.
        init: initial A: "lin", "inv", "real", "quad" or "legs", see `hippo.diagonal`.
        rule: "zoh", "bilinear" or "euler", see `discretize`.
        bidirectional: add a kernel for the steps that follow.
        dropout: before the output projection. dt_min, dt_max: initial step sizes are log-uniform between them.

    Raises: ValueError for an odd d_state or another init or rule.
    Source: Gu et al. 2022, arXiv 2206.11893. State dicts of state-spaces/s4 load: of s4d.py, and of s4.py in mode
        "diag".
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: Diagonal = "lin",
        rule: Rule = "zoh",
        bidirectional: bool = False,
        dropout: float = 0.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        kernel = DiagonalKernel(d_model, d_state, init, rule, 1 + bidirectional, dt_min=dt_min, dt_max=dt_max, **dd)
        super().__init__(d_model, kernel, dropout, **dd)
