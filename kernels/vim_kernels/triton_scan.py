# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""Backend `triton` of the scan: channel-last, both directions in one launch, no atomics, bit-identical from run to run.

Here the forward pass; `triton_tiles` says how a program holds its states.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .directions import CHECKPOINT_INTERVAL, Direction, ScanOutput
from .rows import as_rows, columns, direction_as_rows, launches, on_device_of, row_arguments, sizes
from .triton_scan_backward import backward
from .triton_tiles import LOG2E, Tile, load_states, pick, sigmoid, step_size, store_states, zeros

__all__ = ["backward", "forward"]


@triton.jit(do_not_specialize=["batch", "length", "u_pitch", "dt_pitch", "B_pitch", "C_pitch", "z_pitch"])
def _forward_kernel(
    u,  # (B, L, E), one for each direction, as all up to h0
    dt,  # (B, L, E)
    A,  # (E, N)
    B,  # (B, L, G, N)
    C,  # (B, L, G, N)
    D,  # (E,) or None
    dt_bias,  # (E,) or None
    h0,  # (B, E, N) or None
    z,  # (B, L, E) or None: the gate, here only if there is one direction
    y,  # (directions, B, L, E)
    y_sum,  # (B, L, E) or None
    last_state,  # (directions, B, E, N)
    checkpoints,  # (directions, B, ceil(L / K), E, N) or None
    batch,
    length,
    d_inner,
    group_size,  # E / G
    # The rows (b, t) of a tensor are `stride` elements apart, its batch entries `pitch` rows.
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
    REVERSE: tl.constexpr,  # for each direction
    SCALE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    REPEAT: tl.constexpr,
    SPREAD: tl.constexpr,
    LANES: tl.constexpr,
):
    TILES: tl.constexpr = (N + SPREAD - 1) // SPREAD
    S: tl.constexpr = last_state.dtype.element_ty
    pid = tl.program_id(0)
    blocks = tl.cdiv(group_size, REPEAT * LANES)
    group = pid // blocks % GROUPS
    b = (pid // (blocks * GROUPS) % batch).to(tl.int64)
    direction = (pid // (blocks * GROUPS) // batch).to(tl.int64)
    db = direction * batch + b

    c = pid % blocks * (REPEAT * LANES) + tl.arange(0, LANES)[None, :] * REPEAT + tl.arange(0, REPEAT)[:, None]
    inside = c < group_size
    channel = group * group_size + c
    states_inside = inside[:, None, :]
    state = channel[:, None, :] * N

    u = pick(u, direction) + channel
    dt = pick(dt, direction) + channel
    B = pick(B, direction) + group * N
    C = pick(C, direction) + group * N
    A = load_states(pick(A, direction) + state, states_inside, N, SPREAD, S)
    bias = None
    if dt_bias is not None:
        bias = tl.load(pick(dt_bias, direction) + channel, inside, 0.0).to(S)
    if D is not None:
        skip = tl.load(pick(D, direction) + channel, inside, 0.0).to(S)
    if h0 is not None:
        h = load_states(pick(h0, direction) + b * d_inner * N + state, states_inside, N, SPREAD, S)
    else:
        h = zeros(TILES, REPEAT, SPREAD, LANES, S)
    reverse = pick(REVERSE, direction)
    first = length - 1 if reverse else 0
    sign = -1 if reverse else 1

    for start in range(0, length, K):
        if checkpoints is not None:
            chunk = db * tl.cdiv(length, K) + start // K
            store_states(checkpoints + chunk * d_inner * N + state, h, states_inside, N, SPREAD)
        # Unrolled, so that the loads of four steps are under way together.
        for step in tl.range(start, min(start + K, length), loop_unroll_factor=4):
            t = first + sign * step
            u_t = tl.load(u + (b * u_pitch + t) * u_stride, inside, 0.0).to(S)
            delta, _ = step_size(dt + (b * dt_pitch + t) * dt_stride, inside, bias, SOFTPLUS, S)
            B_t = load_states(B + (b * B_pitch + t) * B_stride, True, N, SPREAD, S)
            C_t = load_states(C + (b * C_pitch + t) * C_stride, True, N, SPREAD, S)
            x = (delta * u_t)[:, None, :]
            delta2 = (delta * LOG2E)[:, None, :]
            y_t = tl.zeros([REPEAT, SPREAD, LANES], S)
            h_t = ()
            for i in tl.static_range(TILES):
                h_i = tl.exp2(delta2 * A[i]) * h[i] + x * B_t[i]
                y_t += h_i * C_t[i]
                h_t = h_t + (h_i,)
            h = h_t
            y_t = tl.sum(y_t, 1)
            if D is not None:
                y_t += skip * u_t
            at = (db * length + t) * d_inner + channel
            if y_sum is not None:
                tl.store(y_sum + at, y_t, inside)
            if len(REVERSE) == 1:
                y_t *= SCALE
            if z is not None:
                z_t = tl.load(z + (b * z_pitch + t) * z_stride + channel, inside, 0.0).to(S)
                y_t *= z_t * sigmoid(z_t)
            tl.store(y + at, y_t, inside)
    store_states(last_state + db * d_inner * N + state, h, states_inside, N, SPREAD)


@triton.jit(do_not_specialize=["batch", "length", "z_pitch"])
def _gate_kernel(
    parts,  # (2, B, L, E): the ungated y of each direction
    z,  # (B, L, E) or None
    y,  # (B, L, E)
    y_sum,  # (B, L, E) or None
    batch,
    length,
    d_inner,
    z_pitch,
    z_stride,
    SCALE: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = (tl.program_id(0) // tl.cdiv(length, ROWS)).to(tl.int64)
    t = tl.program_id(0) % tl.cdiv(length, ROWS) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (t < length) & (channel < d_inner)
    at = (b * length + t) * d_inner + channel
    other = ((batch + b) * length + t) * d_inner + channel
    total = tl.load(parts + at, inside, 0.0).to(S) + tl.load(parts + other, inside, 0.0).to(S)
    if y_sum is not None:
        tl.store(y_sum + at, total, inside)
    total *= SCALE
    if z is not None:
        z_t = tl.load(z + (b * z_pitch + t) * z_stride + channel, inside, 0.0).to(S)
        total *= z_t * sigmoid(z_t)
    tl.store(y + at, total, inside)


# The choices depend on shapes and dtypes only, never on a measurement at run time: the same call gives the same bits in
# every process. Below some 1000 warps an H100 (132 multiprocessors of 4 schedulers) is short of work.
ENOUGH_PROGRAMS = 1024


def _tile(d: Direction, directions: int) -> Tile:
    """Two channels a lane, then one, then the states spread over lanes: the fewer programs, the smaller."""
    d_state = d.A.shape[1]
    wide, narrow = (Tile.spread_over(triton.cdiv(d_state, 16), repeat) for repeat in (2, 1))
    if d.A.dtype == torch.float32 and wide.programs(d, directions) >= ENOUGH_PROGRAMS:
        return wide
    # Spreading halves the instructions of a warp but doubles those of all: what a step loads is loaded by more warps.
    enough = narrow.programs(d, directions) >= ENOUGH_PROGRAMS // 2
    return narrow if enough else Tile.spread_over(triton.cdiv(d_state, 4))


def forward(
    directions: Sequence[Direction], z: Tensor | None, *, dt_softplus: bool, scale: float, save: bool
) -> ScanOutput:
    """See `directions`.

    One direction is gated inside the scan. Two write their own y in u's dtype and a second kernel adds and gates them:
    at 16 bits 4 bytes more written and 4 more read for an element, where the scan reads 8 (u and dt of both).
    """
    directions = [direction_as_rows(d) for d in directions]
    d, count = directions[0], len(directions)
    batch, length, d_inner = d.u.shape
    chunks = triton.cdiv(length, CHECKPOINT_INTERVAL)
    z = None if z is None else as_rows(z)
    y = d.u.new_empty(d.u.shape)
    y_sum = d.u.new_empty(d.u.shape) if save and z is not None else None
    parts = y.unsqueeze(0) if count == 1 else d.u.new_empty(count, *d.u.shape)
    last_state = d.A.new_empty(count, batch, *d.A.shape)
    checkpoints = d.A.new_empty(count, batch, chunks, *d.A.shape) if save else None
    fused = count == 1
    with on_device_of(d.u):
        for part in launches(directions):
            d = directions[part.start]
            tile = _tile(d, part.stop - part.start)
            _forward_kernel[(tile.programs(d, part.stop - part.start),)](
                *columns(directions[part]),
                z if fused else None,
                parts[part],
                y_sum if fused else None,
                last_state[part],
                None if checkpoints is None else checkpoints[part],
                **sizes(d),
                **row_arguments(u=d.u, dt=d.dt, B=d.B, C=d.C, z=z if fused else None),
                REVERSE=tuple(d.reverse for d in directions[part]),
                SCALE=scale if fused else 1.0,
                SOFTPLUS=dt_softplus,
                **tile._asdict(),
                num_warps=1,
                num_stages=1,
            )
        if not fused:
            rows, block = 8, 128
            _gate_kernel[(batch * triton.cdiv(length, rows), triton.cdiv(d_inner, block))](
                parts,
                z,
                y,
                y_sum,
                batch,
                length,
                d_inner,
                **row_arguments(z=z),
                SCALE=scale,
                S=tl.float64 if d.A.dtype == torch.float64 else tl.float32,
                ROWS=rows,
                BLOCK=block,
            )
    none = d.A.new_empty(0)
    return ScanOutput(
        y,
        last_state,
        none if checkpoints is None else checkpoints,
        y.new_empty(0) if y_sum is None else y_sum,
    )
