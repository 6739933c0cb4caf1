# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""Backend `triton` of `ssd`: the backward pass, along the chunks of a window from the last; see `ssd`.

`_gradients` reads the states before the chunks and has the gradient of the state in registers. Pairs of steps are
transposed: row k, column q is the effect of step k on the output of step q, as most products take them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import contiguous, on_device_of, row_arguments
from .activations import sigmoid
from .ssd_states import (
    FORGOTTEN,
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


@triton.jit(do_not_specialize=VARIABLE)
def _gradients(
    x,  # (batch, length, heads, P)
    B,  # (batch, length, groups, N)
    C,  # (batch, length, groups, N)
    D,  # (heads,)
    dy,  # (batch, length, heads, P)
    deltas,  # (batch, chunks, heads, Q), see `_steps`
    sums,
    states,  # (batch, chunks, heads, P, N), before each chunk
    d_last,  # (batch, heads, P, N) or None: the gradient of the last state
    d_ends,  # (batch, windows, heads, P, N): what each window alone adds to the gradient of the state
    totals,  # (batch, windows, heads): the sum of a window's exponents
    dx,  # (batch, length, heads, P), written, as all below
    dB,  # (batch, length, heads, N): each head's part
    dC,  # (batch, length, heads, N)
    parts,  # (batch, chunks, heads, 5 Q + BLOCK_P): sums that `_step_gradients` turns into ddt, dA and dD
    d_initial,  # (batch, heads, P, N) or None
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
    dy_pitch,
    dy_stride: tl.constexpr,
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
        tiles = tiles + (window_start(d_last, d_ends, totals, entry, inside, b, w, h, windows, heads, P * N, True),)
    x += h * P
    dy += h * P
    dx += h * P
    B += h // group_size * N
    C += h // group_size * N
    dB += h * N
    dC += h * N
    first_chunk, stop = w * window, tl.minimum((w + 1) * window, chunks)
    for step in range(first_chunk, stop):
        c = tl.maximum(first_chunk + stop - 1 - step, 0)  # the maximum as in `_outputs`
        first, i, there = chunk_steps(c, length, REVERSE, Q)
        delta, sums_t, total = load_steps(deltas, sums, b, c, h, chunks, heads, Q)
        to_end, from_start = tl.exp2(total - sums_t), tl.exp2(sums_t)
        x_c = x + (b * x_pitch + first) * x_stride
        dy_c = dy + (b * dy_pitch + first) * dy_stride
        B_c = B + (b * B_pitch + first) * B_stride
        C_c = C + (b * C_pitch + first) * C_stride
        chunk = (b * chunks + c) * heads + h
        row = (b * length + first) * heads
        sums_c = parts + chunk * (5 * Q + BLOCK_P)
        x_inside = tile_mask(there, p, P, BLOCK_P)
        x_t = tl.load(x_c + (i * x_stride)[:, None] + p[None, :], x_inside, 0.0)
        dy_t = tl.load(dy_c + (i * dy_stride)[:, None] + p[None, :], x_inside, 0.0).to(x_t.dtype)
        of_start = tl.zeros([BLOCK_P], tl.float32)
        B_tiles = ()
        C_tiles = ()
        entering = ()
        before = ()
        d_after = ()
        for j in tl.static_range((N + BLOCK_N - 1) // BLOCK_N):
            k = j * BLOCK_N + n
            BC_inside, state_inside = tile_mask(there, k, N, BLOCK_N), tile_mask(p < P, k, N, BLOCK_N)
            B_t = tl.load(B_c + (i * B_stride)[:, None] + k[None, :], BC_inside, 0.0).to(x_t.dtype)
            C_t = tl.load(C_c + (i * C_stride)[:, None] + k[None, :], BC_inside, 0.0).to(x_t.dtype)
            before_t = tl.load(states + chunk * P * N + p[:, None] * N + k[None, :], state_inside, 0.0)
            of_start += tl.sum(before_t.to(tl.float32) * tiles[j], 1)
            B_tiles = B_tiles + (B_t,)
            C_tiles = C_tiles + (C_t,)
            entering = entering + (narrow(C_t.to(tl.float32) * from_start[:, None], x_t.dtype),)
            before = before + (before_t,)
            d_after = d_after + (tiles[j].to(x_t.dtype),)
        scores = tl.zeros([Q, Q], tl.float32)
        for j in tl.static_range((N + BLOCK_N - 1) // BLOCK_N):
            scores = tl.dot(B_tiles[j], tl.trans(C_tiles[j]), scores)
        tl.store(sums_c + 5 * Q + p, of_start)

        # Both sums are over the same numbers, so a step's effect on itself, which has no decay, cancels.
        products = tl.dot(x_t, tl.trans(dy_t))
        # The share of step k's input that remains after step q; 0 if k comes after q.
        decays = tl.exp2(tl.where(c + q[:, None] <= c + q[None, :], sums_t[None, :] - sums_t[:, None], float("-inf")))
        weights = (scores * decays).to(x_t.dtype)
        if D is not None:
            of_D = tl.sum(tl.where(q[:, None] == q[None, :], products, 0.0), 1)
        else:
            of_D = tl.zeros([Q], tl.float32)
        d_scores = products * decays
        of_pairs = d_scores * scores
        within = tl.sum(of_pairs, 1)
        tl.store(sums_c + 4 * Q + q, tl.sum(of_pairs * delta[:, None], 0))
        d_scores = narrow(d_scores * delta[:, None], x_t.dtype)

        # d_added: the gradient of delta x of each step; first its part through the state after the chunk.
        d_added = tl.zeros([Q, BLOCK_P], tl.float32)
        for j in tl.static_range((N + BLOCK_N - 1) // BLOCK_N):
            d_added = tl.dot(B_tiles[j], tl.trans(d_after[j]), d_added)
        d_added *= to_end[:, None]
        to_states = tl.sum(d_added * x_t.to(tl.float32), 1)
        d_added = tl.dot(weights, dy_t, d_added)
        dx_t = d_added * delta[:, None]
        if D is not None:
            dx_t += tl.load(D + h).to(tl.float32) * dy_t.to(tl.float32)
        tl.store(dx + row * P + (i * heads * P)[:, None] + p[None, :], dx_t.to(x_t.dtype), x_inside)
        of_outputs = tl.zeros([Q, BLOCK_P], tl.float32)
        for j in tl.static_range((N + BLOCK_N - 1) // BLOCK_N):
            of_outputs = tl.dot(C_tiles[j], tl.trans(before[j]), of_outputs)
        of_outputs = tl.sum(of_outputs * dy_t.to(tl.float32), 1) * from_start
        # Together, in one exchange between warps.
        four = tl.reshape(tl.join(tl.join(to_states, of_outputs), tl.join(within, of_D)), [4 * Q])
        tl.store(sums_c + tl.arange(0, 4 * Q), four)

        next_tiles = ()
        for j in tl.static_range((N + BLOCK_N - 1) // BLOCK_N):
            k = j * BLOCK_N + n
            BC_inside = tile_mask(there, k, N, BLOCK_N)
            dB_t = tl.dot(x_t, d_after[j]) * (delta * to_end)[:, None]
            dB_t = tl.dot(d_scores, C_tiles[j], dB_t)
            tl.store(dB + row * N + (i * heads * N)[:, None] + k[None, :], dB_t.to(dB.dtype.element_ty), BC_inside)
            dC_t = tl.dot(dy_t, before[j]) * from_start[:, None]
            dC_t = tl.dot(tl.trans(d_scores), B_tiles[j], dC_t)
            tl.store(dC + row * N + (i * heads * N)[:, None] + k[None, :], dC_t.to(dC.dtype.element_ty), BC_inside)
            next_tiles = next_tiles + (tl.dot(tl.trans(dy_t), entering[j], tiles[j] * tl.exp2(total)),)
        tiles = next_tiles
    if d_initial is not None:
        for j in tl.static_range((N + BLOCK_N - 1) // BLOCK_N):
            k = j * BLOCK_N + n
            entry, inside = p[:, None] * N + k[None, :], (p[:, None] < P) & (k[None, :] < N)
            tl.store(d_initial + (b * heads + h) * P * N + entry, tiles[j], inside & (w == 0))


@triton.jit(do_not_specialize=VARIABLE)
def _step_gradients(
    dt,  # (batch, length, heads)
    A,  # (heads,)
    dt_bias,  # (heads,)
    deltas,  # (batch, chunks, heads, Q), see `_steps`
    sums,
    parts,  # (batch, chunks, heads, 5 Q + BLOCK_P), from `_gradients`
    ddt,  # (batch, length, heads), written, as all below
    dA,  # (batch, chunks, heads): each chunk's part
    dD,  # (batch, chunks, heads)
    d_bias,  # (batch, chunks, heads)
    length,
    chunks,
    heads: tl.constexpr,
    dt_pitch,
    dt_stride: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HEADS: tl.constexpr,
):
    program = tl.cast(tl.program_id(0), tl.int64)
    first, i, there = chunk_steps(tl.program_id(0) % chunks, length, REVERSE, Q)
    b = program // chunks
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    q = tl.arange(0, Q)
    inside = h < heads
    tile = there[None, :] & inside[:, None]
    at = program * heads + h
    delta = tl.load(deltas + (at * Q)[:, None] + q[None, :], tile, 0.0)
    total = tl.load(sums + at * Q + Q - 1, inside, 0.0)
    A_h = tl.load(A + h, inside, 0.0).to(tl.float32)[:, None]
    parts += (at * (5 * Q + BLOCK_P))[:, None]
    rows = parts + 4 * q[None, :]
    # By the end of the chunk a step's input has decayed by the total minus its sum.
    to_states, within = tl.load(rows, tile, 0.0), tl.load(rows + 1, tile, 0.0)
    d_delta = to_states + within
    # Rounded before they are subtracted, which `where` sees to: so a step's effect on itself cancels to the last bit.
    to_states, within = tl.where(tile, delta * to_states, 0.0), tl.where(tile, delta * within, 0.0)
    d_total = tl.sum(to_states, 1)
    # d_sums: the gradient of the sum of the exponents up to each step.
    pairs = tl.load(parts + 4 * Q + q[None, :], tile, 0.0) - within
    d_sums = tl.load(rows + 2, tile, 0.0) + pairs - to_states
    if HAS_D:
        tl.store(dD + at, tl.sum(tl.load(rows + 3, tile, 0.0), 1), inside)
    for start in tl.static_range(0, BLOCK_P, Q):
        d_total += tl.exp2(total) * tl.sum(tl.load(parts + 5 * Q + start + q[None, :], inside[:, None], 0.0), 1)
    # The gradient of a step that forgets everything is rounding error, which a large delta would amplify.
    d_exponent = tl.cumsum(d_sums, 1, reverse=True) + d_total[:, None]
    d_exponent = tl.where(tile & (delta * A_h > FORGOTTEN), d_exponent, 0.0)
    tl.store(dA + at, tl.sum(d_exponent * delta, 1), inside)
    d_delta += d_exponent * A_h
    if SOFTPLUS:
        dt += (b * dt_pitch + first) * dt_stride
        v = tl.load(dt + (i * dt_stride)[None, :] + h[:, None], tile, 0.0).to(tl.float32)
        if dt_bias is not None:
            v += tl.load(dt_bias + h, inside, 0.0).to(tl.float32)[:, None]
        d_delta *= sigmoid(v)
    tl.store(ddt + (b * length + first) * heads + (i * heads)[None, :] + h[:, None], d_delta, tile)
    if dt_bias is not None:
        tl.store(d_bias + at, tl.sum(d_delta, 1), inside)


@triton.jit
def _sum_over_rows(
    parts,  # (rows, heads)
    out,  # (heads,), written
    rows,
    heads,
    h,
    ROWS: tl.constexpr,
):
    r = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, h.shape[0]], tl.float32)
    for start in range(0, rows, ROWS):
        inside = (start + r < rows)[:, None] & (h < heads)[None, :]
        total += tl.load(parts + ((start + r) * heads)[:, None] + h[None, :], inside, 0.0)
    tl.store(out + h, tl.sum(total, 0), h < heads)


@triton.jit(do_not_specialize=["rows", "chunks"])
def _sums(
    step_parts,  # (2, rows, group_size, N): each head's part of dB and dC
    chunk_parts,  # (3, chunks, heads): each chunk's part of dA, dD and d_bias
    dB,  # (rows, N), written, as all below
    dC,
    dA,  # (heads,)
    dD,  # (heads,) or None
    d_bias,  # (heads,) or None
    rows,  # steps and groups of all batch entries
    chunks,  # of all batch entries
    heads: tl.constexpr,
    group_size: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    which = tl.program_id(1)
    if which < 2:
        r, n = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_N)[None, :]
        inside = (r < rows) & (n < N)
        first = step_parts + (which * rows + r) * group_size * N + n
        total = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for head in range(group_size):
            total += tl.load(first + head * N, inside, 0.0).to(tl.float32)
        if which == 0:
            tl.store(dB + r * N + n, total, inside)
        else:
            tl.store(dC + r * N + n, total, inside)
    elif tl.program_id(0) * HEADS < heads:
        h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
        _sum_over_rows(chunk_parts, dA, chunks, heads, h, 4 * ROWS)
        if dD is not None:
            _sum_over_rows(chunk_parts + chunks * heads, dD, chunks, heads, h, 4 * ROWS)
        if d_bias is not None:
            _sum_over_rows(chunk_parts + 2 * chunks * heads, d_bias, chunks, heads, h, 4 * ROWS)


def backward(
    dy: Tensor | None,
    d_last_state: Tensor | None,
    inputs: Sequence[Tensor],
    *,
    dt_softplus: bool,
    chunk_size: int,
    reverse: bool,
) -> list[Tensor | None]:
    """Gradients of the inputs, x, dt, A, B, C, D, dt_bias and initial_state, each in its tensor's dtype."""
    shape = Shape(inputs[0], inputs[3], chunk_size, reverse)
    x, dt, B, C = (chunk_rows(inputs[i]) for i in (0, 1, 3, 4))
    A, (D, dt_bias, initial_state) = inputs[2].contiguous(), map(contiguous, inputs[5:])
    dy, d_last_state = torch.zeros_like(x) if dy is None else chunk_rows(dy), contiguous(d_last_state)
    gradients: list[Tensor | None] = [None if t is None else t.new_empty(t.shape) for t in inputs]
    dx, ddt, dA, dB, dC, dD, d_bias, d_initial_state = gradients
    # In bf16 rounding the parts loses no more than rounding their sum.
    low = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    step_parts = x.new_empty(2, *dt.shape, shape.d_state, dtype=low)
    chunk_parts = x.new_empty(3, shape.batch, shape.chunks, shape.heads, dtype=torch.float32)
    width = 5 * shape.constants["Q"] + shape.constants["BLOCK_P"]
    parts = x.new_empty(shape.batch, shape.chunks, shape.heads, width, dtype=torch.float32)
    with on_device_of(x):
        steps = shape.steps(dt, A, dt_bias, dt_softplus)
        states = shape.states(x, B, steps, initial_state)
        d_ends, totals = shape.ends(dy, C, steps, gradient=True)
        _gradients[(shape.programs,)](
            x,
            B,
            C,
            D,
            dy,
            *steps,
            states,
            d_last_state,
            d_ends,
            totals,
            dx,
            *step_parts,
            parts,
            d_initial_state,
            **shape.sizes,
            **row_arguments(x=x, B=B, C=C, dy=dy),
            **shape.constants,
            # Loading a chunk ahead is 8 % faster, if shared memory has room for it.
            num_stages=2 if max(shape.head_dim, shape.d_state) <= 64 else 1,
        )
        heads = min(16, triton.next_power_of_2(shape.heads))
        _step_gradients[(shape.batch * shape.chunks, triton.cdiv(shape.heads, heads))](
            dt,
            A,
            dt_bias,
            *steps,
            parts,
            ddt,
            *chunk_parts,
            shape.length,
            shape.chunks,
            shape.heads,
            **row_arguments(dt=dt),
            REVERSE=reverse,
            SOFTPLUS=dt_softplus,
            HAS_D=D is not None,
            Q=shape.constants["Q"],
            BLOCK_P=shape.constants["BLOCK_P"],
            HEADS=heads,
            num_warps=4,
        )
        rows, tall, wide = B.numel() // shape.d_state, 32, 16
        _sums[(max(triton.cdiv(rows, tall), triton.cdiv(shape.heads, wide)), 3)](
            step_parts,
            chunk_parts,
            dB,
            dC,
            dA,
            dD,
            d_bias,
            rows,
            shape.batch * shape.chunks,
            shape.heads,
            shape.sizes["group_size"],
            N=shape.d_state,
            BLOCK_N=triton.next_power_of_2(shape.d_state),
            ROWS=tall,
            HEADS=wide,
            num_warps=4,
        )
    return gradients
