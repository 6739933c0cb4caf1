# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""Backend `triton` of `ssd`, for x in half precision:

    _steps        step sizes, and sums of the exponents within each chunk       all chunks in parallel
    _states       what each window adds to the state                            if there are several windows
    _outputs      y, along the chunks of a window                               all windows in parallel

The backward (`ssd_backward`) adds

    _states           the state before each chunk, along a window
    _gradients        of x, B and C, along the chunks of a window from the last
    _step_gradients   of the step sizes, from sums that `_gradients` writes       all chunks in parallel
    _sums             of the parts of dB and dC by head, of dA, dD and the gradient of the bias by chunk

Only the inputs are saved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import contiguous, on_device_of, row_arguments
from .ssd_backward import backward
from .ssd_states import (
    VARIABLE,
    Shape,
    chunk_rows,
    chunk_steps,
    load_steps,
    narrow,
    program_place,
    tile_mask,
    window_start,
)

__all__ = ["backward", "forward"]


@triton.jit(do_not_specialize=VARIABLE)
def _outputs(
    x,  # (batch, length, heads, P)
    B,  # (batch, length, groups, N)
    C,  # (batch, length, groups, N)
    D,  # (heads,)
    deltas,  # (batch, chunks, heads, Q), see `_steps`
    sums,
    initial,  # (batch, heads, P, N) or None
    ends,  # (batch, windows, heads, P, N): what each window alone adds to the state
    totals,  # (batch, windows, heads): the sum of a window's exponents
    y,  # (batch, length, heads, P), written
    last,  # (batch, heads, P, N) or None, written: the state after the last step
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
    C_pitch,
    C_stride: tl.constexpr,
    REVERSE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,  # a power of two, P at least
    BLOCK_N: tl.constexpr,  # states of a tile
):
    b, w, h = program_place(windows, heads)
    p, n, q = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, Q)
    tiles = ()
    for j in tl.static_range((N + BLOCK_N - 1) // BLOCK_N):
        k = j * BLOCK_N + n
        entry, inside = p[:, None] * N + k[None, :], (p[:, None] < P) & (k[None, :] < N)
        tiles = tiles + (window_start(initial, ends, totals, entry, inside, b, w, h, windows, heads, P * N, False),)
    x += h * P
    B += h // group_size * N
    C += h // group_size * N
    y += h * P
    for step in range(w * window, tl.minimum((w + 1) * window, chunks)):
        c = tl.minimum(step, chunks - 1)  # the step, hidden: LLVM would keep an address in registers for each load
        first, i, there = chunk_steps(c, length, REVERSE, Q)
        delta, sums_t, total = load_steps(deltas, sums, b, c, h, chunks, heads, Q)
        x_c = x + (b * x_pitch + first) * x_stride
        B_c = B + (b * B_pitch + first) * B_stride
        C_c = C + (b * C_pitch + first) * C_stride
        y_c = y + (b * length + first) * heads * P
        x_inside = tile_mask(there, p, P, BLOCK_P)
        x_t = tl.load(x_c + (i * x_stride)[:, None] + p[None, :], x_inside, 0.0)
        # First all that goes to shared memory, then the products, with few barriers between. Scales apply to the second
        # operand of a product: the first would move to registers.
        to_end = delta * tl.exp2(total - sums_t)
        B_tiles = ()
        C_tiles = ()
        before = ()
        staying = ()
        for j in tl.static_range((N + BLOCK_N - 1) // BLOCK_N):
            k = j * BLOCK_N + n
            BC_inside = tile_mask(there, k, N, BLOCK_N)
            B_t = tl.load(B_c + (i * B_stride)[:, None] + k[None, :], BC_inside, 0.0).to(x_t.dtype)
            C_t = tl.load(C_c + (i * C_stride)[:, None] + k[None, :], BC_inside, 0.0).to(x_t.dtype)
            B_tiles = B_tiles + (B_t,)
            C_tiles = C_tiles + (C_t,)
            before = before + (tiles[j].to(x_t.dtype),)
            staying = staying + (narrow(B_t.to(tl.float32) * to_end[:, None], x_t.dtype),)
        scores, y_t = tl.zeros([Q, Q], tl.float32), tl.zeros([Q, BLOCK_P], tl.float32)
        next_tiles = ()
        for j in tl.static_range((N + BLOCK_N - 1) // BLOCK_N):
            scores = tl.dot(C_tiles[j], tl.trans(B_tiles[j]), scores)
            y_t = tl.dot(C_tiles[j], tl.trans(before[j]), y_t)
            next_tiles = next_tiles + (tl.dot(tl.trans(x_t), staying[j], tiles[j] * tl.exp2(total)),)
        tiles = next_tiles
        # The share of step k's input that remains after step q; 0 if k comes after q. With c the mask is of this chunk;
        # without, it would stay in registers.
        decays = tl.exp2(tl.where(c + q[:, None] >= c + q[None, :], sums_t[:, None] - sums_t[None, :], float("-inf")))
        weights = narrow(scores * decays * delta[None, :], x_t.dtype)
        y_t *= tl.exp2(sums_t)[:, None]
        if D is not None:
            y_t += tl.load(D + h).to(tl.float32) * x_t.to(tl.float32)
        y_t = tl.dot(weights, x_t, y_t)
        tl.store(y_c + (i * heads * P)[:, None] + p[None, :], y_t.to(x_t.dtype), x_inside)
    if last is not None:
        for j in tl.static_range((N + BLOCK_N - 1) // BLOCK_N):
            k = j * BLOCK_N + n
            entry, inside = p[:, None] * N + k[None, :], (p[:, None] < P) & (k[None, :] < N)
            tl.store(last + (b * heads + h) * P * N + entry, tiles[j], inside & (w == windows - 1))


def forward(
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
    last: bool,
) -> tuple[Tensor, Tensor]:
    """See `vim_kernels.ssd`: y and the last state, empty unless asked for by `last`."""
    shape = Shape(x, B, chunk_size, reverse)
    x, dt, B, C = (chunk_rows(t) for t in (x, dt, B, C))
    A, (D, dt_bias, initial_state) = A.contiguous(), map(contiguous, (D, dt_bias, initial_state))
    y = x.new_empty(x.shape)
    sizes = (shape.batch, shape.heads, shape.head_dim, shape.d_state) if last else (0,)
    last_state = x.new_empty(sizes, dtype=torch.float32)
    with on_device_of(x):
        steps = shape.steps(dt, A, dt_bias, dt_softplus)
        ends, totals = shape.ends(x, B, steps)
        _outputs[(shape.programs,)](
            x,
            B,
            C,
            D,
            *steps,
            initial_state,
            ends,
            totals,
            y,
            last_state if last else None,
            **shape.sizes,
            **row_arguments(x=x, B=B, C=C),
            **shape.constants,
            num_stages=1,
        )
    return y, last_state
