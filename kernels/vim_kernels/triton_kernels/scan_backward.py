# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"
"""Backend `triton` of the scan: the backward pass; `tiles` defines the layout of a warp's states.

A program takes a window of the sequence (with many rows, the whole sequence). It walks through the chunks whose initial
states the forward saved, the last chunk first:

1. Run forward from the chunk's checkpoint and keep the state before every T-th step in scratch memory.
2. Take the blocks of T steps from last to first: recompute states and decays into registers, then run the adjoint
   g[k] = dy[k] C[k] + decay[k + 1] g[k + 1] backwards through them.

So a state costs two exponentials. Scratch memory is private to a program and reused at once, so it stays in the caches.
There are only as many programs as run at once; they loop over the blocks of channels.

With q = g h' decay, the gradient of the exponent delta A (h' is the state before the step): dC = dy h, dB = g delta u,
du = delta sum_n(g B) + D dy, d(delta) = sum_n(q A) + u sum_n(g B), dA = sum q delta. Each block of channels writes a
partial sum over its channels, and a second kernel adds the blocks in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..directions import Direction, DirectionGrads
from ..rows import agreeing, as_rows, columns, cut_bytes, on_device_of, row_arguments, row_strides, sizes
from .activations import LN2, LOG2E, sigmoid
from .scan_windows import in_gluon, window_length, window_starts
from .tiles import (
    INTERVAL,
    Tile,
    advance,
    along,
    both,
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
    unpack,
    unpack_all,
)
from .tuples import zeros


@triton.jit
def _steps_at(
    base, offset, row_step, step, end, p, mask,
    T: tl.constexpr, REPEAT: tl.constexpr, SPREAD: tl.constexpr, PACK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """`load_steps` from a uniform base address and an offset of type INDEX."""
    ptr = base + (step.to(INDEX) * row_step + offset)
    return load_steps(ptr, row_step, step, end, p, mask, T, REPEAT, SPREAD, PACK)


@triton.jit
def _rows_at(
    base, offset, row_step, step, end, lane, p,
    N: tl.constexpr, T: tl.constexpr, SPREAD: tl.constexpr, LANES: tl.constexpr, PACK: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    ptr = base + (step.to(INDEX) * row_step + offset)
    return load_rows(ptr, row_step, step, end, lane, p, N, T, SPREAD, LANES, PACK)


@triton.jit(do_not_specialize=["rows", "length", "z_pitch", "dy_pitch"])
def _gate_kernel(
    dy,  # (B, L, E)
    z,  # (B, L, E)
    y_sum,  # (B, L, E)
    d_sum,  # (B, L, E): the gradient of y_sum
    dz,  # (B, L, E)
    rows,  # B L
    length,
    d_inner,
    z_pitch,
    z_stride,
    dy_pitch,
    dy_stride,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    S: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (channel < d_inner)
    b = (row // length).to(tl.int64)
    step = row % length
    at = row.to(tl.int64) * d_inner + channel
    dy_t = SCALE * tl.load(dy + (b * dy_pitch + step) * dy_stride + channel, inside, 0.0).to(S)
    z_t = tl.load(z + (b * z_pitch + step) * z_stride + channel, inside, 0.0).to(S)
    y_t = tl.load(y_sum + at, inside, 0.0).to(S)
    gate = sigmoid(z_t)
    tl.store(d_sum + at, dy_t * z_t * gate, inside)
    tl.store(dz + at, dy_t * y_t * gate * (1 + z_t * (1 - gate)), inside)


@triton.jit(
    do_not_specialize=[
        "items",
        "batch",
        "length",
        "window",
        "windows",
        "started",
        "u_pitch",
        "dt_pitch",
        "B_pitch",
        "C_pitch",
        "dy_pitch",
    ]
)
def _backward_kernel(
    u,  # (B, L, E), one per direction, as all up to dt_bias
    dt,  # (B, L, E)
    A,  # (E, N)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    D,  # (E,) or None
    dt_bias,  # (E,) or None
    dy,  # (B, L, E); SCALE * dy is the gradient of the ungated sum
    cuts,  # (B, L + 1) or None: whether packed sequences change before a step
    checkpoints,  # (directions, B, rows, E, N)
    starts,  # (windows, directions, B, E, N), read if started: the adjoint after each window, else zero
    du,  # (B, L, E), one per direction
    ddt,  # (B, L, E), one per direction
    d_channels,  # (directions, windows B, E (N + 2)): dA, then dD, then d(dt_bias)
    dBC,  # (blocks, directions, B, L, G, 2, N)
    d_h0,  # (directions, B, E, N) or None
    scratch,  # (programs, K / T, REPEAT * states per lane, 32)
    items,  # blocks of channels over all batch entries, directions and windows
    batch,
    length,
    window,  # steps per window; see scan_windows
    windows,
    started,
    d_inner,
    group_size,
    u_pitch,
    u_stride,
    dt_pitch,
    dt_stride,
    B_pitch,
    B_stride,
    C_pitch,
    C_stride,
    dy_pitch,
    dy_stride,
    REVERSE: tl.constexpr,
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
    DY_PACK: tl.constexpr,
    DU_PACK: tl.constexpr,
    DDT_PACK: tl.constexpr,
    INDEX: tl.constexpr,  # type of an offset within a window: 64-bit products would be a tenth of all instructions
):
    DIRECTIONS: tl.constexpr = len(REVERSE)
    TILES: tl.constexpr = (N + SPREAD - 1) // SPREAD
    STATES: tl.constexpr = REPEAT * TILES
    EACH: tl.constexpr = SPREAD if SPREAD < T else T
    S: tl.constexpr = checkpoints.dtype.element_ty
    U: tl.constexpr = u[0].dtype.element_ty
    DT: tl.constexpr = dt[0].dtype.element_ty
    BT: tl.constexpr = B[0].dtype.element_ty
    CT: tl.constexpr = C[0].dtype.element_ty
    # fold() wants a power of two: dB and dC of TILES states, each padded with zeros.
    ROOM: tl.constexpr = triton.next_power_of_2(TILES)
    EACH_LANE: tl.constexpr = 2 * ROOM // LANES if 2 * ROOM > LANES else 1
    blocks = tl.cdiv(group_size, REPEAT * LANES)
    rows = DIRECTIONS * tl.cdiv(tl.cdiv(length, DIRECTIONS), K)

    t = tl.arange(0, SPREAD * LANES)[:, None]
    p = t % SPREAD
    lane = t // SPREAD
    slot = scratch + tl.program_id(0).to(tl.int64) * (K // T * STATES * 32) + t

    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        group = item // blocks % GROUPS
        b = (item // (blocks * GROUPS) % batch).to(tl.int64)
        dirs = item // (blocks * GROUPS) // batch % DIRECTIONS
        db = dirs * batch + b
        at_window = item // (blocks * GROUPS) // batch // DIRECTIONS
        base = at_window * window
        here = tl.minimum(window, length - base)
        half = tl.cdiv(here, DIRECTIONS)
        chunks = tl.cdiv(half, K)  # in a segment; see the forward kernel
        first, sign = heading(dirs, here, REVERSE)
        first += base
        middle = (here + 1 - dirs) // 2
        u_step = sign * u_stride
        dt_step = sign * dt_stride
        B_step = sign * B_stride
        C_step = sign * C_stride
        dy_step = sign * dy_stride
        out_step = sign * d_inner
        BC_step = sign * (2 * N * GROUPS)
        c = item % blocks * (REPEAT * LANES) + lane * REPEAT
        channel = group * group_size + c
        inside, bias, skip = load_channels(c, channel, group_size, dt_bias, D, dirs, REPEAT, S)
        A_tiles = scaled(load_states(along(A, dirs) + channel * N, N, inside, N, REPEAT, SPREAD, S), LOG2E)
        sum_A = zeros(STATES, t, S)
        sum_D = zeros(REPEAT, t, S)
        sum_bias = zeros(REPEAT, t, S)
        row = at_window.to(tl.int64) * (DIRECTIONS * batch) + db
        present = both(inside, started > 0)
        g = load_states(starts + (row * d_inner + channel) * N, N, present, N, REPEAT, SPREAD, S)

        # Uniform parts of the addresses first; the parts of a lane below take 32 bits each.
        u_0 = along(u, dirs) + (b * u_pitch + first) * u_stride
        dt_0 = along(dt, dirs) + (b * dt_pitch + first) * dt_stride
        B_0 = along(B, dirs) + ((b * B_pitch + first) * B_stride + group * N)
        C_0 = along(C, dirs) + ((b * C_pitch + first) * C_stride + group * N)
        dy_0 = dy + (b * dy_pitch + first) * dy_stride
        out_0 = (b * length + first) * d_inner
        du_0 = along(du, dirs) + out_0
        ddt_0 = along(ddt, dirs) + out_0
        BC_0 = dBC + ((((item % blocks) * DIRECTIONS * batch + db) * length + first) * GROUPS + group) * (2 * N)
        u_lane = channel + p * u_step
        dt_lane = channel + p * dt_step
        B_lane = p * TILES + lane * B_step
        C_lane = p * TILES + lane * C_step
        dy_lane = channel + p * dy_step
        out_lane = channel + p * out_step
        if cuts is not None:
            cuts_0 = cuts + (b * (length + 1) + first + (sign < 0)) + p * sign

        for chunk_back in range(DIRECTIONS * chunks):
            chunk = DIRECTIONS * chunks - 1 - chunk_back
            segment = chunk // chunks
            begin = segment * middle + chunk % chunks * K
            end = tl.minimum(begin + K, segment * here + (DIRECTIONS - 1 - segment) * middle)
            if DIRECTIONS == 1:
                end = tl.minimum(begin + K, here)
            subs = tl.cdiv(tl.minimum(K, half - chunk % chunks * K), T)

            # 1. Keep the state before each block.
            row = db * rows + base // K + chunk
            h = load_states(checkpoints + (row * d_inner + channel) * N, N, inside, N, REPEAT, SPREAD, S)
            for sub in tl.range(0, subs - 1, num_stages=STAGES):
                step = begin + sub * T
                us = _steps_at(u_0, u_lane, u_step, step, end, p, inside, T, REPEAT, SPREAD, U_PACK, INDEX)
                dts = _steps_at(dt_0, dt_lane, dt_step, step, end, p, inside, T, REPEAT, SPREAD, DT_PACK, INDEX)
                Bs = _rows_at(B_0, B_lane, B_step, step, end, lane, p, N, T, SPREAD, LANES, B_PACK, INDEX)
                if cuts is not None:
                    begins = load_begins(cuts_0 + step * sign, sign, step, end, p, T, SPREAD)
                for i in tl.static_range(STATES):
                    tl.store(slot + (sub * STATES + i) * 32, h[i])
                us_now, deltas = step_sizes(
                    us, dts, bias, step, end, p, SOFTPLUS, T, REPEAT, SPREAD, U_PACK, DT_PACK, U, DT, S
                )
                B_rows = unpack_all(Bs, TILES, B_PACK, BT, S)
                for k in tl.static_range(T):
                    B_k = row_from_lane(B_rows, k, p, TILES, SPREAD, LANES)
                    if cuts is not None:
                        h = unless(from_lane(begins[k // EACH], t - p + k % EACH), h)
                    h, _ = advance(h, k, us_now, deltas, A_tiles, B_k, None, t, p, REPEAT, TILES, EACH)

            for i in tl.static_range(STATES):
                tl.store(slot + ((subs - 1) * STATES + i) * 32, h[i])
            tl.debug_barrier()

            # 2. The adjoint, block by block.
            for sub_back in tl.range(0, subs, num_stages=STAGES):
                sub = subs - 1 - sub_back
                step = begin + sub * T
                us = _steps_at(u_0, u_lane, u_step, step, end, p, inside, T, REPEAT, SPREAD, U_PACK, INDEX)
                dts = _steps_at(dt_0, dt_lane, dt_step, step, end, p, inside, T, REPEAT, SPREAD, DT_PACK, INDEX)
                dys = _steps_at(dy_0, dy_lane, dy_step, step, end, p, inside, T, REPEAT, SPREAD, DY_PACK, INDEX)
                Bs = _rows_at(B_0, B_lane, B_step, step, end, lane, p, N, T, SPREAD, LANES, B_PACK, INDEX)
                Cs = _rows_at(C_0, C_lane, C_step, step, end, lane, p, N, T, SPREAD, LANES, C_PACK, INDEX)
                if cuts is not None:
                    begins = load_begins(cuts_0 + step * sign, sign, step, end, p, T, SPREAD)
                states = ()
                for i in tl.static_range(STATES):
                    states = states + (tl.load(slot + (sub * STATES + i) * 32),)
                us_now, deltas = step_sizes(
                    us, dts, bias, step, end, p, SOFTPLUS, T, REPEAT, SPREAD, U_PACK, DT_PACK, U, DT, S
                )
                slopes = ()  # d(delta) / d(dt)
                dys_now = ()
                for j in tl.static_range(T // EACH):
                    for r in tl.static_range(REPEAT):
                        if SOFTPLUS:
                            slopes = slopes + (sigmoid(unpack(dts[j], r, DT_PACK, DT, S) + bias[r]),)
                        dys_now = dys_now + (SCALE * unpack(dys[j], r, DY_PACK, dy.dtype.element_ty, S),)
                B_rows = unpack_all(Bs, TILES, B_PACK, BT, S)
                C_rows = unpack_all(Cs, TILES, C_PACK, CT, S)

                decays = ()
                xs = ()
                B_all = ()
                for k in tl.static_range(T):
                    B_all = B_all + (row_from_lane(B_rows, k, p, TILES, SPREAD, LANES),)
                    if cuts is not None:
                        begins_k = from_lane(begins[k // EACH], t - p + k % EACH)
                    for r in tl.static_range(REPEAT):
                        delta = deltas[k // EACH * REPEAT + r]
                        delta_k = from_lane(delta, t - p + k % EACH)
                        xs = xs + (from_lane(delta * us_now[k // EACH * REPEAT + r], t - p + k % EACH),)
                        for i in tl.static_range(TILES):
                            decay = tl.exp2(delta_k * A_tiles[r * TILES + i])
                            if cuts is not None:
                                decay = tl.where(begins_k != 0, 0.0, decay)
                            before = states[(k * REPEAT + r) * TILES + i]
                            decays = decays + (decay,)
                            states = states + (decay * before + xs[k * REPEAT + r] * B_all[k][i],)

                sums_gB = ()  # steps from last to first
                sums_qA = ()
                for back in tl.static_range(T):
                    C_k = row_from_lane(C_rows, T - 1 - back, p, TILES, SPREAD, LANES)
                    dy_k = ()
                    gBs = ()
                    qAs = ()
                    for r in tl.static_range(REPEAT):
                        own = dys_now[(T - 1 - back) // EACH * REPEAT + r]
                        dy_k = dy_k + (from_lane(own, t - p + (T - 1 - back) % EACH),)
                        own = deltas[(T - 1 - back) // EACH * REPEAT + r]
                        gBs = gBs + (tl.zeros(own.shape, S),)
                        qAs = qAs + (tl.zeros(own.shape, S),)
                    dBs = ()
                    dCs = ()
                    g_k = ()
                    qs = ()
                    for i in tl.static_range(TILES):
                        dB_i = tl.zeros(g[0].shape, S)
                        dC_i = tl.zeros(g[0].shape, S)
                        gBs_i = ()
                        qAs_i = ()
                        for r in tl.static_range(REPEAT):
                            before = states[(T - 1 - back) * STATES + r * TILES + i]
                            g_i = g[r * TILES + i] + dy_k[r] * C_k[i]
                            dC_i += dy_k[r] * states[(T - back) * STATES + r * TILES + i]
                            dB_i += g_i * xs[(T - 1 - back) * REPEAT + r]
                            gBs_i = gBs_i + (gBs[r] + g_i * B_all[T - 1 - back][i],)
                            g_i *= decays[(T - 1 - back) * STATES + r * TILES + i]
                            qs = qs + (g_i * before,)
                            qAs_i = qAs_i + (qAs[r] + g_i * before * A_tiles[r * TILES + i],)
                            g_k = g_k + (g_i,)
                        gBs = gBs_i
                        qAs = qAs_i
                        dBs = dBs + (dB_i,)
                        dCs = dCs + (dC_i,)
                    g = ()
                    sum_A_k = ()
                    for r in tl.static_range(REPEAT):
                        own = deltas[(T - 1 - back) // EACH * REPEAT + r]
                        delta_k = from_lane(own, t - p + (T - 1 - back) % EACH)
                        for i in tl.static_range(TILES):
                            g = g + (g_k[i * REPEAT + r],)
                            sum_A_k = sum_A_k + (sum_A[r * TILES + i] + qs[i * REPEAT + r] * delta_k,)
                    sum_A = sum_A_k
                    sums_gB = sums_gB + gBs
                    sums_qA = sums_qA + qAs

                    padding = zeros(ROOM - TILES, g[0], S)
                    totals = fold(dBs + padding + dCs + padding, t, 32, SPREAD)
                    step_k = step + (T - 1 - back)
                    for m in tl.static_range(len(totals)):
                        v = lane % (2 * ROOM // EACH_LANE) * EACH_LANE + m
                        i_v = v % ROOM
                        n = p * TILES + i_v
                        valid = (lane < 2 * ROOM // EACH_LANE) & (i_v < TILES) & (n < N) & (step_k < end)
                        tl.store(BC_0 + (step_k.to(INDEX) * BC_step + (v // ROOM) * N + n), totals[m], valid)

                for j in tl.static_range(T // EACH):
                    valid = (p < EACH) & (step + j * EACH + p < end)
                    out = (step + j * EACH).to(INDEX) * out_step + out_lane
                    sum_D_j = ()
                    sum_bias_j = ()
                    dus = ()
                    ddts = ()
                    for r in tl.static_range(REPEAT):
                        gB_steps = ()
                        qA_steps = ()
                        for q in tl.static_range(EACH):
                            gB_steps = gB_steps + (sums_gB[(T - 1 - j * EACH - q) * REPEAT + r],)
                            qA_steps = qA_steps + (sums_qA[(T - 1 - j * EACH - q) * REPEAT + r],)
                        gB_t = fold(gB_steps, t, SPREAD, 1)[0]
                        u_t = us_now[j * REPEAT + r]
                        dy_t = dys_now[j * REPEAT + r]
                        du_t = deltas[j * REPEAT + r] * gB_t
                        ddt_t = LN2 * fold(qA_steps, t, SPREAD, 1)[0] + u_t * gB_t
                        if SOFTPLUS:
                            ddt_t *= slopes[j * REPEAT + r]
                        if D is not None:
                            du_t += skip[r] * dy_t
                            sum_D_j = sum_D_j + (sum_D[r] + tl.where(valid, dy_t * u_t, 0.0),)
                        sum_bias_j = sum_bias_j + (sum_bias[r] + tl.where(valid, ddt_t, 0.0),)
                        dus = dus + (du_t,)
                        ddts = ddts + (ddt_t,)
                    store_words(du_0 + out, dus, both(inside, valid), DU_PACK)
                    store_words(ddt_0 + out, ddts, both(inside, valid), DDT_PACK)
                    if D is not None:
                        sum_D = sum_D_j
                    sum_bias = sum_bias_j

        totals_0 = d_channels + ((dirs * windows + at_window).to(tl.int64) * batch + b) * d_inner * (N + 2)
        store_states(totals_0 + channel * N, N, sum_A, inside, N, REPEAT, SPREAD)
        if d_h0 is not None:
            foremost = tl.where(sign > 0, length - base, base + here) == length
            d_h0_0 = d_h0 + (db * d_inner + channel) * N
            store_states(d_h0_0, N, g, both(inside, foremost), N, REPEAT, SPREAD)
        for r in tl.static_range(REPEAT):
            mine = inside[r] & (p == 0)
            tl.store(totals_0 + N * d_inner + channel + r, fold((sum_D[r],), t, SPREAD, 1)[0], mine)
            tl.store(totals_0 + (N + 1) * d_inner + channel + r, fold((sum_bias[r],), t, SPREAD, 1)[0], mine)


@triton.jit(do_not_specialize=["batch"])
def _channel_sums_kernel(
    d_channels,  # (directions, B, E (N + 2))
    dA,  # (E, N), one per direction, as all below
    dD,  # (E,) or None
    d_bias,  # (E,) or None
    batch,
    d_inner,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over the batch."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    direction = tl.program_id(1)
    columns = d_inner * (N + 2)
    d_channels += direction.to(tl.int64) * batch * columns + column
    total = tl.zeros([ROWS, COLUMNS], d_channels.dtype.element_ty)
    for start in range(0, batch, ROWS):
        total += tl.load(
            d_channels + (start + row).to(tl.int64) * columns, (start + row < batch) & (column < columns), 0.0
        )
    total = tl.sum(total, 0)[None, :]
    tl.store(along(dA, direction) + column, total, column < N * d_inner)
    column -= N * d_inner
    if dD is not None:
        tl.store(along(dD, direction) + column, total, (column >= 0) & (column < d_inner))
    column -= d_inner
    if d_bias is not None:
        tl.store(along(d_bias, direction) + column, total, (column >= 0) & (column < d_inner))


@triton.jit(do_not_specialize=["rows"])
def _row_sums_kernel(
    dBC,  # (blocks, directions, rows, 2, N), where rows = B L G
    dB,  # (rows, N), one per direction
    dC,  # (rows, N), one per direction
    blocks,
    rows,
    N: tl.constexpr,
    N2: tl.constexpr,  # a power of two, at least 2 N
    ROWS: tl.constexpr,
    S: tl.constexpr,
):
    """Sums over the blocks of channels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, N2)[None, :]
    direction = tl.program_id(1)
    inside = (row < rows) & (column < 2 * N)
    total = tl.zeros([ROWS, N2], S)
    for block in range(blocks):
        first = (block * tl.num_programs(1) + direction).to(tl.int64) * rows
        total += tl.load(dBC + (first + row) * (2 * N) + column, inside, 0.0).to(S)
    tl.store(along(dB, direction) + row * N + column, total, inside & (column < N))
    tl.store(along(dC, direction) + row * N + column - N, total, inside & (column >= N))


# Blocks in flight, and steps per block.
STAGES, STEPS = 3, 4
# Programs that a multiprocessor runs at once: more would only need more scratch memory.
PROGRAMS = 16


def _tile(d: Direction) -> Tile:
    """Two channels per lane if registers allow. Like the forward's, a function of shapes and dtypes only."""
    spread = spread_of_fours(d.A.shape[1])
    channels = 2 if d.A.dtype == torch.float32 and spread <= 4 else 1
    return Tile(channels, spread, STEPS)


def backward(
    dy: Tensor,
    d_last_state: Tensor | None,
    directions: Sequence[Direction],
    z: Tensor | None,
    checkpoints: Tensor,
    y_sum: Tensor,
    *,
    dt_softplus: bool,
    scale: float,
) -> tuple[list[DirectionGrads], Tensor | None]:
    """Gradients of each direction and of z: one launch, then the sums over channel blocks (dB, dC) and the batch."""
    given, directions = directions, agreeing(directions)
    d, count = directions[0], len(directions)
    batch, length, d_inner = d.u.shape
    groups, d_state = d.B.shape[2:]
    dy, z = as_rows(dy), None if z is None else as_rows(z)
    tile = _tile(d)
    window = window_length(d, count)
    windows = triton.cdiv(length, window)
    gluon = in_gluon(directions, z, windows, dy)
    du = tuple(each.u.new_empty(each.u.shape) for each in directions)
    ddt = tuple(each.dt.new_empty(each.dt.shape) for each in directions)
    dA, dB, dC, dD, d_bias = (
        None if column is None else tuple(t.new_empty(t.shape) for t in column) for column in columns(directions)[2:7]
    )
    d_channels = d.A.new_empty(count, windows * batch, d_inner * (d_state + 2))
    # In bf16 rounding the parts loses no more than rounding their sum, and halves a tenth of all bytes moved.
    rounded = d.B.dtype == d.C.dtype == torch.bfloat16
    blocks = tile.blocks(d) if gluon is None else triton.cdiv(d_inner // groups, gluon.CHANNELS)
    dBC = (d.B if rounded else d.A).new_empty(blocks, count, batch, length, groups, 2, d_state)
    # Only single directions have an initial state.
    d_h0 = None if d.initial_state is None else d.A.new_empty(count, batch, *d.A.shape)
    d_last_state = None if d_last_state is None else d_last_state.contiguous()
    dz = None if z is None else z.new_empty(z.shape)
    with on_device_of(dy):
        if z is not None and gluon is None:
            # In full precision: parameter gradients would show the rounding.
            d_sum = d.A.new_empty(y_sum.shape)
            tall, wide = 16, 128
            _gate_kernel[(triton.cdiv(batch * length, tall), triton.cdiv(d_inner, wide))](
                dy,
                z,
                y_sum,
                d_sum,
                dz,
                batch * length,
                length,
                d_inner,
                **row_arguments(z=z, dy=dy),
                SCALE=scale,
                ROWS=tall,
                COLUMNS=wide,
                S=tl.float64 if d.A.dtype == torch.float64 else tl.float32,
            )
            dy, z, scale = d_sum, None, 1.0
        starts = window_starts(directions, window, dt_softplus=dt_softplus, start=d_last_state, z=z, dy=dy, scale=scale)
        if gluon is not None:
            outputs = du, ddt, dz, d_channels, dBC, d_h0
            gluon.launch(
                directions, dy, z, y_sum, checkpoints, starts, outputs, window, dt_softplus=dt_softplus, scale=scale
            )
        else:
            items = tile.programs(d) * count * windows
            programs = min(items, _multiprocessors(dy.device) * PROGRAMS)
            states = tile.REPEAT * triton.cdiv(d_state, tile.SPREAD)
            scratch = d.A.new_empty(programs, INTERVAL // tile.T, states, 32)
            # The largest distance between rows, in elements.
            widest = max(2 * d_state * groups, *(row_strides(t)[1] for t in (d.u, d.dt, d.B, d.C, dy, *du)))
            _backward_kernel[(programs,)](
                *columns(directions)[:-1],
                dy,
                cut_bytes(d),
                checkpoints,
                scratch if starts is None else starts,
                du,
                ddt,
                d_channels,
                dBC,
                d_h0,
                scratch,
                items,
                **sizes(d),
                window=window,
                windows=windows,
                started=int(starts is not None),
                **row_arguments(u=d.u, dt=d.dt, B=d.B, C=d.C, dy=dy),
                SCALE=scale,
                SOFTPLUS=dt_softplus,
                STAGES=STAGES,
                **tile.constants(directions),
                DY_PACK=tile.pack(d, dy),
                DU_PACK=tile.pack(d, *du),
                DDT_PACK=tile.pack(d, *ddt),
                INDEX=tl.int32 if window * widest < 2**31 else tl.int64,
                num_warps=1,
                num_stages=1,
            )
        wide, tall = 64, 64
        _channel_sums_kernel[(triton.cdiv(d_channels.shape[2], wide), count)](
            d_channels, dA, dD, d_bias, windows * batch, d_inner, N=d_state, ROWS=32, COLUMNS=wide
        )
        rows = batch * length * groups
        _row_sums_kernel[(triton.cdiv(rows, tall), count)](
            dBC,
            dB,
            dC,
            blocks,
            rows,
            N=d_state,
            N2=triton.next_power_of_2(2 * d_state),
            ROWS=tall,
            S=tl.float64 if d.A.dtype == torch.float64 else tl.float32,
        )
    found = [[None] * count if t is None else t for t in (du, ddt, dA, dB, dC, dD, d_bias, d_h0)]
    grads = [
        DirectionGrads._make(_like(t, of) for t, of in zip(own, to.tensors(), strict=True))
        for own, to in zip(zip(*found, strict=True), given, strict=True)
    ]
    return grads, dz


def _like(found: Tensor | None, given: Tensor | None) -> Tensor | None:
    """The gradient `found` in the dtype of its tensor."""
    return None if found is None or given is None else found.to(given.dtype)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
