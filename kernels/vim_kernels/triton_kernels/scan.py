# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""Backend `triton` of the scan: channel-last, both directions in one launch, no atomics, bit-identical between runs.

This file has the forward pass; `tiles` defines the layout of a warp's states. A program runs both directions of
its channels, one in each of its two warps. They meet in the middle of the sequence. Up to there each warp writes its y
as a partial sum; from there on each reads the other's part, adds, gates and stores. One barrier in the middle orders
the two, and no second kernel has to read the parts back from memory.

The main loop is pipelined by hand. While it runs the recurrence over a block of T steps, the inputs of the next blocks
are loaded into registers. Delta of the next block is computed next to the recurrence, whose chain of dependent steps
leaves room for it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..directions import Direction, ScanOutput
from ..rows import agreeing, as_rows, columns, cut_bytes, on_device_of, row_arguments, sizes
from .activations import LOG2E
from .scan_backward import backward
from .scan_windows import in_gluon, window_length, window_starts
from .tiles import (
    Tile,
    advance,
    along,
    both,
    checkpoint_rows,
    fold,
    from_lane,
    heading,
    load_begins,
    load_channels,
    load_rows,
    load_states,
    load_steps,
    row_from_lane,
    scaled,
    spread_of_fours,
    step_sizes,
    store_states,
    store_words,
    unless,
    unpack_all,
)

__all__ = ["backward", "checkpoint_rows", "forward"]


@triton.jit(
    do_not_specialize=["batch", "length", "window", "started", "u_pitch", "dt_pitch", "B_pitch", "C_pitch", "z_pitch"]
)
def _forward_kernel(
    u,  # (B, L, E), one per direction, as all up to dt_bias
    dt,  # (B, L, E)
    A,  # (E, N)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    D,  # (E,) or None
    dt_bias,  # (E,) or None
    starts,  # (windows, directions, B, E, N), read if started: the state before each window, else zero
    z,  # (B, L, E) or None: the gate
    cuts,  # (B, L + 1) or None: whether packed sequences change before a step
    y,  # (B, L, E)
    y_sum,  # (B, L, E) or None
    last_state,  # (directions, B, E, N)
    checkpoints,  # (directions, B, rows, E, N) or None
    batch,
    length,
    window,  # steps per window; see scan_windows
    started,
    d_inner,
    group_size,  # E / G
    # The rows (b, t) of a tensor are `stride` elements apart, its batch entries `pitch` rows apart.
    u_pitch,
    u_stride,
    dt_pitch,
    dt_stride,
    B_pitch,
    B_stride,
    C_pitch,
    C_stride,
    z_pitch,
    z_stride,
    REVERSE: tl.constexpr,  # per direction; the second of two is the reverse one
    SCALE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    REPEAT: tl.constexpr,
    SPREAD: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    U_PACK: tl.constexpr,
    DT_PACK: tl.constexpr,
    B_PACK: tl.constexpr,
    C_PACK: tl.constexpr,
    Z_PACK: tl.constexpr,
    Y_PACK: tl.constexpr,
):
    DIRECTIONS: tl.constexpr = len(REVERSE)
    TILES: tl.constexpr = (N + SPREAD - 1) // SPREAD
    EACH: tl.constexpr = SPREAD if SPREAD < T else T  # steps per tile of steps
    S: tl.constexpr = last_state.dtype.element_ty
    U: tl.constexpr = u[0].dtype.element_ty
    DT: tl.constexpr = dt[0].dtype.element_ty
    BT: tl.constexpr = B[0].dtype.element_ty
    CT: tl.constexpr = C[0].dtype.element_ty
    pid = tl.program_id(0)
    blocks = tl.cdiv(group_size, REPEAT * LANES)
    group = pid // blocks % GROUPS
    b = (pid // (blocks * GROUPS) % batch).to(tl.int64)
    at_window = pid // (blocks * GROUPS) // batch
    base = at_window * window
    here = tl.minimum(window, length - base)

    t = tl.arange(0, SPREAD * LANES)[:, None]
    p = t % SPREAD
    lane = t // SPREAD
    dirs = tl.arange(0, DIRECTIONS)[None, :]
    c = pid % blocks * (REPEAT * LANES) + lane * REPEAT
    channel = group * group_size + c
    inside, bias, skip = load_channels(c, channel, group_size, dt_bias, D, dirs, REPEAT, S)
    A_tiles = scaled(load_states(along(A, dirs) + channel * N, N, inside, N, REPEAT, SPREAD, S), LOG2E)
    state = (b * d_inner + channel) * N
    row = (at_window.to(tl.int64) * DIRECTIONS + dirs) * batch * d_inner * N
    h = load_states(starts + row + state, N, both(inside, started > 0), N, REPEAT, SPREAD, S)

    first, sign = heading(dirs, here, REVERSE)
    first += base
    u_step = (sign * u_stride).to(tl.int64)
    dt_step = (sign * dt_stride).to(tl.int64)
    B_step = (sign * B_stride).to(tl.int64)
    C_step = (sign * C_stride).to(tl.int64)
    y_step = (sign * d_inner).to(tl.int64)
    u_0 = along(u, dirs) + ((b * u_pitch + first) * u_stride + channel) + p * u_step
    dt_0 = along(dt, dirs) + ((b * dt_pitch + first) * dt_stride + channel) + p * dt_step
    B_0 = along(B, dirs) + ((b * B_pitch + first) * B_stride + group * N + p * TILES) + lane * B_step
    C_0 = along(C, dirs) + ((b * C_pitch + first) * C_stride + group * N + p * TILES) + lane * C_step
    at_0 = (b * length + first) * d_inner + channel + p * y_step
    if z is not None:
        z_step = (sign * z_stride).to(tl.int64)
        z_0 = z + ((b * z_pitch + first) * z_stride + channel) + p * z_step
    if cuts is not None:
        cuts_0 = cuts + (b * (length + 1) + first + (sign < 0)) + p * sign
    half = tl.cdiv(here, DIRECTIONS)

    for segment in range(DIRECTIONS):
        final = segment == DIRECTIONS - 1
        # At odd lengths the forward direction reaches the middle step first, and the reverse one finishes it.
        middle = (here + 1 - dirs) // 2
        step = segment * middle
        end = tl.where(final, here, middle)
        u_p, dt_p, B_p, C_p = u_0 + step * u_step, dt_0 + step * dt_step, B_0 + step * B_step, C_0 + step * C_step
        at = at_0 + step * y_step

        us = load_steps(u_p, u_step, step, end, p, inside, T, REPEAT, SPREAD, U_PACK)
        dts = load_steps(dt_p, dt_step, step, end, p, inside, T, REPEAT, SPREAD, DT_PACK)
        us_now, deltas = step_sizes(us, dts, bias, step, end, p, SOFTPLUS, T, REPEAT, SPREAD, U_PACK, DT_PACK, U, DT, S)
        if z is not None:
            z_p = z_0 + step * z_step

        for start in tl.range(0, half, T, num_stages=STAGES):
            if checkpoints is not None:  # noqa: SIM102 (Triton skips a block only for a separate `None` test)
                if start % K == 0:
                    rows = DIRECTIONS * tl.cdiv(tl.cdiv(length, DIRECTIONS), K)
                    row = (dirs.to(tl.int64) * batch + b) * rows + base // K + segment * tl.cdiv(half, K) + start // K
                    store_states(checkpoints + (row * d_inner + channel) * N, N, h, inside, N, REPEAT, SPREAD)
            u_p += T * u_step
            dt_p += T * dt_step
            us = load_steps(u_p, u_step, step + T, end, p, inside, T, REPEAT, SPREAD, U_PACK)
            dts = load_steps(dt_p, dt_step, step + T, end, p, inside, T, REPEAT, SPREAD, DT_PACK)
            Bs = load_rows(B_p, B_step, step, end, lane, p, N, T, SPREAD, LANES, B_PACK)
            Cs = load_rows(C_p, C_step, step, end, lane, p, N, T, SPREAD, LANES, C_PACK)
            if cuts is not None:
                begins = load_begins(cuts_0 + step * sign, sign, step, end, p, T, SPREAD)
            B_rows = unpack_all(Bs, TILES, B_PACK, BT, S)
            C_rows = unpack_all(Cs, TILES, C_PACK, CT, S)
            # Before the middle the other direction's part does not exist yet, and the gate is not needed.
            end_of_y = tl.where(final, end, step)
            if z is not None:
                zs = load_steps(z_p, z_step, step, end_of_y, p, inside, T, REPEAT, SPREAD, Z_PACK)
                z_values = unpack_all(zs, REPEAT, Z_PACK, z.dtype.element_ty, S)
                z_p += T * z_step
            if DIRECTIONS == 2:
                parts = load_steps(y + at, y_step, step, end_of_y, p, inside, T, REPEAT, SPREAD, Y_PACK)
                part_values = unpack_all(parts, REPEAT, Y_PACK, y.dtype.element_ty, S)
            us_next, deltas_next = step_sizes(
                us, dts, bias, step + T, end, p, SOFTPLUS, T, REPEAT, SPREAD, U_PACK, DT_PACK, U, DT, S
            )

            for j in tl.static_range(T // EACH):
                sums = ()
                for q in tl.static_range(EACH):
                    B_q = row_from_lane(B_rows, j * EACH + q, p, TILES, SPREAD, LANES)
                    C_q = row_from_lane(C_rows, j * EACH + q, p, TILES, SPREAD, LANES)
                    if cuts is not None:
                        h = unless(from_lane(begins[j], t - p + q), h)
                    h, y_q = advance(h, j * EACH + q, us_now, deltas, A_tiles, B_q, C_q, t, p, REPEAT, TILES, EACH)
                    sums = sums + y_q
                valid = (p < EACH) & (step + j * EACH + p < end)
                ys = ()
                for r in tl.static_range(REPEAT):
                    steps = ()
                    for q in tl.static_range(EACH):
                        steps = steps + (sums[q * REPEAT + r],)
                    y_t = fold(steps, t, SPREAD, 1)[0]
                    if D is not None:
                        y_t += skip[r] * us_now[j * REPEAT + r]
                    if DIRECTIONS == 2:
                        y_t += part_values[j * REPEAT + r]
                    ys = ys + (y_t,)
                if final:
                    gated = ()
                    for r in tl.static_range(REPEAT):
                        y_t = ys[r] * SCALE
                        if z is not None:
                            z_t = z_values[j * REPEAT + r]
                            y_t = y_t * z_t / (1 + tl.exp2(-z_t * LOG2E))
                        gated = gated + (y_t,)
                    if y_sum is not None:
                        store_words(y_sum + at + j * EACH * y_step, ys, both(inside, valid), Y_PACK)
                    ys = gated
                store_words(y + at + j * EACH * y_step, ys, both(inside, valid), Y_PACK)
            us_now, deltas = us_next, deltas_next
            B_p += T * B_step
            C_p += T * C_step
            at += T * y_step
            step += T
        tl.debug_barrier()  # the other warp's partial sums
    last = tl.where(sign > 0, base + here, length - base) == length
    last_state += dirs.to(tl.int64) * batch * d_inner * N
    store_states(last_state + state, N, h, both(inside, last), N, REPEAT, SPREAD)


def _tile(d: Direction) -> Tile:
    """A function of shapes and dtypes, not of run-time measurements, so that a call gives the same bits everywhere.

    The length has no part in it, so a new image size compiles nothing.
    """
    spread = spread_of_fours(d.A.shape[1])
    if d.A.dtype != torch.float32 or spread > 4:
        return Tile(2 if d.A.dtype == torch.float32 and spread <= 8 else 1, min(32, 2 * spread), 8)
    return Tile(4, spread, 4)


def forward(
    directions: Sequence[Direction], z: Tensor | None, *, dt_softplus: bool, scale: float, save: bool
) -> ScanOutput:
    """See `directions`."""
    dtype = directions[0].u.dtype
    directions = agreeing(directions)
    d, count = directions[0], len(directions)
    batch, length, _ = d.u.shape
    z = None if z is None else as_rows(z)
    y = d.u.new_empty(d.u.shape, dtype=dtype)
    y_sum = d.u.new_empty(d.u.shape, dtype=dtype) if save and z is not None else None
    last_state = d.A.new_empty(count, batch, *d.A.shape)
    checkpoints = d.A.new_empty(count, batch, checkpoint_rows(length, count), *d.A.shape) if save else None
    window = window_length(d, count)
    windows = triton.cdiv(length, window)
    tile = _tile(d)
    # Only single directions have an initial state.
    initial = None if d.initial_state is None else d.initial_state.unsqueeze(0)
    with on_device_of(d.u):
        starts = window_starts(directions, window, dt_softplus=dt_softplus, start=initial)
        gluon = in_gluon(directions, z, windows)
        if gluon is not None:
            outputs = y, y_sum, last_state, checkpoints, None
            gluon.launch(directions, z, starts, outputs, window, dt_softplus=dt_softplus, scale=scale)
        else:
            _forward_kernel[(tile.programs(d) * windows,)](
                *columns(directions)[:-1],
                last_state if starts is None else starts,
                z,
                cut_bytes(d),
                y,
                y_sum,
                last_state,
                checkpoints,
                **sizes(d),
                window=window,
                started=int(starts is not None),
                **row_arguments(u=d.u, dt=d.dt, B=d.B, C=d.C, z=z),
                SCALE=scale,
                SOFTPLUS=dt_softplus,
                STAGES=3,
                **tile.constants(directions),
                Z_PACK=1 if z is None else tile.pack(d, z),
                Y_PACK=tile.pack(d, y),
                num_warps=count,
                num_stages=1,
                maxnreg=168 if tile.REPEAT == 4 else None,
            )
    none = d.A.new_empty(0)
    return ScanOutput(
        y,
        last_state,
        none if checkpoints is None else checkpoints,
        y.new_empty(0) if y_sum is None else y_sum,
    )
