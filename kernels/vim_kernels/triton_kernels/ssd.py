# mypy: disable-error-code="assignment"
"""Backend `triton` of `ssd`, for x in half precision. A program takes a chunk of at most 64 steps of a head:

    _states       the state before each chunk                               chunks in order, heads and batch in parallel
    _outputs      y, from the chunk's steps and the state before it         all chunks in parallel
    _gradients    of all inputs, from the states before and after a chunk   all chunks in parallel

If heads and batch are too few to fill the chip, all chunks first find in parallel what they add to the state, and
`_carry` then turns this, in order, into the state before each chunk.

The backward recomputes the states and finds their gradients by the same recurrence from the end, with dy in place of x
and C in place of B. Only the inputs are saved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import check_no_tangents
from ..rows import on_device_of, row_arguments
from .ssd_backward import backward
from .ssd_states import (
    VARIABLE,
    Shape,
    chunk_rows,
    chunk_steps,
    contiguous,
    decay_matrix,
    program_place,
    step_exponents,
)


@triton.jit(do_not_specialize=VARIABLE)
def _outputs(
    x,  # (batch, length, heads, P)
    dt,  # (batch, length, heads)
    A,  # (heads,)
    B,  # (batch, length, groups, N)
    C,  # (batch, length, groups, N)
    D,  # (heads,)
    dt_bias,  # (heads,)
    states,  # (batch, chunks, heads, P, N), before each chunk
    y,  # (batch, length, heads, P), written
    length,
    chunks,
    heads,
    group_size,
    x_pitch,
    x_stride,
    dt_pitch,
    dt_stride,
    B_pitch,
    B_stride,
    C_pitch,
    C_stride,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,  # a power of two, P at least
    BLOCK_N: tl.constexpr,  # states at a time
):
    b, c, h = program_place(chunks, heads)
    first, i, there = chunk_steps(c, length, REVERSE, Q)
    dt += (b * dt_pitch + first) * dt_stride
    _, delta, exponent = step_exponents(dt, A, dt_bias, h, i, dt_stride, there, SOFTPLUS)
    sums = tl.cumsum(exponent, 0)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    x += (b * x_pitch + first) * x_stride + h * P
    B += (b * B_pitch + first) * B_stride + h // group_size * N
    C += (b * C_pitch + first) * C_stride + h // group_size * N
    y += ((b * length + first) * heads + h) * P
    states += tl.cast(tl.program_id(0), tl.int64) * P * N
    x_inside = there[:, None] & (p[None, :] < P)
    x_t = tl.load(x + (i * x_stride)[:, None] + p[None, :], x_inside, 0.0)
    scores, y_t = tl.zeros([Q, Q], tl.float32), tl.zeros([Q, BLOCK_P], tl.float32)
    for start in range(0, N, BLOCK_N):
        k = start + n[None, :]
        BC_inside = there[:, None] & (k < N)
        B_t = tl.load(B + (i * B_stride)[:, None] + k, BC_inside, 0.0).to(x_t.dtype)
        C_t = tl.load(C + (i * C_stride)[:, None] + k, BC_inside, 0.0).to(x_t.dtype)
        before = tl.load(states + p[:, None] * N + k, (p[:, None] < P) & (k < N), 0.0).to(x_t.dtype)
        scores = tl.dot(C_t, tl.trans(B_t), scores)
        y_t = tl.dot(C_t, tl.trans(before), y_t)
    y_t *= tl.exp(sums)[:, None]
    weights = (scores * decay_matrix(sums, Q)).to(x_t.dtype)
    # Delta scales x and not the weights, which would lose more in half precision, or overflow.
    y_t = tl.dot(weights, (x_t.to(tl.float32) * delta[:, None]).to(x_t.dtype), y_t)
    if D is not None:
        y_t += tl.load(D + h).to(tl.float32) * x_t.to(tl.float32)
    tl.store(y + (i * heads * P)[:, None] + p[None, :], y_t, x_inside)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, chunk_size, reverse):
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_state)
        ctx.options = chunk_size, reverse, dt_softplus
        ctx.set_materialize_grads(False)
        shape = Shape(x, B, *ctx.options)
        x, dt, B, C = (chunk_rows(t) for t in (x, dt, B, C))
        A, (D, dt_bias, initial_state) = A.contiguous(), map(contiguous, (D, dt_bias, initial_state))
        y = x.new_empty(x.shape)
        with on_device_of(x):
            states, last_state = shape.states(x, dt, A, B, dt_bias, initial_state)
            _outputs[(shape.programs,)](
                x,
                dt,
                A,
                B,
                C,
                D,
                dt_bias,
                states,
                y,
                **shape.sizes,
                **row_arguments(x=x, dt=dt, B=B, C=C),
                **shape.constants,
            )
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_last_state):
        check_no_tangents()
        inputs = ctx.saved_tensors
        return *backward(dy, d_last_state, inputs, Shape(inputs[0], inputs[3], *ctx.options)), None, None, None


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    dt_softplus: bool,
    chunk_size: int,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """See `vim_kernels.ssd`: y and the last state."""
    return _SSD.apply(x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, chunk_size, reverse)
