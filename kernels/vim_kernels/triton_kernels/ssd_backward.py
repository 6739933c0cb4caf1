# mypy: disable-error-code="assignment"
"""Backend `triton` of `ssd`: the backward pass, in which each program takes a chunk of a head; see `ssd`."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import on_device_of, row_arguments
from .activations import sigmoid
from .ssd_states import (
    FORGOTTEN,
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
def _gradients(
    x,  # (batch, length, heads, P)
    dt,  # (batch, length, heads)
    A,  # (heads,)
    B,  # (batch, length, groups, N)
    C,  # (batch, length, groups, N)
    D,  # (heads,)
    dt_bias,  # (heads,)
    dy,  # (batch, length, heads, P)
    states,  # (batch, chunks, heads, P, N), before each chunk
    d_states,  # (batch, chunks, heads, P, N): gradients of the states after each chunk
    dx,  # (batch, length, heads, P), written, as all below
    ddt,  # (batch, length, heads)
    dB,  # (batch, length, heads, N): each head's part
    dC,  # (batch, length, heads, N)
    dA,  # (batch, chunks, heads): each chunk's part
    dD,  # (batch, chunks, heads)
    d_bias,  # (batch, chunks, heads)
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
    dy_pitch,
    dy_stride,
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
    program = tl.cast(tl.program_id(0), tl.int64)
    dt += (b * dt_pitch + first) * dt_stride
    v, delta, exponent = step_exponents(dt, A, dt_bias, h, i, dt_stride, there, SOFTPLUS)
    sums, total = tl.cumsum(exponent, 0), tl.sum(exponent, 0)
    from_start, to_end = tl.exp(sums), tl.exp(total - sums)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    x += (b * x_pitch + first) * x_stride + h * P
    dy += (b * dy_pitch + first) * dy_stride + h * P
    B += (b * B_pitch + first) * B_stride + h // group_size * N
    C += (b * C_pitch + first) * C_stride + h // group_size * N
    states += program * P * N
    d_states += program * P * N
    out = (b * length + first) * heads + h
    dx += out * P
    dB += out * N
    dC += out * N
    x_inside = there[:, None] & (p[None, :] < P)
    x_t = tl.load(x + (i * x_stride)[:, None] + p[None, :], x_inside, 0.0)
    dy_t = tl.load(dy + (i * dy_stride)[:, None] + p[None, :], x_inside, 0.0).to(x_t.dtype)
    state = p[:, None] * N

    # d_added: the gradient of delta x of each step; first its part through the state after the chunk.
    scores, d_added = tl.zeros([Q, Q], tl.float32), tl.zeros([Q, BLOCK_P], tl.float32)
    for start in range(0, N, BLOCK_N):
        k = start + n[None, :]
        BC_inside = there[:, None] & (k < N)
        B_t = tl.load(B + (i * B_stride)[:, None] + k, BC_inside, 0.0).to(x_t.dtype)
        C_t = tl.load(C + (i * C_stride)[:, None] + k, BC_inside, 0.0).to(x_t.dtype)
        d_state = tl.load(d_states + state + k, (p[:, None] < P) & (k < N), 0.0).to(x_t.dtype)
        scores = tl.dot(C_t, tl.trans(B_t), scores)
        d_added = tl.dot(B_t, tl.trans(d_state), d_added)
    d_added *= to_end[:, None]
    d_delta = tl.sum(d_added * x_t.to(tl.float32), 1)
    # d_sums: the gradient of the sum of the exponents up to each step. By the end of the chunk a step's input has
    # decayed by the total minus this sum.
    to_states = delta * d_delta
    d_sums, d_total = -to_states, tl.sum(to_states, 0)

    decays = decay_matrix(sums, Q)
    weights = scores * decays
    d_added = tl.dot(tl.trans(weights.to(x_t.dtype)), dy_t, d_added)
    dx_t = d_added * delta[:, None]
    if D is not None:
        dx_t += tl.load(D + h).to(tl.float32) * dy_t.to(tl.float32)
        tl.store(dD + program, tl.sum(tl.sum(dy_t.to(tl.float32) * x_t.to(tl.float32), 1), 0))
    tl.store(dx + (i * heads * P)[:, None] + p[None, :], dx_t, x_inside)

    # Both sums are over the same numbers, so a step's effect on itself, which has no decay, cancels.
    d_weights = tl.dot(dy_t, tl.trans(x_t))
    of_pairs = d_weights * weights
    within = tl.sum(of_pairs, 0)
    d_delta += within
    d_sums += tl.sum(of_pairs * delta[None, :], 1) - delta * within
    d_scores = (d_weights * decays * delta[None, :]).to(x_t.dtype)

    of_start = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, N, BLOCK_N):
        k = start + n[None, :]
        BC_inside, state_inside = there[:, None] & (k < N), (p[:, None] < P) & (k < N)
        before = tl.load(states + state + k, state_inside, 0.0)
        d_state = tl.load(d_states + state + k, state_inside, 0.0)
        of_start += tl.sum(before * d_state, 1)
        C_t = tl.load(C + (i * C_stride)[:, None] + k, BC_inside, 0.0).to(x_t.dtype)
        dC_t = tl.dot(dy_t, before.to(x_t.dtype)) * from_start[:, None]
        d_sums += tl.sum(dC_t * C_t.to(tl.float32), 1)
        B_t = tl.load(B + (i * B_stride)[:, None] + k, BC_inside, 0.0).to(x_t.dtype)
        dC_t = tl.dot(d_scores, B_t, dC_t)
        tl.store(dC + (i * heads * N)[:, None] + k, dC_t, BC_inside)
        dB_t = tl.dot(x_t, d_state.to(x_t.dtype)) * (delta * to_end)[:, None]
        dB_t = tl.dot(tl.trans(d_scores), C_t, dB_t)
        tl.store(dB + (i * heads * N)[:, None] + k, dB_t, BC_inside)
    d_total += tl.exp(total) * tl.sum(of_start, 0)

    # The gradient of a step that forgets everything is rounding error, which a large delta would amplify.
    d_exponent = tl.cumsum(d_sums, 0, reverse=True) + d_total
    d_exponent = tl.where(there & (exponent > FORGOTTEN), d_exponent, 0.0)
    tl.store(dA + program, tl.sum(d_exponent * delta, 0))
    d_delta += d_exponent * tl.load(A + h).to(tl.float32)
    if SOFTPLUS:
        d_delta *= sigmoid(v)
    tl.store(ddt + out + i * heads, d_delta, there)
    if dt_bias is not None:
        tl.store(d_bias + program, tl.sum(tl.where(there, d_delta, 0.0), 0))


def backward(
    dy: Tensor | None, d_last_state: Tensor | None, inputs: Sequence[Tensor], shape: Shape
) -> list[Tensor | None]:
    """Gradients of the inputs, x, dt, A, B, C, D, dt_bias and initial_state, each in its tensor's dtype."""
    x, dt, B, C = (chunk_rows(inputs[i]) for i in (0, 1, 3, 4))
    A, (D, dt_bias, initial_state) = inputs[2].contiguous(), map(contiguous, inputs[5:])
    dy, d_last_state = torch.zeros_like(x) if dy is None else chunk_rows(dy), contiguous(d_last_state)
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    # Each head's part of dB and dC, and each chunk's part of dA, dD and the gradient of the bias: torch sums them.
    dBC = A.new_empty(2, *dt.shape, shape.d_state, dtype=torch.float32)
    parts = A.new_empty(3, shape.batch, shape.chunks, shape.heads, dtype=torch.float32)
    with on_device_of(x):
        states, _ = shape.states(x, dt, A, B, dt_bias, initial_state)
        d_states, d_initial_state = shape.states(dy, dt, A, C, dt_bias, d_last_state, gradient=True)
        _gradients[(shape.programs,)](
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias,
            dy,
            states,
            d_states,
            dx,
            ddt,
            *dBC,
            *parts,
            **shape.sizes,
            **row_arguments(x=x, dt=dt, B=B, C=C, dy=dy),
            **shape.constants,
        )
    dB, dC = dBC.unflatten(3, (B.shape[2], -1)).sum(4)
    dA, dD, d_bias = parts.sum((1, 2))
    gradients = (dx, ddt, dA, dB, dC, dD, d_bias, d_initial_state)
    return [None if t is None else gradient.to(t.dtype) for gradient, t in zip(gradients, inputs, strict=True)]
