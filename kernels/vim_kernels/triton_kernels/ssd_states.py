# mypy: disable-error-code="assignment"
"""Backend `triton` of `ssd`: what both passes share, and the states before and after parts of a sequence.

Steps are counted in processing order: in reverse, step i is at position length - 1 - i, and nothing else differs. They
are divided into chunks of at most 64 steps, the chunks into windows. A program walks along the chunks of a window of a
head with the state in registers. A window is the whole sequence, unless heads and batch are too few to fill the chip;
then `_states` first finds what each window alone adds to the state.

Matrix products take their operands in x's dtype; their sums, exponents, decays and states are fp32. A program's number
is (batch entry, window, head): the heads of a group, which read the same B and C, run next to each other.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import as_rows, row_arguments
from .activations import LOG2E, softplus

# The lowest exponent of a step. Its decay is nothing in fp32, and the sums over a chunk keep their digits after steps
# that forget everything.
FORGOTTEN = tl.constexpr(-40.0)

PROGRAMS = 512  # enough to fill the chip
MOST_WINDOWS = 64  # each window reads what all before it add

# Not specialised on: lengths and batch strides change from call to call. Heads and row strides are constants: a tile's
# addresses then are one register and offsets that are part of the load instructions.
VARIABLE = ["length", "chunks", "windows", "window", "x_pitch", "dt_pitch", "B_pitch", "C_pitch", "dy_pitch"]


@triton.jit
def program_place(parts, heads):
    """Batch entry, part of the sequence and head of a program."""
    program = tl.program_id(0)
    return tl.cast(program // heads // parts, tl.int64), program // heads % parts, program % heads


@triton.jit
def chunk_steps(c, length, REVERSE: tl.constexpr, Q: tl.constexpr):
    """First position of a chunk, offsets of its steps, and a mask of the steps within the sequence.

    In 64 bits, LLVM can split constant distances between steps off an address.
    """
    first, i = c * Q, tl.arange(0, Q).to(tl.int64)
    there = i < length - first
    if REVERSE:
        first, i = length - 1 - first, -i
    return first, i, there


@triton.jit
def tile_mask(rows, columns, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A tile's rows that are there and its columns before SIZE, whose first is a multiple of BLOCK."""
    inside = rows[:, None]
    if SIZE % BLOCK:
        inside = inside & (columns[None, :] < SIZE)
    return inside


@triton.jit(do_not_specialize=VARIABLE)
def _steps(
    dt,  # (batch, length, heads)
    A,  # (heads,)
    dt_bias,  # (heads,)
    deltas,  # (batch, chunks, heads, Q), written, as the next
    sums,  # (batch, chunks, heads, Q): of the exponents of a chunk up to each step, times log2(e)
    length,
    chunks,
    heads: tl.constexpr,
    dt_pitch,
    dt_stride: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Steps behind the end of the sequence have delta 0, which changes no state."""
    program = tl.cast(tl.program_id(0), tl.int64)
    first, i, there = chunk_steps(tl.program_id(0) % chunks, length, REVERSE, Q)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = h < heads
    dt += (program // chunks * dt_pitch + first) * dt_stride
    v = tl.load(dt + (i * dt_stride)[:, None] + h[None, :], there[:, None] & inside[None, :], 0.0).to(tl.float32)
    if dt_bias is not None:
        v += tl.load(dt_bias + h, inside, 0.0).to(tl.float32)[None, :]
    delta = tl.where(there[:, None], softplus(v) if SOFTPLUS else v, 0.0)
    exponent = tl.maximum(delta * tl.load(A + h, inside, 0.0).to(tl.float32)[None, :], FORGOTTEN) * LOG2E
    at = program * heads * Q + h[None, :] * Q + tl.arange(0, Q)[:, None]
    tl.store(deltas + at, delta, inside[None, :])
    tl.store(sums + at, tl.cumsum(exponent, 0), inside[None, :])


@triton.jit
def narrow(t, DTYPE: tl.constexpr):
    """t in x's dtype. fp16 saturates: a huge step has an input of 0, and infinity times 0 is no number."""
    if tl.float16 == DTYPE:
        t = tl.clamp(t, -65504.0, 65504.0)
    return t.to(DTYPE)


@triton.jit
def load_steps(deltas, sums, b, c, h, chunks, heads, Q: tl.constexpr):
    """(delta, sum of the exponents up to each step) of a chunk, and the sum of all its exponents."""
    first = ((b * chunks + c) * heads + h) * Q
    at = first + tl.arange(0, Q)
    return tl.load(deltas + at), tl.load(sums + at), tl.load(sums + first + Q - 1)


@triton.jit
def window_start(
    initial,  # (batch, heads, P, N) or None
    ends,  # (batch, windows, heads, P, N): what each window alone adds
    totals,  # (batch, windows, heads): the sum of a window's exponents
    entry,  # the places of a tile in (P, N), and which are inside
    inside,
    b,
    w,
    h,
    windows,
    heads,
    SIZE: tl.constexpr,  # P N
    GRADIENT: tl.constexpr,
):
    """A tile of the state before window w; with GRADIENT of that behind it, and the windows run from the last."""
    state = tl.zeros(entry.shape, tl.float32)
    if initial is not None:
        state = tl.load(initial + (b * heads + h) * SIZE + entry, inside, 0.0).to(tl.float32)
    for k in range(windows - 1 - w if GRADIENT else w):
        v = (b * windows + (windows - 1 - k if GRADIENT else k)) * heads + h
        state = state * tl.exp2(tl.load(totals + v)) + tl.load(ends + v * SIZE + entry, inside, 0.0)
    return state


@triton.jit(do_not_specialize=VARIABLE)
def _states(
    x,  # (batch, length, heads, P); the gradient of y if GRADIENT
    B,  # (batch, length, groups, N); C if GRADIENT
    deltas,  # (batch, chunks, heads, Q), see `_steps`
    sums,
    initial,  # (batch, heads, P, N) or None, read if SAVE
    ends,  # (batch, windows, heads, P, N), read if SAVE, else written: what each window alone adds to the state
    totals,  # (batch, windows, heads), likewise: the sum of a window's exponents
    states,  # (batch, chunks, heads, P, N), written if SAVE: the state before each chunk
    length,
    chunks,
    windows,
    window,  # chunks of a window
    heads: tl.constexpr,
    group_size: tl.constexpr,
    x_pitch,
    x_stride: tl.constexpr,
    B_pitch,
    B_stride: tl.constexpr,
    SAVE: tl.constexpr,
    GRADIENT: tl.constexpr,  # run from the last chunk to the first
    REVERSE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,  # a power of two, P at least
    BLOCK_N: tl.constexpr,  # states at a time
):
    b, w, h = program_place(windows if SAVE else windows - 1, heads)
    if GRADIENT:
        w += 1  # nothing is before the first window, and else nothing behind the last
    p, n = tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry, inside = p[:, None] * N + n[None, :], (p[:, None] < P) & (n[None, :] < N)
    if SAVE:
        state = window_start(initial, ends, totals, entry, inside, b, w, h, windows, heads, P * N, GRADIENT)
    else:
        state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    first_chunk, stop = w * window, tl.minimum((w + 1) * window, chunks)
    x += h * P
    B += h // group_size * N
    window_total = 0.0
    for k in range(first_chunk, stop):
        c = first_chunk + stop - 1 - k if GRADIENT else k
        first, i, there = chunk_steps(c, length, REVERSE, Q)
        delta, sums_t, total = load_steps(deltas, sums, b, c, h, chunks, heads, Q)
        weight = tl.exp2(sums_t) if GRADIENT else delta * tl.exp2(total - sums_t)
        x_c = x + (b * x_pitch + first) * x_stride
        B_c = B + (b * B_pitch + first) * B_stride
        x_t = tl.load(x_c + (i * x_stride)[:, None] + p[None, :], tile_mask(there, p, P, BLOCK_P), 0.0)
        B_t = tl.load(B_c + (i * B_stride)[:, None] + n[None, :], tile_mask(there, n, N, BLOCK_N), 0.0).to(x_t.dtype)
        if SAVE:
            place = ((b * chunks + c) * heads + h) * P * N
            tl.store(states + place + entry, state.to(states.dtype.element_ty), inside)
        weighted = narrow(B_t.to(tl.float32) * weight[:, None], x_t.dtype)
        state = tl.dot(tl.trans(x_t), weighted, state * tl.exp2(total))
        window_total += total
    if not SAVE:
        place = (b * windows + w) * heads + h
        tl.store(ends + place * P * N + entry, state, inside)
        if tl.program_id(1) == 0:
            tl.store(totals + place, window_total)


class Shape:
    """The sizes of a call, the constants of its kernels, and the launches that find steps and states."""

    def __init__(self, x: Tensor, B: Tensor, chunk_size: int, reverse: bool):
        self.batch, self.length, self.heads, self.head_dim = x.shape
        groups, self.d_state = B.shape[2:]
        large = self.head_dim > 64 or self.d_state > 128
        # A power of two with enough rows for a matrix product. The tiles of a large state leave less shared memory.
        steps = min(32 if large else 64, max(16, 1 << (chunk_size.bit_length() - 1)))
        self.chunks = triton.cdiv(self.length, steps)
        self.sequences = self.batch * self.heads
        windows = min(self.chunks, MOST_WINDOWS, triton.cdiv(PROGRAMS, self.sequences))
        self.window = triton.cdiv(self.chunks, windows)
        self.windows = triton.cdiv(self.chunks, self.window)
        self.programs = self.sequences * self.windows
        self.sizes = {
            "length": self.length,
            "chunks": self.chunks,
            "windows": self.windows,
            "window": self.window,
            "heads": self.heads,
            "group_size": self.heads // groups,
        }
        self.constants: dict[str, Any] = {
            "REVERSE": reverse,
            "P": self.head_dim,
            "N": self.d_state,
            "Q": steps,
            # At least 64: for a product with one operand in registers and fewer columns, ptxas 12.8 reads the address
            # of the other operand from an uninitialised register.
            "BLOCK_P": max(64, triton.next_power_of_2(self.head_dim)),
            "BLOCK_N": 64,
            "num_warps": 8 if large else 4,
        }

    def steps(self, dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
        """(2, batch, chunks, heads, Q) in fp32: delta, and the sum of the exponents of a chunk up to each step."""
        steps = A.new_empty(2, self.batch, self.chunks, self.heads, self.constants["Q"], dtype=torch.float32)
        block = min(16, triton.next_power_of_2(self.heads))
        _steps[(self.batch * self.chunks, triton.cdiv(self.heads, block))](
            dt,
            A,
            dt_bias,
            *steps,
            self.length,
            self.chunks,
            self.heads,
            **row_arguments(dt=dt),
            REVERSE=self.constants["REVERSE"],
            SOFTPLUS=dt_softplus,
            Q=self.constants["Q"],
            HEADS=block,
            num_warps=4,
        )
        return steps

    def ends(self, x: Tensor, B: Tensor, steps: Tensor, *, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """What each window alone adds to the state (batch, windows, heads, head_dim, d_state), and the sum of its
        exponents (batch, windows, heads); both empty if there is one.

        With `gradient`, of dy and C in place of x and B: the gradients of the states, from the last chunk to the first.
        """
        rows = self.batch, self.windows if self.windows > 1 else 0, self.heads
        ends, totals = steps.new_empty(*rows, self.head_dim * self.d_state), steps.new_empty(rows)
        if self.windows > 1:
            self._states(x, B, steps, None, ends, totals, None, gradient=gradient)
        return ends, totals

    def states(self, x: Tensor, B: Tensor, steps: Tensor, initial: Tensor | None) -> Tensor:
        """The state before each chunk (batch, chunks, heads, head_dim, d_state), in x's dtype, as products take it."""
        states = x.new_empty(self.batch, self.chunks, self.heads, self.head_dim * self.d_state)
        self._states(x, B, steps, initial, *self.ends(x, B, steps), states)
        return states

    def _states(
        self,
        x: Tensor,
        B: Tensor,
        steps: Tensor,
        initial: Tensor | None,
        ends: Tensor,
        totals: Tensor,
        states: Tensor | None,
        gradient: bool = False,
    ) -> None:
        windows = self.windows - (states is None)
        _states[(self.sequences * windows, triton.cdiv(self.d_state, self.constants["BLOCK_N"]))](
            x,
            B,
            *steps,
            initial,
            ends,
            totals,
            states,
            **self.sizes,
            **row_arguments(x=x, B=B),
            SAVE=states is not None,
            GRADIENT=gradient,
            **self.constants,
            num_stages=1,
        )


def chunk_rows(t: Tensor) -> Tensor:
    """`as_rows`, with rows close enough for the 32-bit offsets of a chunk."""
    return as_rows(t if t.stride(1) <= 2**25 else t.contiguous())
