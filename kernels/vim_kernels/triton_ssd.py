# mypy: disable-error-code="assignment"
"""The kernels of `ssd` for sequences in half precision. A program has a chunk of at most 64 steps of a head:

    _states         the state in front of each chunk                            chunks in order, heads and batch at once
    _outputs        y, from the chunk's steps and the state in front of it      all chunks at once
    _gradients      of all inputs, from the states on both sides of the chunk   all chunks at once

Where heads and batch are too few to fill the chip, all chunks at once find what each adds to the state, and `_carry`
makes of it, in order, the state in front of each.

The backward finds the states once more, and also the gradient of the state, which is the same recurrence from the end:
dy takes the place of x and C that of B. Nothing but the inputs is saved.

Steps are counted as they are processed: in reverse, step i stands at length - 1 - i, and nothing else is different.
Matrix products take their operands in x's dtype; their sums, exponents, decays and states are fp32. A program's number
is (batch entry, chunk, head): the heads of a group, which read the same B and C, run side by side.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import check_no_tangents
from .rows import as_rows, on_device_of, row_arguments
from .triton_tiles import sigmoid, softplus

# No step's exponent counts for less. What it leaves of a state is nothing in fp32, and the sums over a chunk keep their
# digits behind steps that forget everything.
FORGOTTEN = tl.constexpr(-40.0)

PROGRAMS = 256  # that fill the chip

# Lengths and batch strides change from call to call; rows' strides tell how loads are aligned.
VARIABLE = ["length", "chunks", "x_pitch", "dt_pitch", "B_pitch", "C_pitch", "dy_pitch"]


@triton.jit
def _place(chunks, heads):
    """Batch entry, chunk and head of a program."""
    program = tl.program_id(0)
    return tl.cast(program // heads // chunks, tl.int64), program // heads % chunks, program % heads


@triton.jit
def _chunk(c, length, REVERSE: tl.constexpr, Q: tl.constexpr):
    """Where a chunk begins, its steps from there, and which the sequence has.

    Where tensors begin takes 64 bits; within a chunk offsets have 32, which halves the registers that they take.
    """
    first, i = c * Q, tl.arange(0, Q)
    there = i < length - first
    if REVERSE:
        first, i = length - 1 - first, -i
    return first, i, there


@triton.jit
def _steps(dt, A, dt_bias, h, i, stride, there, SOFTPLUS: tl.constexpr):
    """Each step's dt + bias, delta and exponent: 0 where there is none, which changes no state."""
    v = tl.load(dt + h + i * stride, there, 0.0).to(tl.float32)
    if dt_bias is not None:
        v += tl.load(dt_bias + h).to(tl.float32)
    delta = tl.where(there, softplus(v) if SOFTPLUS else v, 0.0)
    return v, delta, tl.maximum(delta * tl.load(A + h).to(tl.float32), FORGOTTEN)


@triton.jit
def _decays(sums, Q: tl.constexpr):
    """(Q, Q): how much of what step k adds is left behind step q, 0 where k comes after q."""
    i = tl.arange(0, Q)
    return tl.exp(tl.where(i[:, None] >= i[None, :], sums[:, None] - sums[None, :], float("-inf")))


@triton.jit(do_not_specialize=VARIABLE)
def _states(
    x,  # (batch, length, heads, P); the gradient of y if GRADIENT
    dt,  # (batch, length, heads)
    A,  # (heads,)
    B,  # (batch, length, groups, N); C if GRADIENT
    dt_bias,  # (heads,)
    states,  # (batch, chunks, heads, P, N), written: the state in front of each chunk, or what each adds
    totals,  # (batch, chunks, heads), written unless IN_ORDER: the sum of a chunk's exponents
    initial,  # (batch, heads, P, N), of which and of `last` only IN_ORDER knows
    last,  # (batch, heads, P, N), written
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
    IN_ORDER: tl.constexpr,
    GRADIENT: tl.constexpr,  # from the last chunk to the first
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,  # a power of two, P at least
    BLOCK_N: tl.constexpr,  # states at a time
):
    b, c, h = _place(1 if IN_ORDER else chunks, heads)
    p, n = tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry, inside = p[:, None] * N + n[None, :], (p[:, None] < P) & (n[None, :] < N)
    own = (b * heads + h) * P * N + entry
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if IN_ORDER and initial is not None:
        state = tl.load(initial + own, inside, 0.0).to(tl.float32)
    for k in range(chunks if IN_ORDER else 1):
        if IN_ORDER:
            c = chunks - 1 - k if GRADIENT else k
        first, i, there = _chunk(c, length, REVERSE, Q)
        _, delta, exponent = _steps(
            dt + (b * dt_pitch + first) * dt_stride, A, dt_bias, h, i, dt_stride, there, SOFTPLUS
        )
        total = tl.sum(exponent, 0)
        sums = tl.cumsum(exponent, 0)
        weight = tl.exp(sums) if GRADIENT else delta * tl.exp(total - sums)
        x_c = x + (b * x_pitch + first) * x_stride + h * P
        B_c = B + (b * B_pitch + first) * B_stride + h // group_size * N
        x_t = tl.load(x_c + (i * x_stride)[:, None] + p[None, :], there[:, None] & (p[None, :] < P), 0.0)
        B_t = tl.load(B_c + (i * B_stride)[:, None] + n[None, :], there[:, None] & (n[None, :] < N), 0.0).to(x_t.dtype)
        weighted = (x_t.to(tl.float32) * weight[:, None]).to(x_t.dtype)
        program = (b * chunks + c) * heads + h
        if IN_ORDER:
            tl.store(states + program * P * N + entry, state, inside)
            state *= tl.exp(total)
        state = tl.dot(tl.trans(weighted), B_t, state)
        if not IN_ORDER:
            tl.store(states + program * P * N + entry, state, inside)
            if tl.program_id(1) == 0:
                tl.store(totals + program, total)
    if IN_ORDER:
        tl.store(last + own, state, inside)


@triton.jit(do_not_specialize=["chunks"])
def _carry(
    states,  # (batch, chunks, heads, size): what each chunk adds becomes the state in front of it
    totals,  # (batch, chunks, heads)
    initial,  # (batch, heads, size)
    last,  # (batch, heads, size), written
    chunks,
    heads,
    size,
    GRADIENT: tl.constexpr,  # from the last chunk to the first
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < size
    own = tl.cast(sequence, tl.int64) * size + entry
    chunk = tl.cast(sequence // heads, tl.int64) * chunks * heads + sequence % heads
    step = heads
    if GRADIENT:
        chunk += tl.cast(chunks - 1, tl.int64) * heads
        step = -heads
    h = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        h = tl.load(initial + own, inside, 0.0).to(tl.float32)
    # A chunk's total is loaded while the one before is added: a load does not overtake a store.
    total = tl.load(totals + chunk)
    for c in tl.range(0, chunks, num_stages=4):
        state = states + (chunk + tl.cast(c, tl.int64) * step) * size + entry
        added = tl.load(state, inside, 0.0)
        following = tl.load(totals + chunk + tl.cast(c + 1, tl.int64) * step, c + 1 < chunks, 0.0)
        tl.store(state, h, inside)
        h = tl.exp(total) * h + added
        total = following
    tl.store(last + own, h, inside)


@triton.jit(do_not_specialize=VARIABLE)
def _outputs(
    x,  # (batch, length, heads, P)
    dt,  # (batch, length, heads)
    A,  # (heads,)
    B,  # (batch, length, groups, N)
    C,  # (batch, length, groups, N)
    D,  # (heads,)
    dt_bias,  # (heads,)
    states,  # (batch, chunks, heads, P, N), in front of each chunk
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
    b, c, h = _place(chunks, heads)
    first, i, there = _chunk(c, length, REVERSE, Q)
    dt += (b * dt_pitch + first) * dt_stride
    _, delta, exponent = _steps(dt, A, dt_bias, h, i, dt_stride, there, SOFTPLUS)
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
    weights = (scores * _decays(sums, Q)).to(x_t.dtype)
    # Delta is of x: of the weights, half precision would lose more, or not hold them.
    y_t = tl.dot(weights, (x_t.to(tl.float32) * delta[:, None]).to(x_t.dtype), y_t)
    if D is not None:
        y_t += tl.load(D + h).to(tl.float32) * x_t.to(tl.float32)
    tl.store(y + (i * heads * P)[:, None] + p[None, :], y_t, x_inside)


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
    states,  # (batch, chunks, heads, P, N), in front of each chunk
    d_states,  # (batch, chunks, heads, P, N): gradients of the states behind each chunk
    dx,  # (batch, length, heads, P), written, like all that follows
    ddt,  # (batch, length, heads)
    dB,  # (batch, length, heads, N): a head's part
    dC,  # (batch, length, heads, N)
    dA,  # (batch, chunks, heads): a chunk's part
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
    b, c, h = _place(chunks, heads)
    first, i, there = _chunk(c, length, REVERSE, Q)
    program = tl.cast(tl.program_id(0), tl.int64)
    dt += (b * dt_pitch + first) * dt_stride
    v, delta, exponent = _steps(dt, A, dt_bias, h, i, dt_stride, there, SOFTPLUS)
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

    # d_added: the gradient of delta x of each step, at first through the state behind the chunk.
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
    # d_sums: the gradient of the sum of the exponents up to each step. What reaches the end has decayed by the total
    # less this sum.
    to_states = delta * d_delta
    d_sums, d_total = -to_states, tl.sum(to_states, 0)

    decays = _decays(sums, Q)
    weights = scores * decays
    d_added = tl.dot(tl.trans(weights.to(x_t.dtype)), dy_t, d_added)
    dx_t = d_added * delta[:, None]
    if D is not None:
        dx_t += tl.load(D + h).to(tl.float32) * dy_t.to(tl.float32)
        tl.store(dD + program, tl.sum(tl.sum(dy_t.to(tl.float32) * x_t.to(tl.float32), 1), 0))
    tl.store(dx + (i * heads * P)[:, None] + p[None, :], dx_t, x_inside)

    # Both sums of the same numbers: what a step gives itself cancels, and decays have no part in it.
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

    # What a step that forgets all gets is rounding, which a large delta would make much of.
    d_exponent = tl.cumsum(d_sums, 0, reverse=True) + d_total
    d_exponent = tl.where(there & (exponent > FORGOTTEN), d_exponent, 0.0)
    tl.store(dA + program, tl.sum(d_exponent * delta, 0))
    d_delta += d_exponent * tl.load(A + h).to(tl.float32)
    if SOFTPLUS:
        d_delta *= sigmoid(v)
    tl.store(ddt + out + i * heads, d_delta, there)
    if dt_bias is not None:
        tl.store(d_bias + program, tl.sum(tl.where(there, d_delta, 0.0), 0))


class _Shape:
    """Of a call: what kernels are told of it, and their launches."""

    def __init__(self, x: Tensor, B: Tensor, chunk_size: int, reverse: bool, dt_softplus: bool):
        self.batch, self.length, self.heads, self.head_dim = x.shape
        groups, self.d_state = B.shape[2:]
        # A power of two, and enough rows for a matrix product.
        steps = min(64, max(16, 1 << (chunk_size.bit_length() - 1)))
        self.chunks = triton.cdiv(self.length, steps)
        self.programs = self.batch * self.chunks * self.heads
        self.sizes = {
            "length": self.length,
            "chunks": self.chunks,
            "heads": self.heads,
            "group_size": self.heads // groups,
        }
        self.constants: dict[str, Any] = {
            "REVERSE": reverse,
            "SOFTPLUS": dt_softplus,
            "P": self.head_dim,
            "N": self.d_state,
            "Q": steps,
            # Not fewer: where a product has one operand in registers and less than 64 columns, ptxas 12.8 takes the
            # address of the other operand from a register that nothing has written.
            "BLOCK_P": max(64, triton.next_power_of_2(self.head_dim)),
            "BLOCK_N": 64,
            "num_warps": 4 if self.head_dim <= 64 else 8,
            "num_stages": 1,
        }

    def states(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        dt_bias: Tensor | None,
        initial: Tensor | None,
        *,
        gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """States in front of each chunk and behind the last one; of dy, C and a gradient those in the other direction.

        Returns: (batch, chunks, heads, head_dim, d_state) and (batch, heads, head_dim, d_state), in fp32.
        """
        size, blocks = self.head_dim * self.d_state, triton.cdiv(self.d_state, self.constants["BLOCK_N"])
        sequences = self.batch * self.heads
        in_order = sequences * blocks >= PROGRAMS
        states = A.new_empty(self.batch, self.chunks, self.heads, size, dtype=torch.float32)
        totals = A.new_empty(self.batch, self.chunks, self.heads, dtype=torch.float32)
        last = A.new_empty(self.batch, self.heads, self.head_dim, self.d_state, dtype=torch.float32)
        _states[(sequences if in_order else self.programs, blocks)](
            x,
            dt,
            A,
            B,
            dt_bias,
            states,
            totals,
            initial,
            last,
            **self.sizes,
            **row_arguments(x=x, dt=dt, B=B),
            IN_ORDER=in_order,
            GRADIENT=gradient,
            **self.constants,
        )
        if not in_order:
            block = 256
            _carry[(sequences, triton.cdiv(size, block))](
                states,
                totals,
                initial,
                last,
                self.chunks,
                self.heads,
                size,
                GRADIENT=gradient,
                BLOCK=block,
                num_warps=2,
            )
        return states, last


def _rows(t: Tensor) -> Tensor:
    """As rows that lie near enough for a chunk's offsets."""
    return as_rows(t if t.stride(1) <= 2**25 else t.contiguous())


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus, chunk_size, reverse):
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_state)
        ctx.options = chunk_size, reverse, dt_softplus
        ctx.set_materialize_grads(False)
        shape = _Shape(x, B, *ctx.options)
        x, dt, B, C = (_rows(t) for t in (x, dt, B, C))
        A, (D, dt_bias, initial_state) = A.contiguous(), map(_contiguous, (D, dt_bias, initial_state))
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
        given = ctx.saved_tensors
        shape = _Shape(given[0], given[3], *ctx.options)
        x, dt, B, C = (_rows(given[i]) for i in (0, 1, 3, 4))
        A, (D, dt_bias, initial_state) = given[2].contiguous(), map(_contiguous, given[5:])
        dy = torch.zeros_like(x) if dy is None else _rows(dy)
        d_last_state = None if d_last_state is None else d_last_state.contiguous()
        dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
        # Each head's part of dB and dC, and each chunk's of dA, dD and the gradient of the bias: torch sums them.
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
        pairs = zip(gradients, given, strict=True)
        return *(None if t is None else gradient.to(t.dtype) for gradient, t in pairs), None, None, None


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
