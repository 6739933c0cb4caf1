"""Backend `cpu` of the selective scan: passes tensors to csrc/scan.c."""

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from . import cpu
from .directions import Direction, DirectionGrads, ScanOutput, checkpoint_rows


def _fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class _Direction(ctypes.Structure):
    _fields_ = (
        *_fields(cpu.Sequence, "u dt B C z y y_sum"),
        *_fields(ctypes.c_void_p, "A D dt_bias initial_state last_state checkpoints"),
        ("starts", cpu.Sequence),
        *_fields(cpu.Sequence, "dy dz du ddt dB dC"),
        *_fields(ctypes.c_void_p, "d_last_state dA dD d_bias d_initial_state dt_proj"),
    )


class _Scan(cpu.Call):
    _fields_: ClassVar[tuple] = (
        *_fields(ctypes.c_int64, "batch length d_inner d_state groups directions softplus dt_rank"),
        ("scale", ctypes.c_double),
        ("direction", _Direction * 2),
    )


_Arguments = tuple[dict[str, Tensor | None], dict[str, Tensor | None]]  # sequences and arrays of a direction


def forward(
    directions: Sequence[Direction], z: Tensor | None, *, dt_softplus: bool, scale: float, save: bool
) -> ScanOutput:
    """See `directions`."""
    u, A = directions[0].u, directions[0].A
    dtype = A.dtype  # of every tensor that the kernel gets
    batch, length, d_inner = u.shape
    states = (batch, d_inner, A.shape[1])
    y = cpu.empty(u.shape, dtype)
    y_sum = cpu.empty(u.shape if save and z is not None else (0,), dtype)
    last_state = cpu.empty((len(directions), *states), dtype)
    rows = checkpoint_rows(length, len(directions))
    checkpoints = cpu.empty((len(directions), batch, rows, *states[1:]) if save else (0,), dtype)

    shared = {"z": cpu.readable(z, dtype), "y": y, "y_sum": y_sum if y_sum.numel() else None}
    arguments = []
    for i, d in enumerate(directions):
        sequences, arrays = _inputs(d, dtype)
        arrays |= {"last_state": last_state[i], "checkpoints": checkpoints[i] if save else None}
        arguments.append((sequences | shared, arrays))
    _run("scan_forward", directions, arguments, dt_softplus, scale)
    return ScanOutput(y.to(u.dtype), last_state, checkpoints, y_sum.to(u.dtype))


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
    dtype = directions[0].A.dtype
    shared = {"dy": cpu.readable(dy, dtype)}
    if z is not None:
        dz = cpu.empty(dy.shape, dtype)
        shared |= {"z": cpu.readable(z, dtype), "y_sum": cpu.readable(y_sum, dtype), "dz": dz}
    grads, arguments = [], []
    for i, d in enumerate(directions):
        grad = DirectionGrads._make(None if t is None else cpu.empty(t.shape, dtype) for t in d.tensors())
        sequences, arrays = _inputs(d, dtype)
        sequences |= {"du": grad.u, "ddt": grad.dt, "dB": grad.B, "dC": grad.C}
        arrays |= {"dA": grad.A, "dD": grad.D, "d_bias": grad.dt_bias, "d_initial_state": grad.initial_state}
        arrays |= {"checkpoints": cpu.dense(checkpoints[i], dtype), "d_last_state": None}
        if d_last_state is not None:
            arrays["d_last_state"] = cpu.dense(d_last_state[i], dtype)
        grads.append(grad)
        arguments.append((sequences | shared, arrays))
    _run("scan_backward", directions, arguments, dt_softplus, scale)
    return [
        DirectionGrads._make(
            None if g is None or t is None else g.to(t.dtype) for g, t in zip(grad, d.tensors(), strict=True)
        )
        for grad, d in zip(grads, directions, strict=True)
    ], None if z is None else dz.to(z.dtype)


def _inputs(d: Direction, dtype: torch.dtype) -> _Arguments:
    return (
        {"u": cpu.readable(d.u, dtype), "dt": cpu.readable(d.dt, dtype)}
        | {
            "B": cpu.readable(d.B, dtype),
            "C": cpu.readable(d.C, dtype),
            "starts": cpu.per_step(d.starts(), torch.bool),
        },
        {"A": cpu.dense(d.A, dtype), "D": cpu.dense(d.D, dtype), "dt_bias": cpu.dense(d.dt_bias, dtype)}
        | {"initial_state": cpu.dense(d.initial_state, dtype)},
    )


def _run(
    kernel: str, directions: Sequence[Direction], arguments: list[_Arguments], dt_softplus: bool, scale: float
) -> None:
    d = directions[0]
    batch, length, groups, d_state = d.B.shape
    scan = _Scan(
        batch=batch,
        length=length,
        d_inner=d.u.shape[2],
        d_state=d_state,
        groups=groups,
        directions=len(directions),
        softplus=dt_softplus,
        scale=scale,
    )
    for i, (sequences, arrays) in enumerate(arguments):
        cpu.fill(scan.direction[i], sequences, arrays, directions[i].reverse)
    cpu.run(kernel, d.A.dtype, scan)
