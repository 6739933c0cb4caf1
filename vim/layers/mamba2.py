"""Mamba-2: a mixer with one decay per head, in one direction or in two."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_kernels import selective_state_update, ssd

from .cache import before_update
from .norm import GatedRMSNorm
from .plain import is_plain
from .rename import rename_keys
from .selective_ssm import negative_exp, start_steps
from .short_conv import convolve, convolve_both

# FX keeps these calls as leaves; inside, they branch on shapes, devices and dtypes.
torch.fx.wrap("_project")
torch.fx.wrap("negative_exp")
torch.fx.wrap("ssd")

OFFICIAL_NAMES = {r"(conv1d\.weight|conv1d\.bias|A_log|D|dt_bias)": r"ssm.\1"}  # the authors' Mamba2 -> ours


class HeadSSM(nn.Module):
    """The parameters of one direction: the convolution of x, B and C, and per head a decay, a skip and a step size.

    Args:
        d_conv_channels: channels of x, B and C together. heads: H. d_conv, conv_bias: taps of the convolution, and
            whether it has a bias.

    Source: Dao & Gu 2024, arXiv 2405.21060, section 7. Initial values are as in the authors' code.
    """

    def __init__(
        self, d_conv_channels: int, heads: int, d_conv: int, *, conv_bias: bool = True, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.d_conv = d_conv
        self.conv1d = nn.Conv1d(d_conv_channels, d_conv_channels, d_conv, groups=d_conv_channels, bias=conv_bias, **dd)
        self.A_log = nn.Parameter(torch.empty(heads, **dd))
        self.D = nn.Parameter(torch.empty(heads, **dd))
        self.dt_bias = nn.Parameter(torch.empty(heads, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """-A uniform in 1 .. 16, D = 1, step sizes log-uniform in 0.001 .. 0.1."""
        self.conv1d.reset_parameters()
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).log())
        self.D.fill_(1)
        start_steps(self.dt_bias, 0.001, 0.1)

    def arguments(self) -> dict[str, Any]:
        """The parameters as arguments of `ssd`."""
        return {"A": negative_exp(self.A_log), "D": self.D, "dt_bias": self.dt_bias}


class Projections(nn.Module):
    """Shared by Mamba2 and BiMamba2: input and output projection, gate and norm, and the sizes of the heads.

    Args: see Mamba2.

    Raises: ValueError if head_dim does not divide d_inner, or groups does not divide the number of heads.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        expand: int,
        head_dim: int,
        groups: int,
        *,
        bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.d_inner = d_inner = expand * d_model
        if d_inner % head_dim:
            raise ValueError(f"head_dim must divide d_inner = expand * d_model = {d_inner}, got {head_dim}")
        self.d_state, self.head_dim, self.groups, self.heads = d_state, head_dim, groups, d_inner // head_dim
        if self.heads % groups:
            raise ValueError(f"groups must divide the d_inner / head_dim = {self.heads} heads, got {groups}")
        self.d_conv_channels = d_inner + 2 * groups * d_state
        self.in_proj = nn.Linear(d_model, d_inner + self.d_conv_channels + self.heads, bias=bias, **dd)
        self.norm = GatedRMSNorm(d_inner, groups, **dd)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **dd)

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (..., d_inner), the convolution's input [x, B, C] (..., d_conv_channels) and dt (..., heads)."""
        sizes = [self.d_inner, self.d_conv_channels, self.heads]
        if is_plain(self.in_proj):
            z, xBC, dt = _project(x, self.in_proj.weight, self.in_proj.bias, sizes)
        else:
            z, xBC, dt = self.in_proj(x).split(sizes, dim=-1)
        return z, xBC, dt

    def by_head(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the output of the convolution: x (..., heads, head_dim), B and C (..., groups, d_state)."""
        width = self.groups * self.d_state
        x, B, C = xBC.split([self.d_inner, width, width], dim=-1)
        per_group = self.groups, self.d_state
        return x.unflatten(-1, (self.heads, self.head_dim)), B.unflatten(-1, per_group), C.unflatten(-1, per_group)

    def project_out(self, y: Tensor, z: Tensor) -> Tensor:
        """y: (..., heads, head_dim)."""
        return self.out_proj(self.norm(y.flatten(-2), z))


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> tuple[Tensor, ...]:
    """x (..., d_model) by a weight (sum of sizes, d_model), plus a bias, split into the sizes."""
    padding = -len(weight) % 8
    if x.is_cuda and x.element_size() == 2 and x.dim() > 2 and padding:
        # Tensor cores need rows of 16 bytes, see `project_by`; at Vim-Ti's size a row has 902 columns.
        weight, bias = F.pad(weight, (0, 0, 0, padding)), None if bias is None else F.pad(bias, (0, padding))
        return F.linear(x, weight, bias).split([*sizes, padding], dim=-1)[:-1]
    return F.linear(x, weight, bias).split(sizes, dim=-1)


class Mamba2Cache(NamedTuple):
    """The state of a Mamba2 layer after the steps so far, without gradients; see MambaCache."""

    conv_state: Tensor  # (batch, d_conv - 1, d_conv_channels), the last inputs of the convolution, oldest first
    ssm_state: Tensor  # (batch, heads, head_dim, d_state), fp32


class Mamba2(Projections):
    """Mix a sequence causally, (batch, length, d_model) -> the same shape.

    With a cache, a call continues the sequence; see Mamba.

    Args:
        d_model: channels of the sequence. d_state: states N per inner channel. d_conv: taps of the convolution.
        expand: d_inner = expand * d_model. head_dim: inner channels that share a decay and a step size.
        groups: groups of heads; each group has its own B, C and norm.
        bias: whether input and output projection have biases. conv_bias: whether the convolution has one.

    Source: Dao & Gu 2024, arXiv 2405.21060, figure 6 (right). State dicts of the authors' Mamba2 load: in_proj
    (z, x, B, C, dt), norm and out_proj keep their names; conv1d, A_log, D and dt_bias are in `ssm` here.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        groups: int = 1,
        *,
        bias: bool = False,
        conv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(d_model, d_state, expand, head_dim, groups, bias=bias, **dd)
        self.ssm = HeadSSM(self.d_conv_channels, self.heads, d_conv, conv_bias=conv_bias, **dd)
        self.register_load_state_dict_pre_hook(_translate_official)

    def allocate_cache(self, batch_size: int) -> Mamba2Cache:
        """A cache for the start of a sequence, on the layer's device. conv_state has the dtype of the weights."""
        A_log, weight = self.ssm.A_log, next(self.ssm.conv1d.parameters(), self.ssm.D)
        return Mamba2Cache(
            weight.new_zeros(batch_size, self.ssm.d_conv - 1, self.d_conv_channels),
            A_log.new_zeros(batch_size, self.heads, self.head_dim, self.d_state, dtype=torch.float32),
        )

    def forward(self, x: Tensor, cache: Mamba2Cache | None = None) -> Tensor:
        """x: (batch, length, d_model). cache: continues the sequence; updated in place."""
        z, xBC, dt = self.project_in(x)
        conv_state = None if cache is None else cache.conv_state
        u, B, C = self.by_head(convolve(self.ssm.conv1d, self.ssm.d_conv, xBC, conv_state=conv_state))
        y = ssd(
            u,
            dt,
            B=B,
            C=C,
            **self.ssm.arguments(),
            initial_state=None if cache is None else before_update(cache.ssm_state),
            return_last_state=cache is not None,
        )
        if cache is not None:
            y, last_state = y
            cache.ssm_state.copy_(last_state.detach())
        return self.project_out(y, z)

    def scan_inputs(self, x: Tensor) -> dict[str, Any]:
        """Arguments of `ssd` for a sequence (batch, length, d_model)."""
        _, xBC, dt = self.project_in(x)
        u, B, C = self.by_head(convolve(self.ssm.conv1d, self.ssm.d_conv, xBC))
        return {"x": u, "dt": dt, "B": B, "C": C, **self.ssm.arguments()}

    def step(self, x: Tensor, cache: Mamba2Cache) -> Tensor:
        """One step, x: (batch, d_model) -> (batch, d_model). The cache is updated in place."""
        z, xBC, dt = self.project_in(x)
        xBC = convolve(self.ssm.conv1d, self.ssm.d_conv, xBC.unsqueeze(1), conv_state=cache.conv_state).squeeze(1)
        u, B, C = self.by_head(xBC)
        # One step of the selective recurrence, with the parameters of a head repeated for its channels.
        per_channel: dict[str, Any] = {name: self._repeat(t) for name, t in self.ssm.arguments().items()}
        per_channel["A"] = per_channel["A"].unsqueeze(1).expand(-1, self.d_state)
        y, state = selective_state_update(
            before_update(cache.ssm_state).flatten(1, 2), u.flatten(1), self._repeat(dt), B=B, C=C, **per_channel
        )
        cache.ssm_state.copy_(state.detach().view_as(cache.ssm_state))
        return self.project_out(y.view_as(u), z)

    def _repeat(self, t: Tensor) -> Tensor:
        """(..., heads) -> (..., d_inner)"""
        return t.repeat_interleave(self.head_dim, -1)


class BiMamba2(Projections):
    """Mix a sequence along its length in both directions, (batch, length, d_model) -> the same shape.

    As in BiMamba, each direction has its own convolution, decays, D and dt bias. The projections are shared. Gate and
    norm apply to the mean of both directions.

    Args: see Mamba2.

    Source: Mamba2 with two directions as in Zhu et al. 2024, arXiv 2401.09417, Algorithm 1.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        groups: int = 1,
        *,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(d_model, d_state, expand, head_dim, groups, **dd)
        self.forward_ssm = HeadSSM(self.d_conv_channels, self.heads, d_conv, **dd)
        self.backward_ssm = HeadSSM(self.d_conv_channels, self.heads, d_conv, **dd)

    def forward(self, x: Tensor) -> Tensor:
        z, xBC, dt = self.project_in(x)
        xBC_f, xBC_b = convolve_both((self.forward_ssm.conv1d, self.backward_ssm.conv1d), self.forward_ssm.d_conv, xBC)
        u_f, B_f, C_f = self.by_head(xBC_f)
        u_b, B_b, C_b = self.by_head(xBC_b)
        y_f = ssd(u_f, dt, B=B_f, C=C_f, **self.forward_ssm.arguments())
        y_b = ssd(u_b, dt, B=B_b, C=C_b, **self.backward_ssm.arguments(), reverse=True)
        return self.project_out(0.5 * (y_f + y_b), z)


def _translate_official(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Load-state-dict pre-hook: rename official keys in place."""
    rename_keys(OFFICIAL_NAMES, state_dict, prefix)
