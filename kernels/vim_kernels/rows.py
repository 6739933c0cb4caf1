"""Sequences as (batch, length) rows of channels or states, as the Triton kernels address them."""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .directions import Direction


def as_rows(t: Tensor) -> Tensor:
    """t (B, L, ...), copied unless each row t[b, l] is contiguous and `row_strides` can express the row spacing."""
    batch, length = t.shape[:2]
    even = batch == 1 or length == 1 or (t.stride(1) > 0 and t.stride(0) % t.stride(1) == 0)
    return t if even and t[0, 0].is_contiguous() else t.contiguous()


def as_matrix(t: Tensor) -> Tensor:
    """t (..., channels) as (rows, channels); a slice of the channels of a wider tensor is not copied."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def contiguous(t: Tensor | None) -> Tensor | None:
    """t, copied unless it is contiguous; None without a tensor."""
    return None if t is None else t.contiguous()


def row_strides(t: Tensor) -> tuple[int, int]:
    """(pitch, stride) of a result of `as_rows`: row l of batch entry b begins at element (b * pitch + l) * stride.

    The stride alone determines the alignment of rows. So kernels need no specialisation on the pitch, which changes
    with L.
    """
    batch, length = t.shape[:2]
    if length == 1:
        return 1, t.stride(0)
    return (0 if batch == 1 else t.stride(0) // t.stride(1)), t.stride(1)


def row_arguments(**tensors: Tensor | None) -> dict[str, int]:
    """Kernel arguments <name>_pitch and <name>_stride of each tensor; 0 if it is None."""
    arguments = {}
    for name, t in tensors.items():
        arguments[f"{name}_pitch"], arguments[f"{name}_stride"] = (0, 0) if t is None else row_strides(t)
    return arguments


def row_arguments_of_eights(**tensors: Tensor | None) -> dict[str, int]:
    """`row_arguments`, the stride as <name>_stride8, in eights: so the compiler sees that rows are aligned."""
    arguments = row_arguments(**tensors)
    for name in tensors:
        arguments[f"{name}_stride8"] = arguments.pop(f"{name}_stride") // 8
    return arguments


def direction_as_rows(d: Direction) -> Direction:
    """The sequences as rows, all else contiguous."""
    u, dt, B, C = (as_rows(t) for t in (d.u, d.dt, d.B, d.C))
    D, dt_bias, initial_state = map(contiguous, (d.D, d.dt_bias, d.initial_state))
    return Direction(u, dt, d.A.contiguous(), B, C, D, dt_bias, initial_state, d.reverse, d.cuts)


def columns(directions: Sequence[Direction]) -> list[tuple[Tensor, ...] | None]:
    """The tensors field by field; None for an absent field."""
    return [None if column[0] is None else column for column in zip(*(d.tensors() for d in directions), strict=True)]


def agreeing(directions: Sequence[Direction]) -> list[Direction]:
    """The directions as rows. Each field gets one dtype and the same strides, so that one launch takes all."""
    rows = [direction_as_rows(d) for d in directions]
    fields = []
    for tensors in zip(*(d.tensors() for d in rows), strict=True):
        present = [t for t in tensors if t is not None]
        if any(t.dtype != present[0].dtype or t.stride() != present[0].stride() for t in present):
            dtype = functools.reduce(torch.promote_types, (t.dtype for t in present))
            tensors = tuple(None if t is None else t.to(dtype).contiguous() for t in tensors)
        fields.append(tensors)
    pairs = zip(zip(*fields, strict=True), directions, strict=True)
    return [Direction._make((*tensors, d.reverse, d.cuts)) for tensors, d in pairs]


def cut_bytes(d: Direction) -> Tensor | None:
    """Cuts between packed sequences as kernels read them: (B, L + 1) of 0 and 1, contiguous."""
    return None if d.cuts is None else d.cuts.contiguous().view(torch.uint8)


def sizes(d: Direction) -> dict[str, int]:
    """Size arguments of the scan kernels."""
    batch, length, d_inner = d.u.shape
    groups, d_state = d.B.shape[2:]
    return {
        "batch": batch,
        "length": length,
        "d_inner": d_inner,
        "group_size": d_inner // groups,
        "GROUPS": groups,
        "N": d_state,
    }


def on_device_of(t: Tensor) -> AbstractContextManager:
    """Make the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
