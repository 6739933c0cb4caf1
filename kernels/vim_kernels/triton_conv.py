"""Backend `triton` of the causal convolution: a program takes a tile of steps and channels, no atomics, deterministic.

Steps count in processing order: step s is row s, or row L - 1 - s in reverse, and steps -(width - 1) to -1 are the
initial state. A tap is a load of the same tile shifted by a step; all but the first of them hit the L1 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import state_dtype
from .rows import as_rows, on_device_of, row_arguments
from .triton_tiles import sigmoid


@triton.jit
def _row(step, length, REVERSE: tl.constexpr):
    row = length - 1 - step if REVERSE else step
    return row.to(tl.int64)


@triton.jit
def _input(
    x, x_stride, past, d_inner, step, inside, length, REVERSE: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr
):
    """x at `step` [STEPS, 1]; before step 0 the initial state or zero, beyond the last step zero."""
    x_s = tl.load(x + _row(step, length, REVERSE) * x_stride, inside & (step >= 0) & (step < length), 0.0).to(S)
    if past is not None:
        x_s += tl.load(past + (step + WIDTH - 1) * d_inner, inside & (step < 0) & (step > -WIDTH), 0.0).to(S)
    return x_s


@triton.jit
def _pre_activation(
    x, x_stride, past, d_inner, weight, bias, step, inside, length,
    REVERSE: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    pre = tl.zeros([step.shape[0], inside.shape[1]], S)
    if bias is not None:
        pre += tl.load(bias, inside, 0.0).to(S)
    for tap in tl.static_range(WIDTH):
        x_s = _input(x, x_stride, past, d_inner, step + tap - (WIDTH - 1), inside, length, REVERSE, WIDTH, S)
        pre += x_s * tl.load(weight + tap, inside, 0.0).to(S)
    return pre


@triton.jit
def _d_pre_activation(
    dy, dy_stride, x, x_stride, past, d_inner, weight, bias, step, inside, length,
    SILU: tl.constexpr, REVERSE: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Zero outside the sequence."""
    valid = inside & (step >= 0) & (step < length)
    d_pre = tl.load(dy + _row(step, length, REVERSE) * dy_stride, valid, 0.0).to(S)
    if SILU:
        pre = _pre_activation(x, x_stride, past, d_inner, weight, bias, step, inside, length, REVERSE, WIDTH, S)
        gate = sigmoid(pre)
        d_pre *= gate * (1 + pre * (1 - gate))
    return d_pre


@triton.jit(do_not_specialize=["length", "x_pitch"])
def _forward_kernel(
    x,  # (B, L, E)
    weight,  # (E, WIDTH)
    bias,  # (E,) or None
    past,  # (B, WIDTH - 1, E) or None: the initial state
    y,  # (B, L, E)
    length,
    d_inner,
    x_pitch,  # see rows.row_strides
    x_stride,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks = tl.cdiv(length, STEPS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    step = tl.program_id(0) % blocks * STEPS + tl.arange(0, STEPS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = channel < d_inner
    x += b * x_pitch * x_stride + channel
    weight += channel * WIDTH
    if bias is not None:
        bias += channel
    if past is not None:
        past += b * (WIDTH - 1) * d_inner + channel
    out = _pre_activation(x, x_stride, past, d_inner, weight, bias, step, inside, length, REVERSE, WIDTH, S)
    if SILU:
        out *= sigmoid(out)
    tl.store(y + (b * length + _row(step, length, REVERSE)) * d_inner + channel, out, inside & (step < length))


@triton.jit(do_not_specialize=["length", "x_pitch", "dy_pitch"])
def _backward_kernel(
    dy,  # (B, L, E)
    x,  # (B, L, E)
    weight,  # (E, WIDTH)
    bias,  # (E,) or None
    past,  # (B, WIDTH - 1, E) or None
    dx,  # (B, L, E)
    d_weight,  # (B * blocks of steps, E, WIDTH)
    d_bias,  # (B * blocks of steps, E) or None
    d_past,  # (B, WIDTH - 1, E) or None
    length,
    d_inner,
    x_pitch,
    x_stride,
    dy_pitch,
    dy_stride,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    PAST: tl.constexpr = 0 if past is None else WIDTH - 1
    blocks = tl.cdiv(PAST + length, STEPS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    step = tl.program_id(0) % blocks * STEPS - PAST + tl.arange(0, STEPS)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = channel < d_inner
    x += b * x_pitch * x_stride + channel
    dy += b * dy_pitch * dy_stride + channel
    weight += channel * WIDTH
    if bias is not None:
        bias += channel
    if past is not None:
        past += b * (WIDTH - 1) * d_inner + channel
        d_past += b * (WIDTH - 1) * d_inner + channel

    d_pre = _d_pre_activation(
        dy, dy_stride, x, x_stride, past, d_inner, weight, bias, step, inside, length, SILU, REVERSE, WIDTH, S
    )
    partial = tl.program_id(0).to(tl.int64) * d_inner + channel
    if bias is not None:
        tl.store(d_bias + partial, tl.sum(d_pre, 0)[None, :], inside)
    for tap in tl.static_range(WIDTH):
        x_s = _input(x, x_stride, past, d_inner, step + tap - (WIDTH - 1), inside, length, REVERSE, WIDTH, S)
        tl.store(d_weight + partial * WIDTH + tap, tl.sum(d_pre * x_s, 0)[None, :], inside)

    # dx[s] = sum_j weight[-1 - j] d_pre[s + j]. The shifted d_pre belong to other programs and are computed again:
    # arithmetic instead of another pass through memory, so that an element costs 6 bytes at 16 bits (x, dy, dx).
    d_x = d_pre * tl.load(weight + WIDTH - 1, inside, 0.0).to(S)
    for j in range(1, WIDTH):  # not unrolled: the code would grow with the square of the width
        d_pre = _d_pre_activation(
            dy, dy_stride, x, x_stride, past, d_inner, weight, bias, step + j, inside, length, SILU, REVERSE, WIDTH, S
        )
        d_x += d_pre * tl.load(weight + (WIDTH - 1 - j), inside, 0.0).to(S)
    row = b * length + _row(step, length, REVERSE)
    tl.store(dx + row * d_inner + channel, d_x, inside & (step >= 0) & (step < length))
    if past is not None:
        tl.store(d_past + (step + WIDTH - 1) * d_inner, d_x, inside & (step < 0))


# The tile of a program: 16 values a thread. Fixed, so that the sums of d_weight and d_bias always are the same.
STEPS = 16
CHANNELS = 128


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, *, silu: bool, reverse: bool
) -> Tensor:
    """y (B, L, E) in x's dtype; shapes as in `causal_conv1d`."""
    x = as_rows(x)
    batch, length, d_inner = x.shape
    y = x.new_empty(x.shape)
    with on_device_of(x):
        _forward_kernel[(batch * triton.cdiv(length, STEPS), triton.cdiv(d_inner, CHANNELS))](
            x,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            _past(initial_state),
            y,
            length,
            d_inner,
            **row_arguments(x=x),
            **_constants(x, weight, silu, reverse),
        )
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state, each in its tensor's dtype."""
    dy, x, past = as_rows(dy), as_rows(x), _past(initial_state)
    batch, length, d_inner = x.shape
    width = weight.shape[1]
    programs = batch * triton.cdiv(length + (0 if past is None else width - 1), STEPS)
    dtype = state_dtype(x, weight)
    dx = x.new_empty(x.shape)
    d_weight = x.new_empty(programs, d_inner, width, dtype=dtype)
    d_bias = None if bias is None else x.new_empty(programs, d_inner, dtype=dtype)
    d_past = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    with on_device_of(x):
        _backward_kernel[(programs, triton.cdiv(d_inner, CHANNELS))](
            dy,
            x,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            past,
            dx,
            d_weight,
            d_bias,
            None if past is None else d_past,
            length,
            d_inner,
            **row_arguments(x=x, dy=dy),
            **_constants(x, weight, silu, reverse),
        )
    return (
        dx,
        d_weight.sum(0).to(weight.dtype),
        None if d_bias is None or bias is None else d_bias.sum(0).to(bias.dtype),
        d_past,
    )


def _past(initial_state: Tensor | None) -> Tensor | None:
    """None for the empty state of a filter of width 1 too."""
    return None if initial_state is None or initial_state.numel() == 0 else initial_state.contiguous()


def _constants(x: Tensor, weight: Tensor, silu: bool, reverse: bool) -> dict[str, object]:
    return {
        "SILU": silu,
        "REVERSE": reverse,
        "WIDTH": weight.shape[1],
        "S": tl.float64 if state_dtype(x, weight) == torch.float64 else tl.float32,
        "STEPS": STEPS,
        "CHANNELS": CHANNELS,
        "num_warps": 4,
    }
