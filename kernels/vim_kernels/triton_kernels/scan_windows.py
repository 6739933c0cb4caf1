"""Windows for the Triton scan: few long sequences are cut into pieces that run in parallel.

To the scan kernels a window is a separate sequence. They also need the state before each window, or for the backward
the adjoint after it. First they run only the recurrence over each window, starting from zero. `_starts_kernel` then
goes from window to window with `start' = exp(A sum(delta)) start + end`. This costs one more exponential per state and
step; it pays off if whole sequences would leave the GPU idle.
"""

import math
from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..directions import Direction
from ..rows import columns
from .activations import LOG2E
from .scan_plain import INTERVAL


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
    A_dn = tl.load(tl.where(dirs == 0, A[0], A[DIRECTIONS - 1]) + channel * N + n, inside, 0.0) * LOG2E
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


# Programs of 128 channels in both directions that an H200 runs at once, and the longest window in steps. Measured on an
# H100: no windows pay off if whole sequences already make more than an eighth of these programs.
PROGRAMS, LONGEST = 396, 768


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
    start: Tensor | None,
    run: Callable[[Tensor, Tensor], None],
    *,
    adjoint: bool = False,
) -> Tensor | None:
    """State before each window, (windows, directions, B, E, N), or the adjoint after it; for a single window `start`.

    start: (directions, B, E, N), the state before the sequence, or the adjoint after it.
    run: runs the recurrence, or that of the adjoint, over each window from zero. It writes the states at the ends,
        (windows, directions, B, E, N), and the sums of delta, (windows, directions, B, E); see `scan_plain`.
    """
    d, count = directions[0], len(directions)
    batch, length, d_inner = d.u.shape
    windows = triton.cdiv(length, window)
    if windows == 1:
        return None if start is None else start.unsqueeze(0)
    ends = d.A.new_empty(windows, count, batch, *d.A.shape)
    totals = d.A.new_empty(windows, count, batch, d_inner)
    run(ends, totals)
    states = triton.next_power_of_2(d.A.shape[1])
    rows = max(1, min(16, 256 // states))
    _starts_kernel[(triton.cdiv(d_inner, rows), count * batch)](
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
        ROWS=rows,
        COLUMNS=states,
        num_warps=1,
    )
    return ends
