"""Backend `torch` of the causal convolution: ATen operators only, tap by tap, channel-last."""

import torch
from torch import Tensor

from . import reference
from .packing import reached
from .precision import state_dtype


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    *,
    silu: bool,
    reverse: bool,
) -> Tensor:
    """y (B, L, E) in x's dtype; shapes as in `causal_conv1d` and `packing`."""
    return reference.causal_conv1d(x, weight, bias, initial_state, segments, silu=silu, reverse=reverse).to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    *,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state, in the precision of the computation."""
    dtype, past = state_dtype(x, weight), weight.shape[1] - 1
    dy, w = dy.to(dtype), weight.to(dtype)
    if silu:
        pre = reference.causal_conv1d(x, weight, bias, initial_state, segments, silu=False, reverse=reverse)
        sigmoid = torch.sigmoid(pre)
        dy = dy * sigmoid * (1 + pre * (1 - sigmoid))
    if reverse:
        x, dy = x.flip(1), dy.flip(1)
        segments = None if segments is None else segments.flip(1)
    older = x.new_zeros(x.shape[0], past, x.shape[2]) if initial_state is None else initial_state
    padded = torch.cat([older.to(dtype), x.to(dtype)], 1)  # in processing order
    d_padded, d_weight = torch.zeros_like(padded), torch.empty_like(w)
    for tap in range(past + 1):
        steps = slice(tap, tap + x.shape[1])
        d = dy if segments is None else dy.masked_fill(~reached(segments, past - tap, reverse=False), 0)
        d_padded[:, steps] += d * w[:, tap]
        d_weight[:, tap] = (d * padded[:, steps]).sum((0, 1))
    dx = d_padded[:, past:]
    return (
        dx.flip(1) if reverse else dx,
        d_weight,
        None if bias is None else dy.sum((0, 1)),
        None if initial_state is None else d_padded[:, :past].clone(),
    )
