# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""Backend `triton` of the scan: the backward pass; `triton_tiles` says how a program holds its states.

A program goes through the sequence in chunks of K = CHECKPOINT_INTERVAL steps, the last one first, each in four phases:

1. Stage what a step needs in the state's precision and in processing order: delta, delta * u, the gradient of the
   ungated y, B and C.
2. Run forward from the chunk's checkpoint and keep the states in front of each T = SUB_STEPS-th step.
3. Take the sub-chunks of T steps from last to first: recompute the states into registers, then run backwards.
4. Finish du and d(dt).

So a state costs two exponentials, and what does not depend on the state is computed for whole tiles at once. Registers
cannot be indexed at run time, hence the short unrolled sub-chunks. What passes between the phases goes through scratch
memory of the program's own, 22 KB for 16 channels and 16 states: the resident programs' fit into L1 and L2 and
device memory sees little of it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .directions import CHECKPOINT_INTERVAL, Direction, DirectionGrads
from .rows import as_rows, columns, direction_as_rows, launches, on_device_of, row_arguments, sizes
from .triton_tiles import LOG2E, Tile, load_states, pick, sigmoid, step_size, store_states, zeros


@triton.jit(
    do_not_specialize=["items", "batch", "length", "u_pitch", "dt_pitch", "B_pitch", "C_pitch", "z_pitch", "dy_pitch"]
)
def _backward_kernel(
    u,  # (B, L, E), one for each direction, as all up to dt_bias
    dt,  # (B, L, E)
    A,  # (E, N)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    D,  # (E,) or None
    dt_bias,  # (E,) or None
    z,  # (B, L, E) or None
    dy,  # (B, L, E)
    y_sum,  # (B, L, E) or None: with dz
    checkpoints,  # (directions, B, ceil(L / K), E, N)
    d_last_state,  # (directions, B, E, N) or None
    du,  # (B, L, E), one for each direction
    ddt,  # (B, L, E), one for each direction
    dz,  # (B, L, E) or None: written by the programs of the first direction
    dA,  # (directions, B, E, N)
    dB,  # (blocks of a group, directions, B, L, G, N)
    dC,  # (blocks of a group, directions, B, L, G, N)
    dD,  # (directions, B, E) or None
    d_bias,  # (directions, B, E) or None
    d_h0,  # (directions, B, E, N) or None
    scratch,  # (programs, _scratch_size)
    items,  # blocks * G * B * directions; a program takes every num_programs-th
    batch,
    length,
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
    z_pitch,
    z_stride,
    dy_pitch,
    dy_stride,
    REVERSE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    REPEAT: tl.constexpr,
    SPREAD: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,  # steps staged at a time
):
    TILES: tl.constexpr = (N + SPREAD - 1) // SPREAD
    TILE: tl.constexpr = REPEAT * SPREAD * LANES
    BLOCK: tl.constexpr = REPEAT * LANES
    NP: tl.constexpr = TILES * SPREAD
    S: tl.constexpr = checkpoints.dtype.element_ty
    blocks = tl.cdiv(group_size, BLOCK)

    # Scratch of this program. Rows are in processing order; those beyond the sequence have delta = 0, an identity step.
    scratch += tl.program_id(0).to(tl.int64) * (K * (5 * BLOCK + 2 * NP) + K // T * TILES * TILE)
    delta_rows = scratch  # (K, BLOCK)
    x_rows = delta_rows + K * BLOCK  # (K, BLOCK): delta * u
    dy_rows = x_rows + K * BLOCK  # (K, BLOCK): the gradient of the ungated y
    gB_rows = dy_rows + K * BLOCK  # (K, BLOCK): sum over states of g B
    qA_rows = gB_rows + K * BLOCK  # (K, BLOCK): sum over states of q A
    B_rows = qA_rows + K * BLOCK  # (K, NP)
    C_rows = B_rows + K * NP  # (K, NP)
    lane = tl.arange(0, LANES)[None, None, :]
    p = tl.arange(0, SPREAD)[None, :, None]
    r = tl.arange(0, REPEAT)[:, None, None]
    h_rows = C_rows + K * NP + (p * LANES + lane) * REPEAT + r  # (K / T, TILES, TILE)
    spread = lane * REPEAT + r + 0 * p  # a channel's value in each lane that holds states of the channel
    n = p * TILES
    n_tile = tl.arange(0, SPREAD) * TILES
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    n_column = tl.arange(0, triton.next_power_of_2(NP))[None, :]

    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        group = item // blocks % GROUPS
        b = (item // (blocks * GROUPS) % batch).to(tl.int64)
        direction = (item // (blocks * GROUPS) // batch).to(tl.int64)
        db = direction * batch + b
        channel0 = group * group_size + item % blocks * BLOCK
        inside = item % blocks * BLOCK + column < group_size
        channel = channel0 + column
        states_inside = item % blocks * BLOCK + spread < group_size
        state = (channel0 + spread) * N

        u_d = pick(u, direction) + channel
        dt_d = pick(dt, direction) + channel
        B_d = pick(B, direction) + group * N + n_column
        C_d = pick(C, direction) + group * N + n_column
        du_d = pick(du, direction) + channel
        ddt_d = pick(ddt, direction) + channel
        A_d = load_states(pick(A, direction) + state, states_inside, N, SPREAD, S)
        bias = None
        if dt_bias is not None:
            bias = tl.load(pick(dt_bias, direction) + channel, inside, 0.0).to(S)
            sum_bias = tl.zeros([ROWS, BLOCK], S)
        if D is not None:
            skip = tl.load(pick(D, direction) + channel, inside, 0.0).to(S)
            sum_D = tl.zeros([ROWS, BLOCK], S)
        reverse = pick(REVERSE, direction)
        first = length - 1 if reverse else 0
        sign = -1 if reverse else 1
        first_partial = (item % blocks * (items // (blocks * GROUPS)) + db) * length  # row of the partial sums dB, dC

        sum_A = zeros(TILES, REPEAT, SPREAD, LANES, S)
        if d_last_state is not None:
            g = load_states(d_last_state + db * d_inner * N + state, states_inside, N, SPREAD, S)
        else:
            g = zeros(TILES, REPEAT, SPREAD, LANES, S)

        chunks = tl.cdiv(length, K)
        for chunk_back in range(chunks):
            chunk = chunks - 1 - chunk_back
            start = chunk * K
            subs = tl.cdiv(min(K, length - start), T)

            # 1. Stage.
            for k0 in range(0, K, ROWS):
                steps = start + k0 + row
                rows = first + sign * steps
                valid_rows = inside & (steps < length)
                staged = (k0 + row) * BLOCK + column
                u_t = tl.load(u_d + (b * u_pitch + rows) * u_stride, valid_rows, 0.0).to(S)
                delta, _ = step_size(dt_d + (b * dt_pitch + rows) * dt_stride, valid_rows, bias, SOFTPLUS, S)
                delta = tl.where(valid_rows, delta, 0.0)
                tl.store(delta_rows + staged, delta)
                tl.store(x_rows + staged, delta * u_t)
                dy_t = SCALE * tl.load(dy + (b * dy_pitch + rows) * dy_stride + channel, valid_rows, 0.0).to(S)
                if z is not None:
                    z_t = tl.load(z + (b * z_pitch + rows) * z_stride + channel, valid_rows, 0.0).to(S)
                    gate = sigmoid(z_t)
                    if dz is not None:
                        at_rows = (b * length + rows) * d_inner + channel
                        first_direction = valid_rows & (direction == 0)
                        y_t = tl.load(y_sum + at_rows, first_direction, 0.0).to(S)
                        tl.store(dz + at_rows, dy_t * y_t * gate * (1 + z_t * (1 - gate)), first_direction)
                    dy_t *= z_t * gate
                tl.store(dy_rows + staged, dy_t)
                valid_rows = (steps < length) & (n_column < N)
                B_t = tl.load(B_d + (b * B_pitch + rows) * B_stride, valid_rows, 0.0).to(S)
                C_t = tl.load(C_d + (b * C_pitch + rows) * C_stride, valid_rows, 0.0).to(S)
                tl.store(B_rows + (k0 + row) * NP + n_column, B_t, n_column < NP)
                tl.store(C_rows + (k0 + row) * NP + n_column, C_t, n_column < NP)
            tl.debug_barrier()

            # 2. Keep the states in front of each sub-chunk.
            h = load_states(checkpoints + (db * chunks + chunk) * d_inner * N + state, states_inside, N, SPREAD, S)
            for sub in range(subs):
                for i in tl.static_range(TILES):
                    tl.store(h_rows + (sub * TILES + i) * TILE, h[i])
                if sub < subs - 1:
                    for j in tl.static_range(T):
                        k = sub * T + j
                        delta2 = tl.load(delta_rows + k * BLOCK + spread) * LOG2E
                        x = tl.load(x_rows + k * BLOCK + spread)
                        h_t = ()
                        for i in tl.static_range(TILES):
                            B_i = tl.load(B_rows + k * NP + n + i)
                            h_t = h_t + (tl.exp2(delta2 * A_d[i]) * h[i] + x * B_i,)
                        h = h_t
            tl.debug_barrier()

            # 3. The adjoint g[k] = dy C + decay[k + 1] g[k + 1], sub-chunk after sub-chunk.
            for sub_back in range(subs):
                k0 = (subs - 1 - sub_back) * T
                hs = ()
                decays = ()
                for i in tl.static_range(TILES):
                    hs = hs + (tl.load(h_rows + (k0 // T * TILES + i) * TILE),)
                for j in tl.static_range(T):
                    delta2 = tl.load(delta_rows + (k0 + j) * BLOCK + spread) * LOG2E
                    x = tl.load(x_rows + (k0 + j) * BLOCK + spread)
                    for i in tl.static_range(TILES):
                        B_i = tl.load(B_rows + (k0 + j) * NP + n + i)
                        decays = decays + (tl.exp2(delta2 * A_d[i]),)
                        hs = hs + (decays[j * TILES + i] * hs[j * TILES + i] + x * B_i,)
                for j in tl.static_range(T - 1, -1, -1):
                    step = start + k0 + j
                    t = first + sign * step
                    delta = tl.load(delta_rows + (k0 + j) * BLOCK + spread)
                    x = tl.load(x_rows + (k0 + j) * BLOCK + spread)
                    dy_k = tl.load(dy_rows + (k0 + j) * BLOCK + spread)
                    gB = tl.zeros([REPEAT, SPREAD, LANES], S)
                    qA = tl.zeros([REPEAT, SPREAD, LANES], S)
                    g_t = ()
                    sum_A_t = ()
                    for i in tl.static_range(TILES):
                        at = ((first_partial + t) * GROUPS + group) * N + n_tile + i
                        valid = (n_tile + i < N) & (step < length)
                        tl.store(dC + at, tl.sum(tl.sum(dy_k * hs[(j + 1) * TILES + i], 0), 1), valid)
                        g_i = g[i] + dy_k * tl.load(C_rows + (k0 + j) * NP + n + i)
                        tl.store(dB + at, tl.sum(tl.sum(g_i * x, 0), 1), valid)
                        gB += g_i * tl.load(B_rows + (k0 + j) * NP + n + i)
                        g_i *= decays[j * TILES + i]
                        q = g_i * hs[j * TILES + i]  # the gradient of the exponent delta * A
                        qA += q * A_d[i]
                        sum_A_t = sum_A_t + (sum_A[i] + q * delta,)
                        g_t = g_t + (g_i,)
                    g = g_t
                    sum_A = sum_A_t
                    tl.store(gB_rows + (k0 + j) * BLOCK + spread, tl.sum(gB, 1, keep_dims=True), p == 0)
                    tl.store(qA_rows + (k0 + j) * BLOCK + spread, tl.sum(qA, 1, keep_dims=True), p == 0)
            tl.debug_barrier()

            # 4. Finish what depends on a channel but not on a state.
            for k0 in range(0, K, ROWS):
                steps = start + k0 + row
                rows = first + sign * steps
                valid_rows = inside & (steps < length)
                staged = (k0 + row) * BLOCK + column
                u_t = tl.load(u_d + (b * u_pitch + rows) * u_stride, valid_rows, 0.0).to(S)
                gB_t = tl.load(gB_rows + staged, valid_rows, 0.0)
                du_t = tl.load(delta_rows + staged) * gB_t
                ddt_t = tl.load(qA_rows + staged, valid_rows, 0.0) + u_t * gB_t
                if SOFTPLUS:
                    _, raw = step_size(dt_d + (b * dt_pitch + rows) * dt_stride, valid_rows, bias, False, S)
                    ddt_t *= sigmoid(raw)
                if D is not None:
                    dy_t = tl.load(dy_rows + staged)
                    du_t += skip * dy_t
                    sum_D += dy_t * u_t
                if dt_bias is not None:
                    sum_bias += ddt_t
                tl.store(du_d + (b * length + rows) * d_inner, du_t, valid_rows)
                tl.store(ddt_d + (b * length + rows) * d_inner, ddt_t, valid_rows)
            tl.debug_barrier()

        store_states(dA + db * d_inner * N + state, sum_A, states_inside, N, SPREAD)
        if d_h0 is not None:
            store_states(d_h0 + db * d_inner * N + state, g, states_inside, N, SPREAD)
        if D is not None:
            tl.store(dD + db * d_inner + channel, tl.sum(sum_D, 0)[None, :], inside)
        if dt_bias is not None:
            tl.store(d_bias + db * d_inner + channel, tl.sum(sum_bias, 0)[None, :], inside)


SUB_STEPS = 4
# A warp takes 255 registers a thread, so 8 of them fill a multiprocessor; more programs would only want more scratch.
WARPS = 8
ENOUGH_PROGRAMS = 1024


def _tile(d: Direction, directions: int) -> Tile:
    """Two channels a lane if that leaves programs enough. Like the forward's, a function of shapes and dtypes only."""
    spread = triton.cdiv(d.A.shape[1], 4)
    wide = Tile.spread_over(spread, repeat=2)
    enough = d.A.dtype == torch.float32 and wide.programs(d, directions) >= ENOUGH_PROGRAMS
    return wide if enough else Tile.spread_over(spread)


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
    """Gradients of each direction and of z."""
    directions = [direction_as_rows(d) for d in directions]
    dy, z = as_rows(dy), None if z is None else as_rows(z)
    d_last_state = None if d_last_state is None else d_last_state.contiguous()
    dz = None if z is None else z.new_empty(z.shape)
    grads = []
    with on_device_of(dy):
        for part in launches(directions):
            grads += _backward(
                directions[part],
                dy,
                None if d_last_state is None else d_last_state[part],
                z,
                dz if part.start == 0 else None,
                checkpoints[part],
                y_sum,
                dt_softplus,
                scale,
            )
    return grads, dz


def _backward(
    directions: Sequence[Direction],
    dy: Tensor,
    d_last_state: Tensor | None,
    z: Tensor | None,
    dz: Tensor | None,
    checkpoints: Tensor,
    y_sum: Tensor,
    dt_softplus: bool,
    scale: float,
) -> list[DirectionGrads]:
    """One launch, then the sums over channel blocks (dB, dC) and over the batch (dA, dD, d(dt_bias))."""
    d, count = directions[0], len(directions)
    batch, _, d_inner = d.u.shape
    tile = _tile(d, count)
    items = tile.programs(d, count)
    programs = min(items, _multiprocessors(d.u.device) * WARPS)
    channels = tile.REPEAT * tile.LANES
    states = triton.cdiv(d.A.shape[1], tile.SPREAD) * tile.SPREAD
    staged = CHECKPOINT_INTERVAL * (5 * channels + 2 * states)
    scratch = d.A.new_empty(programs, staged + CHECKPOINT_INTERVAL // SUB_STEPS * states * channels)

    du = tuple(d.u.new_empty(d.u.shape) for d in directions)
    ddt = tuple(d.dt.new_empty(d.dt.shape) for d in directions)
    dB, dC = (d.A.new_empty(tile.blocks(d), count, *d.B.shape) for _ in range(2))
    dA = d.A.new_empty(count, batch, *d.A.shape)
    dD = None if d.D is None else d.A.new_empty(count, batch, d_inner)
    d_bias = None if d.dt_bias is None else d.A.new_empty(count, batch, d_inner)
    d_h0 = None if d.initial_state is None else torch.empty_like(dA)
    _backward_kernel[(programs,)](
        *columns(directions)[:-1],
        z,
        dy,
        y_sum,
        checkpoints,
        d_last_state,
        du,
        ddt,
        dz,
        dA,
        dB,
        dC,
        dD,
        d_bias,
        d_h0,
        scratch,
        items,
        **sizes(d),
        **row_arguments(u=d.u, dt=d.dt, B=d.B, C=d.C, z=z, dy=dy),
        REVERSE=tuple(d.reverse for d in directions),
        SCALE=scale,
        SOFTPLUS=dt_softplus,
        T=SUB_STEPS,
        ROWS=min(CHECKPOINT_INTERVAL, 256 // channels),
        **tile._asdict(),
        num_warps=1,
        num_stages=1,
    )
    return [
        DirectionGrads(
            du[i],
            ddt[i],
            dA[i].sum(0),
            dB[:, i].sum(0).to(d.B.dtype),
            dC[:, i].sum(0).to(d.C.dtype),
            None if dD is None or d.D is None else dD[i].sum(0).to(d.D.dtype),
            None if d_bias is None or d.dt_bias is None else d_bias[i].sum(0).to(d.dt_bias.dtype),
            None if d_h0 is None or d.initial_state is None else d_h0[i].to(d.initial_state.dtype, copy=True),
        )
        for i, d in enumerate(directions)
    ]


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
