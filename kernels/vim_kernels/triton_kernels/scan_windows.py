# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
"""Windows for the Triton scan: few long sequences are cut into pieces that run in parallel.

To the scan kernels a window is a separate sequence. They also need the state before each window, or for the backward
the adjoint after it. `_ends_kernel` runs only the recurrence over each window, starting from zero. `_starts_kernel`
then goes from window to window with `start' = exp(A sum(delta)) start + end`. This costs one more exponential per state
and step; it pays off if whole sequences would leave the GPU idle.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..directions import Direction
from ..rows import columns, cut_bytes, row_arguments, sizes
from .activations import LOG2E
from .tiles import (
    INTERVAL,
    Tile,
    along,
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
    unpack_all,
)
from .tuples import zeros


@triton.jit(
    do_not_specialize=["batch", "length", "window", "windows", "x_pitch", "dt_pitch", "B_pitch"],
)
def _ends_kernel(
    x,  # (B, L, E), one per direction: u, or for the adjoint dy
    dt,  # (B, L, E), likewise
    A,  # (E, N)
    B,  # (B, L, G, N): B, or for the adjoint C
    dt_bias,  # (E,) or None
    cuts,  # (B, L + 1) or None: whether packed sequences change before a step
    ends,  # (windows, directions, B, E, N)
    totals,  # (windows, directions, B, E): sums of delta; infinite if a sequence begins in the window
    batch,
    length,
    window,
    windows,
    d_inner,
    group_size,
    x_pitch,
    x_stride,
    dt_pitch,
    dt_stride,
    B_pitch,
    B_stride,
    REVERSE: tl.constexpr,  # per direction, of the scan
    ADJOINT: tl.constexpr,
    SCALE: tl.constexpr,  # of dy
    SOFTPLUS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    REPEAT: tl.constexpr,
    SPREAD: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
    X_PACK: tl.constexpr,
    DT_PACK: tl.constexpr,
    B_PACK: tl.constexpr,
):
    DIRECTIONS: tl.constexpr = len(REVERSE)
    TILES: tl.constexpr = (N + SPREAD - 1) // SPREAD
    EACH: tl.constexpr = SPREAD if SPREAD < T else T
    S: tl.constexpr = ends.dtype.element_ty
    X: tl.constexpr = x[0].dtype.element_ty
    DT: tl.constexpr = dt[0].dtype.element_ty
    pid = tl.program_id(0)
    blocks = tl.cdiv(group_size, REPEAT * LANES)
    group = pid // blocks % GROUPS
    b = (pid // (blocks * GROUPS) % batch).to(tl.int64)
    dirs = pid // (blocks * GROUPS) // batch % DIRECTIONS
    order = pid // (blocks * GROUPS) // batch // DIRECTIONS  # position of the window in processing order

    t = tl.arange(0, SPREAD * LANES)[:, None]
    p = t % SPREAD
    lane = t // SPREAD
    c = pid % blocks * (REPEAT * LANES) + lane * REPEAT
    channel = group * group_size + c
    inside, bias, _ = load_channels(c, channel, group_size, dt_bias, None, dirs, REPEAT, S)
    A_tiles = scaled(load_states(along(A, dirs) + channel * N, N, inside, N, REPEAT, SPREAD, S), LOG2E)
    h = zeros(REPEAT * TILES, t, S)
    sums = zeros(REPEAT, t, S)

    _, sign = heading(dirs, length, REVERSE)
    if cuts is not None:
        cuts += sign < 0
    if ADJOINT:
        sign = -sign
    at = tl.where(sign > 0, order, windows - 1 - order)
    end = tl.minimum(window, length - at * window)
    first = at * window + tl.where(sign > 0, 0, end - 1)
    x_step = (sign * x_stride).to(tl.int64)
    dt_step = (sign * dt_stride).to(tl.int64)
    B_step = (sign * B_stride).to(tl.int64)
    x_p = along(x, dirs) + ((b * x_pitch + first) * x_stride + channel) + p * x_step
    dt_p = along(dt, dirs) + ((b * dt_pitch + first) * dt_stride + channel) + p * dt_step
    B_p = along(B, dirs) + ((b * B_pitch + first) * B_stride + group * N + p * TILES) + lane * B_step

    if cuts is not None:
        cuts += (b * (length + 1) + first) + p * sign

    for step in tl.range(0, end, T, num_stages=STAGES):
        xs = load_steps(x_p, x_step, step, end, p, inside, T, REPEAT, SPREAD, X_PACK)
        dts = load_steps(dt_p, dt_step, step, end, p, inside, T, REPEAT, SPREAD, DT_PACK)
        Bs = load_rows(B_p, B_step, step, end, lane, p, N, T, SPREAD, LANES, B_PACK)
        if cuts is not None:
            begins = load_begins(cuts + step * sign, sign, step, end, p, T, SPREAD)
        x_p += T * x_step
        dt_p += T * dt_step
        B_p += T * B_step
        values, deltas = step_sizes(xs, dts, bias, step, end, p, SOFTPLUS, T, REPEAT, SPREAD, X_PACK, DT_PACK, X, DT, S)
        inputs = ()
        for j in tl.static_range(T // EACH):
            sums_j = ()
            for r in tl.static_range(REPEAT):
                total = tl.where(p < EACH, deltas[j * REPEAT + r], 0.0)
                if cuts is not None:
                    total = tl.where(begins[j] != 0, float("inf"), total)
                sums_j = sums_j + (sums[r] + total,)
                inputs = inputs + (values[j * REPEAT + r] * (SCALE if ADJOINT else deltas[j * REPEAT + r]),)
            sums = sums_j
        B_rows = unpack_all(Bs, TILES, B_PACK, B[0].dtype.element_ty, S)
        for k in tl.static_range(T):
            B_k = row_from_lane(B_rows, k, p, TILES, SPREAD, LANES)
            if cuts is not None:
                begins_k = from_lane(begins[k // EACH], t - p + k % EACH)
            h_k = ()
            for r in tl.static_range(REPEAT):
                delta_k = from_lane(deltas[k // EACH * REPEAT + r], t - p + k % EACH)
                x_k = from_lane(inputs[k // EACH * REPEAT + r], t - p + k % EACH)
                for i in tl.static_range(TILES):
                    decay = tl.exp2(delta_k * A_tiles[r * TILES + i])
                    if cuts is not None:
                        decay = tl.where(begins_k != 0, 0.0, decay)
                    if ADJOINT:
                        h_k = h_k + (decay * (h[r * TILES + i] + x_k * B_k[i]),)
                    else:
                        h_k = h_k + (decay * h[r * TILES + i] + x_k * B_k[i],)
            h = h_k

    row = (at.to(tl.int64) * DIRECTIONS + dirs) * batch + b
    store_states(ends + (row * d_inner + channel) * N, N, h, inside, N, REPEAT, SPREAD)
    for r in tl.static_range(REPEAT):
        total = fold((sums[r],), t, SPREAD, 1)[0]
        tl.store(totals + row * d_inner + channel + r, total, inside[r] & (p == 0))


@triton.jit(do_not_specialize=["batch", "windows"])
def _starts_kernel(
    ends,  # (windows, directions, B, E, N): each window's final state from zero; replaced by its initial state
    totals,  # (windows, directions, B, E)
    A,  # (E, N), one per direction
    start,  # (directions, B, E, N) or None: the initial state of the first window
    batch,
    windows,
    d_inner,
    REVERSE: tl.constexpr,  # per direction: whether processing starts at the last window
    PACKED: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    DIRECTIONS: tl.constexpr = len(REVERSE)
    db = tl.program_id(1)
    dirs = db // batch
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.arange(0, COLUMNS)[None, :]
    inside = (channel < d_inner) & (n < N)
    A_dn = tl.load(along(A, dirs) + channel * N + n, inside, 0.0) * LOG2E
    if start is not None:
        h = tl.load(start + (db.to(tl.int64) * d_inner + channel) * N + n, inside, 0.0)
    else:
        h = tl.zeros([ROWS, COLUMNS], ends.dtype.element_ty)
    backwards = dirs == 1 if DIRECTIONS == 2 else dirs == 0
    backwards = backwards == REVERSE[DIRECTIONS - 1]
    at = tl.where(backwards, windows - 1, 0)
    row = (at.to(tl.int64) * (DIRECTIONS * batch) + db) * d_inner + channel
    step = tl.where(backwards, -1, 1).to(tl.int64) * (DIRECTIONS * batch) * d_inner
    end = tl.load(ends + row * N + n, inside, 0.0)
    total = tl.load(totals + row, channel < d_inner, 0.0)
    for order in range(1, windows):
        # Load the next window's values before this one's are replaced.
        more = order < windows - 1
        next_end = tl.load(ends + (row + step) * N + n, inside & more, 0.0)
        next_total = tl.load(totals + row + step, (channel < d_inner) & more, 0.0)
        tl.store(ends + row * N + n, h, inside)
        kept = tl.exp2(A_dn * total) * h
        if PACKED:
            kept = tl.where(total == float("inf"), 0.0, kept)
        h = kept + end
        row += step
        end, total = next_end, next_total
    tl.store(ends + row * N + n, h, inside)


TRIED = ((3, 6), (3, 8))  # the first and the last version of Triton whose Gluon the kernel in scan_gluon was tried in

# Programs of 128 channels in both directions that an H200 runs at once, and the longest window in steps. Measured on an
# H100: no windows pay off if whole sequences already make more than an eighth of these programs.
PROGRAMS, LONGEST = 396, 768
# Measured on an H200: with fewer programs, not two for each multiprocessor, the smaller ones of `scan` are faster.
LEAST = 264


def in_gluon(
    directions: Sequence[Direction], z: Tensor | None, windows: int, dy: Tensor | None = None
) -> ModuleType | None:
    """scan_gluon if it takes a forward call, or with dy scan_gluon_backward if it takes the backward; else None."""
    if _programs(directions[0], len(directions)) * windows < LEAST:
        return None
    if not TRIED[0] <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= TRIED[1]:
        return None
    from . import scan_gluon, scan_gluon_backward  # another version may not have what they import

    if dy is not None:
        return scan_gluon_backward if scan_gluon_backward.takes_backward(directions, z, dy) else None
    return scan_gluon if scan_gluon.takes(directions, z) else None


def _programs(d: Direction, directions: int) -> float:
    """Programs for whole sequences; those of one direction count half."""
    batch, _, d_inner = d.u.shape
    return directions * batch * triton.cdiv(d_inner, 128) / 2


def window_length(d: Direction, directions: int) -> int:
    """Steps per window, the same for forward and backward; the whole length if there are enough rows.

    A function of shapes only, because both passes must agree. A multiple of twice the checkpoint interval, so that
    windows save as many states as whole sequences and `checkpoint_rows` need not know of them.
    """
    length, programs = d.u.shape[1], _programs(d, directions)
    if programs > PROGRAMS / 8:
        return length
    unit = 2 * INTERVAL
    # The fewest sequential steps; among equal choices the longest window.
    return min(range(LONGEST, 0, -unit), key=lambda w: math.ceil(programs * length / w / PROGRAMS) * w)


def window_starts(
    directions: Sequence[Direction],
    window: int,
    *,
    dt_softplus: bool,
    start: Tensor | None,
    z: Tensor | None = None,
    dy: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor | None:
    """State before each window, (windows, directions, B, E, N); for a single window `start`.

    With dy: the adjoint after each window, if scale * dy, gated by z, is the gradient of the ungated sum.
    `start`: (directions, B, E, N), the state before the sequence, or the adjoint after it.
    """
    d, count = directions[0], len(directions)
    batch, length, d_inner = d.u.shape
    windows = triton.cdiv(length, window)
    if windows == 1:
        return start
    adjoint = dy is not None
    ends = d.A.new_empty(windows, count, batch, *d.A.shape)
    totals = d.A.new_empty(windows, count, batch, d_inner)
    if in_gluon(directions, z, windows, dy) is not None:
        from . import scan_gluon

        outputs = None, None, ends, None, totals
        gate = None if dy is None else z
        scan_gluon.launch(directions, gate, None, outputs, window, dt_softplus=dt_softplus, scale=scale, dy=dy)
    else:
        _window_ends(directions, ends, totals, window, dt_softplus=dt_softplus, dy=dy, scale=scale)
    _starts_kernel[(triton.cdiv(d_inner, 16), count * batch)](
        ends,
        totals,
        columns(directions)[2],
        start,
        batch,
        windows,
        d_inner,
        REVERSE=tuple(each.reverse != adjoint for each in directions),
        PACKED=d.cuts is not None,
        N=d.A.shape[1],
        ROWS=16,
        COLUMNS=triton.next_power_of_2(d.A.shape[1]),
        num_warps=1,
    )
    return ends


def _window_ends(
    directions: Sequence[Direction],
    ends: Tensor,
    totals: Tensor,
    window: int,
    *,
    dt_softplus: bool,
    dy: Tensor | None,
    scale: float,
) -> None:
    """Write the state (with dy: the adjoint) after each window from zero, and the window's sums of delta."""
    d, adjoint = directions[0], dy is not None
    windows = triton.cdiv(d.u.shape[1], window)
    _, dt, A, _, _, _, dt_bias, _ = columns(directions)
    x = tuple(each.u if dy is None else dy for each in directions)
    rows = tuple(each.C if adjoint else each.B for each in directions)
    spread = spread_of_fours(d.A.shape[1])
    tile = Tile(4 if d.A.dtype == torch.float32 and spread <= 4 else 1, spread, 8)
    constants = tile.constants(directions)
    _ends_kernel[(tile.programs(d) * len(directions) * (windows - 1),)](
        x,
        dt,
        A,
        rows,
        dt_bias,
        cut_bytes(d),
        ends,
        totals,
        **sizes(d),
        window=window,
        windows=windows,
        **row_arguments(x=x[0], dt=d.dt, B=rows[0]),
        REVERSE=tuple(each.reverse for each in directions),
        ADJOINT=adjoint,
        SCALE=scale,
        SOFTPLUS=dt_softplus,
        STAGES=3,
        **{name: constants[name] for name in ("REPEAT", "SPREAD", "T", "LANES", "DT_PACK")},
        X_PACK=tile.pack(d, *x),
        B_PACK=constants["C_PACK" if adjoint else "B_PACK"],
        num_warps=1,
        num_stages=1,
    )
