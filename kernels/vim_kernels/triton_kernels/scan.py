"""Backend `triton` of the scan: channel-last, no atomics, bit-identical between runs.

`scan_gluon` and `scan_gluon_backward` take the calls that they can, `scan_plain` all others. `scan_windows` cuts few
long sequences into windows.
"""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import triton
from torch import Tensor

from ..directions import Direction, DirectionGrads, ScanOutput
from ..rows import agreeing, as_rows, contiguous, on_device_of
from . import scan_plain
from .scan_plain import checkpoint_rows
from .scan_windows import window_length, window_starts

__all__ = ["backward", "checkpoint_rows", "forward"]

TRIED = ((3, 6), (3, 8))  # the first and the last version of Triton whose Gluon the kernel in scan_gluon was tried in


def _modules(
    directions: Sequence[Direction], z: Tensor | None, dy: Tensor | None = None
) -> tuple[ModuleType, ModuleType]:
    """What runs a forward call, or with dy the recurrence of the adjoint, and what runs the backward."""
    if _tried(triton.__version__):
        from . import scan_gluon, scan_gluon_backward  # another version may not have what they import

        if dy is None and scan_gluon.takes(directions, z):
            return scan_gluon, scan_plain
        if dy is not None and scan_gluon_backward.takes_backward(directions, z, dy):
            return scan_gluon, scan_gluon_backward
    return scan_plain, scan_plain


@functools.cache
def _tried(version: str) -> bool:
    return TRIED[0] <= tuple(int(part) for part in version.split(".")[:2]) <= TRIED[1]


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
    # Only single directions have an initial state.
    initial = None if d.initial_state is None else d.initial_state.to(d.A.dtype).unsqueeze(0)

    def run(ends: Tensor, totals: Tensor) -> None:
        outputs = None, None, ends, None, totals
        _modules(directions, None)[0].launch(directions, None, None, outputs, window, dt_softplus=dt_softplus)

    with on_device_of(d.u):
        starts = window_starts(directions, window, initial, run)
        outputs = y, y_sum, last_state, checkpoints, None
        _modules(directions, z)[0].launch(directions, z, starts, outputs, window, dt_softplus=dt_softplus, scale=scale)
    none = d.A.new_empty(0)
    return ScanOutput(
        y,
        last_state,
        none if checkpoints is None else checkpoints,
        y.new_empty(0) if y_sum is None else y_sum,
    )


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
    given, directions = directions, agreeing(directions)
    d, count = directions[0], len(directions)
    dy, z = as_rows(dy), None if z is None else as_rows(z)
    window = window_length(d, count)
    end = contiguous(d_last_state)
    options: dict[str, Any] = {"dt_softplus": dt_softplus, "scale": scale}
    recurrence, gradients = _modules(directions, z, dy)

    def run(ends: Tensor, totals: Tensor) -> None:
        outputs = None, None, ends, None, totals
        recurrence.launch(directions, z, None, outputs, window, dy=dy, **options)

    with on_device_of(dy):
        starts = window_starts(directions, window, end, run, adjoint=True)
        found, dz = gradients.launch_backward(dy, directions, z, starts, checkpoints, y_sum, window, **options)
    grads = [
        DirectionGrads._make(_like(t, of) for t, of in zip(own, to.tensors(), strict=True))
        for own, to in zip(found, given, strict=True)
    ]
    return grads, dz


def _like(found: Tensor | None, given: Tensor | None) -> Tensor | None:
    """The gradient `found` in the dtype of its tensor."""
    return None if found is None or given is None else found.to(given.dtype)
