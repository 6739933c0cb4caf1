"""The parameters of one direction of a selective state-space model, and the projections that feed its scan."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_kernels import SSMWeights

from .plain import is_plain
from .precision import at_least_fp32
from .short_conv import is_plain_conv

# FX keeps these calls as leaves; inside, they branch on shapes and dtypes.
torch.fx.wrap("negative_exp")
torch.fx.wrap("project_by")


class SelectiveSSM(nn.Module):
    """Causal convolution and input-dependent (dt, B, C) of a selective state-space model.

    The mixers run the scan, because one call may run both directions.

    Args:
        d_inner: channels E. d_state: states N per channel. d_conv: taps of the convolution.
        dt_rank: rank R of the step's projection. conv_bias: whether the convolution has a bias.
        dt_min, dt_max, dt_init_floor: initial step sizes are log-uniform in [dt_min, dt_max], and at least the floor.

    Source: Gu & Dao 2023, arXiv 2312.00752, section 3.4 and Algorithm 2.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        d_conv: int,
        dt_rank: int,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.d_state, self.d_conv, self.dt_rank = d_state, d_conv, dt_rank
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        # Conv1d and Linear modules hold the weights. Kernels read them from modules that are plain, see `is_plain`.
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, bias=conv_bias, **dd)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(dt_rank, d_inner, **dd)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(d_inner, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors do: A_log = log(1..N) (S4D-Real), D = 1, steps log-uniform."""
        self.conv1d.reset_parameters()
        self.x_proj.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        start_steps(self.dt_proj.bias, self.dt_min, self.dt_max, self.dt_init_floor)
        n = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(n.log().expand_as(self.A_log))
        self.D.fill_(1)

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Arguments of the scan for an input u (B, L, E).

        Returns: dt (B, L, E), A (E, N), B and C (B, L, N), and the bias (E,) that the scan adds to dt.
        """
        A = negative_exp(self.A_log)
        # The scan adds the bias of dt in fp32: bf16 would round away differences between small steps. A module that
        # must be called adds its own bias.
        plain = is_plain(self.dt_proj, bias=True)
        bias = self.dt_proj.bias if plain else torch.zeros_like(self.D)
        if plain and is_plain(self.x_proj, bias=False):
            dt, B, C = project_by(self.x_proj.weight, self.dt_proj.weight, u)
            return dt, A, B, C, bias
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(dt, self.dt_proj.weight) if plain else self.dt_proj(dt), A, B, C, bias

    def plain_weights(self) -> SSMWeights | None:
        """The parameters for a kernel that takes all of them; None if a module must be called."""
        conv, x_proj, dt_proj = self.conv1d, self.x_proj, self.dt_proj
        if not (is_plain_conv(conv) and is_plain(x_proj, bias=False) and is_plain(dt_proj, bias=True)):
            return None
        return SSMWeights(conv.weight, conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, self.A_log, self.D)

    def conv_state(self, batch_size: int) -> Tensor:
        """Input of the convolution before the first step: zeros (batch, d_conv - 1, E) in the dtype of its weights."""
        like = next(self.conv1d.parameters(), self.D)
        return like.new_zeros(batch_size, self.d_conv - 1, self.D.shape[0])


def project_by(x_proj: Tensor, dt_proj: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project u (B, L, E) to dt (B, L, E), B and C (B, L, N) by weights (R + 2 N, E) and (E, R)."""
    d_state = (x_proj.shape[0] - dt_proj.shape[1]) // 2
    if u.is_cuda and u.element_size() == 2 and dt_proj.shape[1] % 8:
        # Tensor cores read rows of 16 bytes. With others, as for Vim-Ti's rank of 12, a product takes twice as long.
        x_proj, dt_proj = pad_rank(x_proj, dt_proj, 8)
    dt, B, C = F.linear(u, x_proj).split([dt_proj.shape[1], d_state, d_state], dim=-1)
    return F.linear(dt, dt_proj), B, C


def pad_rank(x_proj: Tensor, dt_proj: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Pad the common rank of both weights with zeros to a multiple. Products do not change."""
    rank = dt_proj.shape[1]
    dt_rows, BC_rows = x_proj.split([rank, x_proj.shape[0] - rank])
    zeros = x_proj.new_zeros(-rank % multiple, x_proj.shape[1])
    return torch.cat((dt_rows, zeros, BC_rows)), F.pad(dt_proj, (0, -rank % multiple))


def negative_exp(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) in fp32 at least: a bf16 model must not round the decay."""
    return -torch.exp(at_least_fp32(A_log))


@torch.no_grad()
def start_steps(bias: Tensor, dt_min: float, dt_max: float, floor: float = 0.0) -> None:
    """Set biases whose softplus, the step size, is log-uniform in [dt_min, dt_max], and at least the floor."""
    dt = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(dt_min), math.log(dt_max)).exp_()
    dt.clamp_(min=floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))
