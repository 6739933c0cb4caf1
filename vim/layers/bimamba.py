"""BiMamba: Vision Mamba's mixer, two selective scans over one sequence in opposite directions."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vim_kernels import (
    BiMambaBlockWeights,
    bidirectional_selective_scan,
    bimamba_block,
    bimamba_block_serves,
)

from .norm import RMSNorm
from .plain import is_plain, runs_its_class
from .selective_ssm import SelectiveSSM
from .short_conv import convolve_both

torch.fx.wrap("bidirectional_selective_scan")


class BiMamba(nn.Module):
    """Mix a sequence along its length, (batch, length, d_model) -> the same shape.

    Each direction has its own convolution, projections, A and D. The input projection, the output projection and the
    gate are shared. The gate multiplies the sum of both directions times `scale`.

    Args:
        d_model: channels of the sequence. d_state: states N per inner channel. d_conv: taps of the convolution.
        expand: d_inner = expand * d_model. dt_rank: rank of the step's projection, ceil(d_model / 16) if None.
        scale: factor on the sum of both directions: 0.5 for Vim's mean, 1 for VideoMamba's sum.

    Source: Zhu et al. 2024, arXiv 2401.09417, Algorithm 1. The mean and Euler's rule for B are as in the released code.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        *,
        scale: float = 0.5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d_inner = expand * d_model
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.scale = scale
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False, **dd)
        # Both directions start alike. In the authors' code a later initialiser sets the backward direction's dt bias to
        # 0: a step of softplus(0) = 0.69, which remembers one or two tokens.
        self.forward_ssm = SelectiveSSM(d_inner, d_state, d_conv, dt_rank, **dd)
        self.backward_ssm = SelectiveSSM(d_inner, d_state, d_conv, dt_rank, **dd)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False, **dd)

    def forward(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Args:
        x: (batch, length, d_model).
        seq_idx: (batch, length), int32 or int64, for several sequences packed into a row: the sequence of each step.
            Each is mixed as if it were alone. A new sequence begins wherever the value changes.
        """
        return self.out_proj(bidirectional_selective_scan(**self.scan_inputs(x, seq_idx)))

    def add_in_one_call(self, x: Tensor, norm: nn.Module) -> Tensor | None:
        """x + self(norm(x)) by the kernel of a whole block; None if it does not serve: see `bimamba_block_serves`.

        A hook on a module, or another module in its place, needs the separate calls.
        """
        if torch.is_grad_enabled() or type(norm) is not RMSNorm:
            return None
        plain = runs_its_class(self) and all(is_plain(m, bias=False) for m in (norm, self.in_proj, self.out_proj))
        forward, reverse = self.forward_ssm.plain_weights(), self.backward_ssm.plain_weights()
        if not plain or forward is None or reverse is None:
            return None
        weights = BiMambaBlockWeights(norm.weight, self.in_proj.weight, self.out_proj.weight, forward, reverse)
        if not bimamba_block_serves(x, weights):
            return None
        assert norm.eps is not None
        return bimamba_block(x, weights, scale=self.scale, eps=norm.eps)

    def scan_inputs(self, x: Tensor, seq_idx: Tensor | None = None) -> dict[str, Any]:
        """Arguments of `bidirectional_selective_scan` for a sequence (B, L, d_model); seq_idx: see `forward`."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return scans_of(self.forward_ssm, self.backward_ssm, x, z, scale=self.scale, seq_idx=seq_idx)


def scans_of(
    forward: SelectiveSSM, backward: SelectiveSSM, x: Tensor, z: Tensor, *, scale: float, seq_idx: Tensor | None = None
) -> dict[str, Any]:
    """Arguments of `bidirectional_selective_scan` for an input x and a gate z, (B, L, E)."""
    u_f, u_b = convolve_both((forward.conv1d, backward.conv1d), forward.d_conv, x, seq_idx=seq_idx)
    dt_f, A_f, B_f, C_f, bias_f = forward.project(u_f)
    dt_b, A_b, B_b, C_b, bias_b = backward.project(u_b)
    return {
        "u": (u_f, u_b),
        "dt": (dt_f, dt_b),
        "A": (A_f, A_b),
        "B": (B_f, B_b),
        "C": (C_f, C_b),
        "D": (forward.D, backward.D),
        "z": z,
        "dt_bias": (bias_f, bias_b),
        "scale": scale,
        "seq_idx": seq_idx,
    }
