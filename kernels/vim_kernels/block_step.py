"""One step of a whole Mamba block, for decoding: public function, validation and the version in torch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .checks import check, check_shape, check_tensors
from .rms_norm import rms_norm
from .state_update import selective_state_update


class MambaBlockWeights(NamedTuple):
    """The parameters of x + out_proj(ssm(in_proj(norm(x)))), one dtype but for A_log and D, which may be fp32.

    In shapes: D d_model, E d_inner, N d_state, R dt_rank, W taps.
    """

    norm: Tensor  # (D,)
    in_proj: Tensor  # (2 E, D), rows of x and then of z
    conv: Tensor  # (E, W)
    conv_bias: Tensor  # (E,)
    x_proj: Tensor  # (R + 2 N, E), rows of dt, B and C
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A_log: Tensor  # (E, N)
    D: Tensor  # (E,)
    out_proj: Tensor  # (D, E)


def mamba_block_step(
    x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MambaBlockWeights, *, eps: float = 1e-5
) -> Tensor:
    """Advance a residual stream through a Mamba block by one step: x + mixer(norm(x)). No gradients.

    On a GPU four kernels for a few sequences, which read each weight once, and seven for many; torch's operators
    elsewhere, and in fp64 or for tensors that are not contiguous. In a CUDA graph the kernels read their weights before
    the one ahead of them has ended: it must not be one that writes them.

    Args:
        x: (batch, d_model), the stream, fp32 or the weights' dtype.
        conv_state: (batch, W - 1, d_inner), the last inputs of the convolution, oldest first; changed in place.
        ssm_state: (batch, d_inner, d_state), fp32 (fp64 for weights in it); changed in place.
        weights: of the block.
        eps: of the norm.

    Returns: (batch, d_model) in x's dtype.

    Raises: ValueError, TypeError: a wrong shape, device or dtype.

    Source: Gu & Dao 2023, arXiv 2312.00752, figure 3 and algorithm 2, for one step.
    """
    check_tensors({"x": x, "conv_state": conv_state, "ssm_state": ssm_state, **weights._asdict()}, like="x")
    check(x.dim() == 2, "x", x, "be (batch, d_model)")
    batch, d_model = x.shape
    d_inner, d_state = weights.A_log.shape
    taps, rank = weights.conv.shape[1], weights.dt_proj.shape[1]
    shapes = {
        "norm": (d_model,),
        "in_proj": (2 * d_inner, d_model),
        "conv": (d_inner, taps),
        "conv_bias": (d_inner,),
        "x_proj": (rank + 2 * d_state, d_inner),
        "dt_proj": (d_inner, rank),
        "dt_bias": (d_inner,),
        "A_log": (d_inner, d_state),
        "D": (d_inner,),
        "out_proj": (d_model, d_inner),
    }
    for name, shape in shapes.items():
        check_shape(f"weights.{name}", getattr(weights, name), "of the block's sizes", shape)
    check_shape("conv_state", conv_state, "(batch, taps - 1, d_inner)", (batch, taps - 1, d_inner))
    check_shape("ssm_state", ssm_state, "(batch, d_inner, d_state)", (batch, d_inner, d_state))
    with torch.no_grad():
        if (
            batch
            and backends.takes_triton(x.device)
            and torch.float64 not in (ssm_state.dtype, weights.in_proj.dtype)
            and all(t.is_contiguous() for t in (conv_state, ssm_state, *weights))
        ):
            from . import triton_step  # imports triton, which not every platform has

            return triton_step.block_step(x, conv_state, ssm_state, weights, eps)
        return torch_step(x, conv_state, ssm_state, weights, eps)


def torch_step(x: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MambaBlockWeights, eps: float) -> Tensor:
    """See `mamba_block_step`."""
    normed = rms_norm(x, weights.norm, eps, dtype=weights.in_proj.dtype)
    new, z = F.linear(normed, weights.in_proj).chunk(2, -1)
    window = torch.cat((conv_state, new.unsqueeze(1)), 1)  # (batch, W, E)
    conv_state.copy_(window[:, 1:])
    u = F.silu((window * weights.conv.mT).sum(1) + weights.conv_bias)
    rank, d_state = weights.dt_proj.shape[1], weights.A_log.shape[1]
    dt, B, C = F.linear(u, weights.x_proj).split([rank, d_state, d_state], -1)
    A = -torch.exp(weights.A_log.to(ssm_state.dtype))
    y, state = selective_state_update(
        ssm_state, u, F.linear(dt, weights.dt_proj), A, B, C, D=weights.D, z=z, dt_bias=weights.dt_bias
    )
    ssm_state.copy_(state)
    return x + F.linear(y, weights.out_proj)
