# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""The backward scan in Gluon, for half precision and 16 states: a lane holds one channel with all its states.

A program is one warp, so that none waits for another: 32 channels of one direction, chunk by chunk from the last one.

1. Run forward from the chunk's saved state, and keep the state before every T-th step in scratch memory.
2. Take the blocks of T steps from last to first: recompute states and decays, those of the first two steps into shared
   memory, of the others into registers; then run the adjoint g[k] = dy[k] C[k] + decay[k + 1] g[k + 1] backwards.

Sums over states stay in a lane. Those over channels, dB = sum(g x) and dC = sum(h dy), are products on the tensor cores
of one step's g or h with x and dy of all T steps, of which one column is kept.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language import debug_barrier

from ..directions import Direction
from ..rows import columns, cut_bytes, row_arguments, row_arguments_of_eights, row_strides
from .activations import LN2, LOG2E
from .column_sums import split_sums
from .scan_gluon import SIZES, of_directions, pointer_of, reciprocal, step_size, takes
from .scan_plain import INTERVAL
from .scan_windows import window_length


@gluon.jit
def _ring(of, ROWS: gl.constexpr, T: gl.constexpr, CHANNELS: gl.constexpr):
    """Two slots of ROWS steps, and the same memory as steps and as blocks of T steps."""
    TILE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DTYPE: gl.constexpr = of.dtype.element_ty
    ring = gl.allocate_shared_memory(DTYPE, [2, ROWS, CHANNELS], TILE)
    rows = ring._reinterpret(DTYPE, [2 * ROWS, CHANNELS], ROW)
    return ring, rows, ring._reinterpret(DTYPE, [2 * ROWS // T, T, CHANNELS], TILE)


@gluon.jit
def _beside(v):
    """Four vectors as the columns of a matrix, within each lane."""
    return gl.join(gl.join(v[0], v[2]), gl.join(v[1], v[3])).reshape([v[0].shape[0], 4])


@gluon.jit
def _keep_columns(shared, v):
    """Store four vectors as the rows of `shared`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [1, 1], [1, 0])
    tile = gl.convert_layout(_beside(v).to(shared.dtype), LAYOUT, assert_trivial=True)
    shared.permute([1, 0]).store(tile)


@gluon.jit
def _copy_states(ring, at, slot, valid, BLOCKS: gl.constexpr, CHANNELS: gl.constexpr):
    """Start to copy the states before the blocks of a slot; `_copy` commits."""
    for i in gl.static_range(BLOCKS):
        async_copy.async_copy_global_to_shared(ring.index(slot * BLOCKS + i), at + i * (16 * CHANNELS), valid)


@gluon.jit
def _load_rows(at, step, left, ROWS: gl.constexpr):
    """ROWS rows, two at a time: so each lane has one number of a pair, in a register of its own."""
    rows = ()
    for t in gl.static_range(0, ROWS, 2):
        rows = rows + (gl.load(at + t * step, left > t, 0.0),)
    return rows


@gluon.jit
def _keep_rows(shared, slot, rows):
    """Store rows of the slot before as fp32: the compiler would wait here for rows that it has just begun to load."""
    for i in gl.static_range(len(rows)):
        shared.index(slot * len(rows) + i).store(rows[i].to(gl.float32))


@gluon.jit
def _copy(rings, bases, offsets, steps, slot, valid):
    """Start to copy rows from each base and offset into the slot of its ring; returns the offsets of the next rows."""
    ahead = ()
    for i in gl.static_range(len(rings)):
        async_copy.async_copy_global_to_shared(rings[i].index(slot), bases[i] + offsets[i], valid)
        ahead = ahead + (offsets[i] + steps[i],)
    async_copy.commit_group()
    return ahead


@gluon.jit(do_not_specialize=SIZES)
def _backward_kernel(
    u,  # (B, L, E), one per direction, as all up to dt_bias
    dt,  # (B, L, E)
    A,  # (E, N)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    D,  # (E,) or None
    dt_bias,  # (E,) or None
    dy,  # (B, L, E)
    z,  # (B, L, E) or None
    y_sum,  # (B, L, E), with z
    cuts,  # (B, L + 1) or None
    checkpoints,  # (directions, B, rows, E, N)
    starts,  # (windows, directions, B, E, N), read if started: the adjoint after each window, else zero
    du,  # (B, L, E), one per direction
    ddt,  # (B, L, E), one per direction
    dz,  # (B, L, E), with z
    d_channels,  # (directions, windows B, E (N + 2)): of dA, then dD, then d(dt_bias)
    dBC,  # (directions, blocks of channels, 2, B, L, G, N): of dB, then of dC
    d_h0,  # (directions, B, E, N) or None
    scratch,  # (programs, K / T, CHANNELS, N)
    items,  # blocks of channels, over all batch entries, directions and windows
    batch, length, window, windows, started, d_inner8, group_size8,
    u_pitch, u_stride8, dt_pitch, dt_stride8, B_pitch, B_stride, C_pitch, C_stride, z_pitch, z_stride8, dy_pitch,
    dy_stride8,
    REVERSE: gl.constexpr, SCALE: gl.constexpr, SOFTPLUS: gl.constexpr, GROUPS: gl.constexpr,
    K: gl.constexpr, ROWS: gl.constexpr, T: gl.constexpr, CHANNELS: gl.constexpr,
):  # fmt: skip
    DIRECTIONS: gl.constexpr = len(REVERSE)
    HALF: gl.constexpr = B[0].dtype.element_ty
    STATES: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [1, 1], [1, 0])
    LANES: gl.constexpr = gl.SliceLayout(1, STATES)
    SHARED: gl.constexpr = gl.SliceLayout(0, STATES)
    COPIES: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, 1], [1, 0])
    NUMBERS: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [1, 1], [1, 0])
    SLOT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # The states of a lane, 16 bytes of each lane beside each other; without conflicts of banks, as NARROW.
    BITS: gl.constexpr = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0], [8, 0], [16, 0], [0, 4], [0, 8]]
    WIDE: gl.constexpr = gl.SharedLinearLayout(BITS)
    NARROW: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, [1, 0])
    WEIGHTS: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    COLUMNS: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [1, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    d_inner = d_inner8 * 8
    group_size = group_size8 * 8
    channel_blocks = gl.cdiv(group_size, CHANNELS)
    rows = DIRECTIONS * gl.cdiv(gl.cdiv(length, DIRECTIONS), K)
    of_C = batch.to(gl.int64) * length * (GROUPS * 16)

    lane = gl.arange(0, CHANNELS, LANES)
    n = gl.arange(0, 16, SHARED)[None, :]
    t_r = gl.arange(0, ROWS, gl.SliceLayout(1, COPIES))[:, None]
    lane_r = gl.arange(0, CHANNELS, gl.SliceLayout(0, COPIES))[None, :]
    t_b = gl.arange(0, 2, gl.SliceLayout(1, NUMBERS))[:, None]
    n_b = gl.arange(0, 16, gl.SliceLayout(0, NUMBERS))[None, :]
    own = scratch + gl.program_id(0).to(gl.int64) * (K // T * CHANNELS * 16)
    own = own + (n // 4 * (4 * CHANNELS) + lane[:, None] * 4 + n % 4)  # 16 bytes of each lane beside each other
    # The product of a step: its states by columns that stand for the T steps of dB, then those of dC.
    m = gl.arange(0, 16, gl.SliceLayout(1, PRODUCT))[:, None]
    column = gl.arange(0, 2 * T, gl.SliceLayout(0, PRODUCT))[None, :]
    zero = gl.zeros([16, 2 * T], gl.float32, PRODUCT)
    # Rings of two slots of ROWS steps. Gradients take the places of what they are of, until the slot is done.
    u_ring, us, dus = _ring(u[0], ROWS, T, CHANNELS)
    dt_ring, dts, ddts = _ring(dt[0], ROWS, T, CHANNELS)
    dy_ring, dys, _dy_tiles = _ring(dy, ROWS, T, CHANNELS)
    if z is not None:
        z_ring, zs, dzs = _ring(z, ROWS, T, CHANNELS)
        s_ring, sums, _sum_tiles = _ring(y_sum, ROWS, T, CHANNELS)
    B_rows = gl.allocate_shared_memory(gl.float32, [ROWS, 2, 16], SLOT)
    C_rows = gl.allocate_shared_memory(gl.float32, [ROWS, 2, 16], SLOT)
    Bs = B_rows._reinterpret(gl.float32, [2 * ROWS, 16], ROW)
    Cs = C_rows._reinterpret(gl.float32, [2 * ROWS, 16], ROW)
    h_ring = gl.allocate_shared_memory(gl.float32, [2 * ROWS // T, CHANNELS, 16], WIDE)  # the state before each block
    # Buffers of their own: between stores to parts of one the compiler puts barriers.
    early_h = gl.allocate_shared_memory(gl.float32, [CHANNELS, 16], WIDE)
    early_decays = ()
    stages = ()
    for k in gl.static_range(T):
        stages = stages + (gl.allocate_shared_memory(HALF, [CHANNELS, 16], NARROW),)
        if k < 2:
            early_decays = early_decays + (gl.allocate_shared_memory(gl.float32, [CHANNELS, 16], WIDE),)
    weights = gl.allocate_shared_memory(HALF, [2 * T, CHANNELS], WEIGHTS).permute([1, 0])

    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        channel_block = item % channel_blocks
        group = item // channel_blocks % GROUPS
        b = (item // (channel_blocks * GROUPS) % batch).to(gl.int64)
        d = item // (channel_blocks * GROUPS) // batch % DIRECTIONS
        at_window = item // (channel_blocks * GROUPS) // batch // DIRECTIONS
        base = at_window * window
        here = gl.minimum(window, length - base)
        half = gl.cdiv(here, DIRECTIONS)
        chunks = gl.cdiv(half, K)  # in a segment; see the forward kernel
        sign = 1 - 2 * d if DIRECTIONS == 2 else (d - 1 if REVERSE[0] else d + 1)
        first = base + gl.where(sign > 0, 0, here - 1)
        middle = (here + 1 - d) // 2
        db = d * batch + b
        c = channel_block * CHANNELS + lane
        inside = c < group_size
        c += group * group_size
        entry = c[:, None] * 16 + n
        inside_n = inside[:, None] & (n >= 0)
        A_n = LOG2E * of_directions(A, entry, inside_n, d)
        bias = of_directions(dt_bias, c, inside, d)
        skip = of_directions(D, c, inside, d)
        row = (at_window.to(gl.int64) * DIRECTIONS * batch + db) * d_inner * 16
        g = gl.load(starts + row + entry, inside_n & (started > 0), 0.0)
        sum_A = gl.zeros([CHANNELS, 16], gl.float32, STATES)
        sum_D = gl.zeros([CHANNELS], gl.float32, LANES)
        sum_bias = sum_D
        c_r = channel_block * CHANNELS + lane_r
        inside_r = c_r < group_size
        c_r += group * group_size
        # Uniform addresses of the first step; offsets within a window take 32 bits.
        u_step = sign * (u_stride8 * 8)
        dt_step = sign * (dt_stride8 * 8)
        dy_step = sign * (dy_stride8 * 8)
        z_step = sign * (z_stride8 * 8)
        out_step = sign * d_inner
        B_step = sign * B_stride
        C_step = sign * C_stride
        u_0 = pointer_of(u, d) + (b * u_pitch + first) * (u_stride8 * 8)
        dt_0 = pointer_of(dt, d) + (b * dt_pitch + first) * (dt_stride8 * 8)
        dy_0 = dy + (b * dy_pitch + first) * (dy_stride8 * 8)
        out_0 = (b * length + first) * d_inner
        du_0 = pointer_of(du, d) + out_0
        ddt_0 = pointer_of(ddt, d) + out_0
        if z is not None:
            z_0 = z + (b * z_pitch + first) * (z_stride8 * 8)
            s_0 = y_sum + out_0
            dz_0 = dz + out_0
        B_0 = pointer_of(B, d) + ((b * B_pitch + first) * B_stride + group * 16)
        C_0 = pointer_of(C, d) + ((b * C_pitch + first) * C_stride + group * 16)
        B_lane = t_b * B_step + n_b
        C_lane = t_b * C_step + n_b
        BC_0 = dBC + (d * channel_blocks + channel_block) * 2 * of_C + ((b * length + first) * GROUPS + group) * 16
        BC_step = sign * (16 * GROUPS)
        BC_0 = BC_0 + (column // T * of_C + column % T * BC_step + m)
        if cuts is not None:
            cuts_0 = cuts + (b * (length + 1) + first + (1 if DIRECTIONS == 1 and REVERSE[0] else d))

        for chunk_back in range(DIRECTIONS * chunks):
            chunk = DIRECTIONS * chunks - 1 - chunk_back
            segment = chunk // chunks
            begin = segment * middle + chunk % chunks * K
            end = gl.minimum(begin + K, here if DIRECTIONS == 1 else segment * here + (1 - segment) * middle)
            blocks = gl.cdiv(gl.minimum(K, half - chunk % chunks * K), T)
            slots = gl.cdiv(blocks, ROWS // T)
            steps = end - begin  # at most K; the blocks may go beyond

            # 1. Keep the state before each block.
            saved = (db * rows + base // K + chunk) * d_inner * 16
            h = gl.load(checkpoints + saved + entry, inside_n, 0.0)
            left_r = gl.where(inside_r, steps - t_r, 0)
            left_b = steps - t_b
            rings = (u_ring, dt_ring)
            bases = (u_0, dt_0)
            moves = (ROWS * u_step, ROWS * dt_step)
            offsets = ((begin + t_r) * u_step + c_r, (begin + t_r) * dt_step + c_r)
            ahead = _copy(rings, bases, offsets, moves, 0, left_r > 0)
            B_at = begin * B_step + B_lane
            B_first = _load_rows(B_0 + B_at, B_step, left_b, ROWS)
            B_at += ROWS * B_step
            B_next = _load_rows(B_0 + B_at, B_step, left_b - ROWS, ROWS)
            _keep_rows(B_rows, 0, B_first)
            for slot in range(slots):
                async_copy.wait_group(0)
                ahead = _copy(rings, bases, ahead, moves, (slot + 1) % 2, left_r > (slot + 1) * ROWS)
                _keep_rows(B_rows, (slot + 1) % 2, B_next)
                B_at += ROWS * B_step
                B_next = _load_rows(B_0 + B_at, B_step, left_b - (slot + 2) * ROWS, ROWS)
                for block in range(slot * (ROWS // T), gl.minimum((slot + 1) * (ROWS // T), blocks - 1)):
                    gl.store(own + block * (16 * CHANNELS), h)
                    for k in gl.static_range(T):
                        place = block * T % (2 * ROWS) + k
                        there = block * T + k < steps
                        delta, slope = step_size(dts.index(place).load(LANES).to(gl.float32) + bias, there, SOFTPLUS)
                        x = delta * us.index(place).load(LANES).to(gl.float32)
                        exponent = delta[:, None] * A_n
                        if cuts is not None:
                            begins = gl.load(cuts_0 + (begin + block * T + k) * sign, there, 0)
                            exponent += gl.where(begins != 0, float("-inf"), 0.0)
                        h = gl.exp2(exponent) * h + x[:, None] * Bs.index(place).load(SHARED)[None, :]
            gl.store(own + (blocks - 1) * (16 * CHANNELS), h)
            async_copy.wait_group(0)
            debug_barrier()  # the copies from `own`

            # 2. The adjoint, block by block.
            last = begin + (slots - 1) * ROWS
            left_r = gl.where(inside_r, end - last - t_r, 0)
            left_b = end - last - t_b
            offsets = ((last + t_r) * u_step + c_r, (last + t_r) * dt_step + c_r, (last + t_r) * dy_step + c_r)
            rings = rings + (dy_ring,)
            bases = bases + (dy_0,)
            moves = (-ROWS * u_step, -ROWS * dt_step, -ROWS * dy_step)
            out_r = (last + t_r) * out_step + c_r
            if z is not None:
                offsets = offsets + ((last + t_r) * z_step + c_r, out_r)
                rings = rings + (z_ring, s_ring)
                bases = bases + (z_0, s_0)
                moves = moves + (-ROWS * z_step, -ROWS * out_step)
            own_at = own + (slots - 1) * (ROWS // T * 16 * CHANNELS)
            _copy_states(h_ring, own_at, 0, inside_n, ROWS // T, CHANNELS)
            ahead = _copy(rings, bases, offsets, moves, 0, left_r > 0)
            B_at = last * B_step + B_lane
            C_at = last * C_step + C_lane
            B_first = _load_rows(B_0 + B_at, B_step, left_b, ROWS)
            C_first = _load_rows(C_0 + C_at, C_step, left_b, ROWS)
            B_at -= ROWS * B_step
            C_at -= ROWS * C_step
            left_b = gl.where(slots > 1, left_b + ROWS, 0)
            B_next = _load_rows(B_0 + B_at, B_step, left_b, ROWS)
            C_next = _load_rows(C_0 + C_at, C_step, left_b, ROWS)
            _keep_rows(B_rows, 0, B_first)
            _keep_rows(C_rows, 0, C_first)
            for back in range(slots):
                slot = slots - 1 - back
                async_copy.wait_group(0)
                own_at -= ROWS // T * 16 * CHANNELS
                _copy_states(h_ring, own_at, (back + 1) % 2, inside_n & (slot > 0), ROWS // T, CHANNELS)
                ahead = _copy(rings, bases, ahead, moves, (back + 1) % 2, inside_r & (slot > 0))
                _keep_rows(B_rows, (back + 1) % 2, B_next)
                _keep_rows(C_rows, (back + 1) % 2, C_next)
                B_at -= ROWS * B_step
                C_at -= ROWS * C_step
                left_b = gl.where(slot > 1, left_b + ROWS, 0)
                B_next = _load_rows(B_0 + B_at, B_step, left_b, ROWS)
                C_next = _load_rows(C_0 + C_at, C_step, left_b, ROWS)
                end_block = gl.minimum((slot + 1) * (ROWS // T), blocks)
                for back_block in range(end_block - slot * (ROWS // T)):
                    block = end_block - 1 - back_block
                    place_block = back % 2 * (ROWS // T) + block % (ROWS // T)
                    first_place = place_block * T
                    at = block * T
                    h = h_ring.index(place_block).load(STATES)
                    # Loads from shared memory come before stores to it, which the compiler cannot tell apart.
                    deltas = ()
                    slopes = ()
                    values = ()
                    xs = ()
                    dys_k = ()
                    dus_k = ()
                    ddts_k = ()
                    dzs_k = ()
                    for k in gl.static_range(T):
                        place = first_place + k
                        there = at + k < steps
                        delta, slope = step_size(dts.index(place).load(LANES).to(gl.float32) + bias, there, SOFTPLUS)
                        u_k = us.index(place).load(LANES).to(gl.float32)
                        dy_k = SCALE * dys.index(place).load(LANES).to(gl.float32)
                        if z is not None:
                            z_k = zs.index(place).load(LANES).to(gl.float32)
                            open = reciprocal(1 + gl.exp2(z_k * -LOG2E))
                            y_k = sums.index(place).load(LANES).to(gl.float32)
                            dzs_k = dzs_k + (dy_k * y_k * open * (1 + z_k * (1 - open)),)
                            dy_k *= z_k * open
                        deltas = deltas + (delta,)
                        slopes = slopes + (slope,)
                        values = values + (u_k,)
                        xs = xs + (delta * u_k,)
                        dys_k = dys_k + (dy_k,)
                    B_k = Bs.index(first_place).load(SHARED)[None, :]
                    columns = gl.join(_beside(xs), _beside(dys_k)).permute([0, 2, 1]).reshape([CHANNELS, 2 * T])
                    weights.store(gl.convert_layout(columns.to(HALF), COLUMNS, assert_trivial=True))
                    decays = ()
                    befores = ()
                    for k in gl.static_range(T):
                        exponent = deltas[k][:, None] * A_n
                        if cuts is not None:
                            begins = gl.load(cuts_0 + (begin + at + k) * sign, at + k < steps, 0)
                            exponent += gl.where(begins != 0, float("-inf"), 0.0)
                        decay = gl.exp2(exponent)
                        decays = decays + (decay,)
                        befores = befores + (h,)
                        h = decay * h + xs[k][:, None] * B_k
                        if k + 1 < T:
                            B_k = Bs.index(first_place + k + 1).load(SHARED)[None, :]
                        else:
                            C_k = Cs.index(first_place + k).load(SHARED)[None, :]
                        if k < 2:
                            early_decays[k].store(decay)
                            if k == 1:
                                early_h.store(befores[1])
                        stages[k].store(h.to(HALF))
                    right = weights.load(RIGHT)
                    found = zero
                    for k in gl.static_range(T):
                        product = mma_v2(stages[k].permute([1, 0]).load(LEFT), right, zero)
                        found = gl.where(column == T + k, product, found)

                    for j in gl.static_range(T - 1, -1, -1):
                        decay = decays[j] if j > 1 else early_decays[j].load(STATES)
                        before = (
                            befores[j] if j > 1 else (early_h if j == 1 else h_ring.index(place_block)).load(STATES)
                        )
                        g += dys_k[j][:, None] * C_k
                        rounded = g.to(HALF)
                        if j > 0:
                            C_k = Cs.index(first_place + j - 1).load(SHARED)[None, :]
                        gB = gl.sum(g * B_k, 1)
                        if j > 0:
                            B_k = Bs.index(first_place + j - 1).load(SHARED)[None, :]
                        stages[j].store(rounded)
                        g *= decay
                        q = g * before
                        qA = gl.sum(q * A_n, 1)
                        sum_A += q * deltas[j][:, None]
                        du_k = deltas[j] * gB
                        if D is not None:
                            du_k += skip * dys_k[j]
                            sum_D += dys_k[j] * values[j]  # both are zero behind the end
                        ddt_k = (LN2 * qA + values[j] * gB) * slopes[j]
                        sum_bias += ddt_k
                        dus_k = (du_k,) + dus_k
                        ddts_k = (ddt_k,) + ddts_k
                    _keep_columns(dus.index(place_block), dus_k)
                    _keep_columns(ddts.index(place_block), ddts_k)
                    if z is not None:
                        _keep_columns(dzs.index(place_block), dzs_k)
                    for k in gl.static_range(T):
                        product = mma_v2(stages[k].permute([1, 0]).load(LEFT), right, zero)
                        found = gl.where(column == k, product, found)
                    to = BC_0 + (begin + at) * BC_step
                    gl.store(to, found.to(dBC.dtype.element_ty), at + column % T < steps)
                valid = inside_r & (slot * ROWS + t_r < steps)
                gl.store(du_0 + out_r, u_ring.index(back % 2).load(COPIES), valid)
                gl.store(ddt_0 + out_r, dt_ring.index(back % 2).load(COPIES), valid)
                if z is not None:
                    gl.store(dz_0 + out_r, z_ring.index(back % 2).load(COPIES), valid & (d == 0))
                out_r -= ROWS * out_step

        parts = d_channels + ((d * windows + at_window).to(gl.int64) * batch + b) * (d_inner * 18)
        gl.store(parts + entry, sum_A, inside_n)
        gl.store(parts + (d_inner * 16 + c), sum_D, inside)
        gl.store(parts + (d_inner * 17 + c), sum_bias, inside)
        if d_h0 is not None:  # noqa: SIM102 (Triton skips a block only for a separate `None` test)
            if gl.where(sign > 0, length - base, base + here) == length:
                gl.store(d_h0 + db * d_inner * 16 + entry, g, inside_n)


CHANNELS = 32  # of a program
T, ROWS = 4, 8  # steps of a block, and of a slot
PROGRAMS = 8  # that a multiprocessor runs at once


def takes_backward(directions: Sequence[Direction], z: Tensor | None, dy: Tensor) -> bool:
    """Whether the kernel can run a call."""
    d = directions[0]
    widest = max(row_strides(t)[1] for t in (d.u, d.dt, d.B, d.C, dy, *(() if z is None else (z,))))
    return (
        takes(directions, z)
        and d.B.dtype == d.C.dtype
        and dy.element_size() == 2
        and dy.data_ptr() % 16 == 0
        and row_strides(dy)[1] % 8 == 0
        and window_length(d, len(directions)) * max(widest, d.u.shape[2]) < 2**31  # offsets take 32 bits
    )


def launch_backward(
    dy: Tensor,
    directions: Sequence[Direction],
    z: Tensor | None,
    starts: Tensor | None,
    checkpoints: Tensor,
    y_sum: Tensor,
    window: int,
    *,
    dt_softplus: bool,
    scale: float,
) -> tuple[list[tuple[Tensor | None, ...]], Tensor | None]:
    """See `scan_plain`."""
    d, count = directions[0], len(directions)
    batch, length, d_inner = d.u.shape
    groups = d.B.shape[2]
    windows = triton.cdiv(length, window)
    blocks = triton.cdiv(d_inner // groups, CHANNELS)
    items = blocks * groups * batch * count * windows
    programs = min(items, torch.cuda.get_device_properties(dy.device).multi_processor_count * PROGRAMS)
    scratch = d.A.new_empty(programs, INTERVAL // T, CHANNELS, 16)
    du = tuple(each.u.new_empty(each.u.shape) for each in directions)
    ddt = tuple(each.dt.new_empty(each.dt.shape) for each in directions)
    dz = None if z is None else z.new_empty(z.shape)
    d_channels = d.A.new_empty(count, windows * batch, d_inner * 18)
    # Rounding the parts to half precision loses no more than rounding their sum.
    dBC = d.B.new_empty(count, blocks, 2 * d.B.numel())
    d_h0 = None if d.initial_state is None else d.A.new_empty(d.initial_state.shape)
    rows = row_arguments(B=d.B, C=d.C) | row_arguments_of_eights(u=d.u, dt=d.dt, z=z, dy=dy)
    _backward_kernel[(programs,)](
        *columns(directions)[:-1], dy, z, None if z is None else y_sum, cut_bytes(d), checkpoints,
        scratch if starts is None else starts, du, ddt, dz, d_channels, dBC, d_h0, scratch,
        items, batch, length, window, windows, int(starts is not None), d_inner // 8, d_inner // groups // 8, **rows,
        REVERSE=tuple(each.reverse for each in directions), SCALE=scale, SOFTPLUS=dt_softplus, GROUPS=groups,
        K=INTERVAL, ROWS=ROWS, T=T, CHANNELS=CHANNELS, num_warps=1, maxnreg=255,
    )  # fmt: skip
    dA, dB, dC = (tuple(t.new_empty(t.shape) for _ in directions) for t in (d.A, d.B, d.C))
    dD, d_bias = (None if t is None else tuple(t.new_empty(t.shape) for _ in directions) for t in (d.D, d.dt_bias))
    split_sums(d_channels, dA, dD, d_bias)
    split_sums(dBC, dB, dC, None)
    none = [None] * count
    return list(zip(du, ddt, dA, dB, dC, dD or none, d_bias or none, [d_h0] * count, strict=True)), dz
