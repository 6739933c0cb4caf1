"""Backend `reference`, the specification: plain loops under autograd, for any device and dtype.

All other backends are tested against these functions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .directions import Direction
from .packing import reached
from .precision import state_dtype


def scan(d: Direction, *, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """One direction without the gate.

    Returns: y (B, L, E) and the last state (B, E, N), both in the state's precision.
    Besides the shapes in `Direction`, B and C may be constant in time, (E, N), and A, B, C may be complex.
    """
    real = state_dtype(*d.tensors())
    state = torch.complex128 if real == torch.float64 else torch.complex64
    state = state if d.A.is_complex() else real
    batch, _, d_inner = d.u.shape

    u = d.u.to(real)
    delta = d.dt.to(real)
    if d.dt_bias is not None:
        delta = delta + d.dt_bias.to(real)
    if dt_softplus:
        delta = F.softplus(delta)  # the identity above 20
    A = d.A.to(state)
    B, C = _per_channel(d.B, d.u), _per_channel(d.C, d.u)

    if d.initial_state is None:
        h = torch.zeros(batch, d_inner, A.shape[1], dtype=state, device=d.u.device)
    else:
        h = d.initial_state.to(state)
    # unbind instead of indexing: the gradient of each slice would fill a full-length tensor, quadratic in total.
    steps = list(zip(u.unbind(1), delta.unbind(1), B.to(state).unbind(1), C.to(state).unbind(1), strict=True))
    starts = d.starts()
    resets = [None] * len(steps) if starts is None else list(starts[:, :, None, None].unbind(1))
    walk = list(zip(steps, resets, strict=True))
    outputs = []
    for (u_t, delta_t, B_t, C_t), reset_t in reversed(walk) if d.reverse else walk:
        delta_t = delta_t.unsqueeze(-1)
        if reset_t is not None:
            h = h.masked_fill(reset_t, 0)
        h = torch.exp(delta_t * A) * h + delta_t * B_t * u_t.unsqueeze(-1)
        y_t = (C_t * h).sum(-1)
        # A complex A holds one of each conjugate pair: the other one doubles the real part.
        outputs.append(2 * y_t.real if A.is_complex() else y_t)
    if not outputs:
        return u, h
    y = torch.stack(outputs[::-1] if d.reverse else outputs, 1)
    return (y if d.D is None else y + d.D.to(real) * u), h


def _per_channel(x: Tensor, u: Tensor) -> Tensor:
    """B or C of shape (B, L, G, N) or (E, N), as (B, L, E or 1, N)."""
    if x.dim() == 2:
        return x.expand(*u.shape[:2], *x.shape)
    return x if x.shape[2] == 1 else x.repeat_interleave(u.shape[2] // x.shape[2], dim=2)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    *,
    silu: bool,
    reverse: bool,
) -> Tensor:
    """Depthwise causal convolution, tap by tap. Shapes as in the public function and `packing`."""
    dtype, length, width = state_dtype(x, weight), x.shape[1], weight.shape[1]
    x = x.to(dtype)
    if initial_state is None:
        past = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    else:
        past = initial_state.to(dtype)
    # `past` is in processing order; in reverse the first step processed is at the end of the sequence.
    padded = torch.cat([x, past.flip(1)], 1) if reverse else torch.cat([past, x], 1)
    y = x.new_zeros(x.shape) if bias is None else bias.to(dtype).expand_as(x)
    for tap in range(width):
        start = width - 1 - tap if reverse else tap
        steps = padded[:, start : start + length]
        if segments is not None:
            steps = steps.masked_fill(~reached(segments, width - 1 - tap, reverse), 0)
        y = y + weight[:, tap].to(dtype) * steps
    return F.silu(y) if silu else y
