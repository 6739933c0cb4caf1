"""Backend `torch` of the causal convolution: ATen operators only, one tap after another, channel-last."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .reference import state_dtype


def forward(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    initial_state: Tensor | None,
    *,
    silu: bool,
    reverse: Sequence[bool],
) -> list[Tensor]:
    """y (B, L, E) of each direction in x's dtype; shapes as in `causal_conv1d`."""
    biases = [None] * len(weight) if bias is None else bias
    return [
        reference.causal_conv1d(x, w, b, initial_state, silu=silu, reverse=r).to(x.dtype)
        for w, b, r in zip(weight, biases, reverse, strict=True)
    ]


def backward(
    dy: Sequence[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    initial_state: Tensor | None,
    *,
    silu: bool,
    reverse: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor] | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state, each in its tensor's dtype."""
    biases = [None] * len(weight) if bias is None else bias
    found = [
        _backward(d, x, w, b, initial_state, silu, r) for d, w, b, r in zip(dy, weight, biases, reverse, strict=True)
    ]
    return gathered(found, x, weight, bias, initial_state)


def gathered(
    found: Sequence[Sequence[Tensor | None]],
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor] | None, Tensor | None]:
    """What `backward` returns, from the gradients (x, weight, bias, initial_state) of each direction."""
    dxs, d_weights, d_biases, d_initials = zip(*found, strict=True)
    return (
        sum(dxs[1:], dxs[0]).to(x.dtype),
        [d.to(w.dtype) for d, w in zip(d_weights, weight, strict=True)],
        None if bias is None else [d.to(b.dtype) for d, b in zip(d_biases, bias, strict=True)],
        # Two directions have no initial state.
        None if initial_state is None else d_initials[0].to(initial_state.dtype),
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients in the precision of the computation."""
    dtype, past = state_dtype(x, weight), weight.shape[1] - 1
    dy, w = dy.to(dtype), weight.to(dtype)
    if silu:
        pre = reference.causal_conv1d(x, weight, bias, initial_state, silu=False, reverse=reverse)
        sigmoid = torch.sigmoid(pre)
        dy = dy * sigmoid * (1 + pre * (1 - sigmoid))
    if reverse:
        x, dy = x.flip(1), dy.flip(1)
    older = x.new_zeros(x.shape[0], past, x.shape[2]) if initial_state is None else initial_state
    padded = torch.cat([older.to(dtype), x.to(dtype)], 1)  # in processing order
    d_padded, d_weight = torch.zeros_like(padded), torch.empty_like(w)
    for tap in range(past + 1):
        steps = slice(tap, tap + x.shape[1])
        d_padded[:, steps] += dy * w[:, tap]
        d_weight[:, tap] = (dy * padded[:, steps]).sum((0, 1))
    dx = d_padded[:, past:]
    return (
        dx.flip(1) if reverse else dx.contiguous(),
        d_weight,
        None if bias is None else dy.sum((0, 1)),
        None if initial_state is None else d_padded[:, :past].clone(),
    )
