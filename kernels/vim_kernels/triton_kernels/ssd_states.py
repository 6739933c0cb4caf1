# mypy: disable-error-code="assignment"
"""Backend `triton` of `ssd`: the states between chunks, and what the chunk programs of both passes share.

Steps are counted in processing order: in reverse, step i is at position length - 1 - i, and nothing else differs.
Matrix products take their operands in x's dtype; their sums, exponents, decays and states are fp32. A program's number
is (batch entry, chunk, head): the heads of a group, which read the same B and C, run next to each other.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import as_rows, row_arguments
from .activations import softplus

# The lowest exponent of a step. Its decay is nothing in fp32, and the sums over a chunk keep their digits after steps
# that forget everything.
FORGOTTEN = tl.constexpr(-40.0)

PROGRAMS = 256  # enough to fill the chip

# Not specialised on: lengths and batch strides change from call to call. Row strides tell how loads are aligned.
VARIABLE = ["length", "chunks", "x_pitch", "dt_pitch", "B_pitch", "C_pitch", "dy_pitch"]


@triton.jit
def program_place(chunks, heads):
    """Batch entry, chunk and head of a program."""
    program = tl.program_id(0)
    return tl.cast(program // heads // chunks, tl.int64), program // heads % chunks, program % heads


@triton.jit
def chunk_steps(c, length, REVERSE: tl.constexpr, Q: tl.constexpr):
    """First position of a chunk, offsets of its steps, and a mask of the steps within the sequence.

    Base addresses take 64 bits. Offsets within a chunk take 32, which halves their registers.
    """
    first, i = c * Q, tl.arange(0, Q)
    there = i < length - first
    if REVERSE:
        first, i = length - 1 - first, -i
    return first, i, there


@triton.jit
def step_exponents(dt, A, dt_bias, h, i, stride, there, SOFTPLUS: tl.constexpr):
    """dt + bias, delta and exponent of each step. Masked steps get 0, which changes no state."""
    v = tl.load(dt + h + i * stride, there, 0.0).to(tl.float32)
    if dt_bias is not None:
        v += tl.load(dt_bias + h).to(tl.float32)
    delta = tl.where(there, softplus(v) if SOFTPLUS else v, 0.0)
    return v, delta, tl.maximum(delta * tl.load(A + h).to(tl.float32), FORGOTTEN)


@triton.jit
def decay_matrix(sums, Q: tl.constexpr):
    """(Q, Q): the share of step k's input that remains after step q; 0 if k comes after q."""
    i = tl.arange(0, Q)
    return tl.exp(tl.where(i[:, None] >= i[None, :], sums[:, None] - sums[None, :], float("-inf")))


@triton.jit(do_not_specialize=VARIABLE)
def _states(
    x,  # (batch, length, heads, P); the gradient of y if GRADIENT
    dt,  # (batch, length, heads)
    A,  # (heads,)
    B,  # (batch, length, groups, N); C if GRADIENT
    dt_bias,  # (heads,)
    states,  # (batch, chunks, heads, P, N), written: the state before each chunk if IN_ORDER, else what it adds
    totals,  # (batch, chunks, heads), written unless IN_ORDER: the sum of a chunk's exponents
    initial,  # (batch, heads, P, N) or None, read if IN_ORDER
    last,  # (batch, heads, P, N), written if IN_ORDER
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
    GRADIENT: tl.constexpr,  # run from the last chunk to the first
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,  # a power of two, P at least
    BLOCK_N: tl.constexpr,  # states at a time
):
    b, c, h = program_place(1 if IN_ORDER else chunks, heads)
    p, n = tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry, inside = p[:, None] * N + n[None, :], (p[:, None] < P) & (n[None, :] < N)
    own = (b * heads + h) * P * N + entry
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if IN_ORDER and initial is not None:
        state = tl.load(initial + own, inside, 0.0).to(tl.float32)
    for k in range(chunks if IN_ORDER else 1):
        if IN_ORDER:
            c = chunks - 1 - k if GRADIENT else k
        first, i, there = chunk_steps(c, length, REVERSE, Q)
        _, delta, exponent = step_exponents(
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
    states,  # (batch, chunks, heads, size): what each chunk adds; replaced by the state before it
    totals,  # (batch, chunks, heads)
    initial,  # (batch, heads, size) or None
    last,  # (batch, heads, size), written
    chunks,
    heads,
    size,
    GRADIENT: tl.constexpr,  # run from the last chunk to the first
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
    # Load a chunk's total one iteration early: a load does not overtake a store.
    total = tl.load(totals + chunk)
    for c in tl.range(0, chunks, num_stages=4):
        state = states + (chunk + tl.cast(c, tl.int64) * step) * size + entry
        added = tl.load(state, inside, 0.0)
        following = tl.load(totals + chunk + tl.cast(c + 1, tl.int64) * step, c + 1 < chunks, 0.0)
        tl.store(state, h, inside)
        h = tl.exp(total) * h + added
        total = following
    tl.store(last + own, h, inside)


class Shape:
    """The sizes of a call, the constants of its kernels, and the launch that finds the states."""

    def __init__(self, x: Tensor, B: Tensor, chunk_size: int, reverse: bool, dt_softplus: bool):
        self.batch, self.length, self.heads, self.head_dim = x.shape
        groups, self.d_state = B.shape[2:]
        # A power of two with enough rows for a matrix product.
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
            # At least 64: for a product with one operand in registers and fewer columns, ptxas 12.8 reads the address
            # of the other operand from an uninitialised register.
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
        """States before each chunk and after the last one.

        With `gradient`, of dy and C in place of x and B: the gradients of the states, from the last chunk to the first.

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


def chunk_rows(t: Tensor) -> Tensor:
    """`as_rows`, with rows close enough for the 32-bit offsets of a chunk."""
    return as_rows(t if t.stride(1) <= 2**25 else t.contiguous())


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
