# mypy: disable-error-code="assignment"
"""Sums over the rows of a matrix, in a fixed order: how gradients of weights and biases add up over programs."""

import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # elements of a program at a time: all loads of a few thousand rows are in flight at once


@triton.jit(do_not_specialize=["count", "out_stride", "divisor"])
def _sums_kernel(
    parts,  # (batch, count, columns)
    out,  # (batch, columns), rows spaced by out_stride
    count,
    columns,
    out_stride,
    divisor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < columns
    total = tl.zeros([ROWS, COLUMNS], parts.dtype.element_ty)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(parts + (b * count + row) * columns + column[None, :], (row < count) & there[None, :], 0.0)
    tl.store(out + b * out_stride + column, tl.sum(total, 0) / divisor, there)


def column_sums(parts: Tensor, out: Tensor, divisor: int = 1) -> Tensor:
    """Write the sums of parts (count, columns), over `divisor`, into out (columns,) and return it.

    With a batch: parts (batch, count, columns), out (batch, columns), whose rows may be apart.
    """
    count, columns = parts.shape[-2:]
    rows = 64 if count <= 64 else 2048
    block = TILE // rows
    batch, stride = (parts.shape[0], out.stride(0)) if parts.dim() == 3 else (1, 0)
    _sums_kernel[(batch, triton.cdiv(columns, block))](
        parts, out, count, columns, stride, divisor, ROWS=rows, COLUMNS=block, num_warps=8
    )
    return out


@triton.jit(do_not_specialize=["count", "columns", "first_columns", "second_columns"])
def _split_sums_kernel(
    parts,  # (directions, count, columns)
    first,  # (first_columns,), one per direction: sums of the first columns
    second,  # (second_columns,) or None: of those behind
    third,  # or None: of the remaining ones
    count,
    columns,
    first_columns,
    second_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of all parts in fp32, in a fixed order."""
    d = tl.program_id(1)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    parts += d.to(tl.int64) * count * columns + column
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        there = (start + row < count) & (column < columns)
        sums += tl.load(parts + (start + row).to(tl.int64) * columns, there, 0.0).to(tl.float32)
    total = tl.sum(sums, 0)[None, :]
    tl.store(tl.where(d == 0, first[0], first[len(first) - 1]) + column, total, column < first_columns)
    column -= first_columns
    inside = (column >= 0) & (column < second_columns)
    if second is not None:
        tl.store(tl.where(d == 0, second[0], second[len(second) - 1]) + column, total, inside)
    if third is not None:
        column -= second_columns
        inside = (column >= 0) & (column < columns - first_columns - second_columns)
        tl.store(tl.where(d == 0, third[0], third[len(third) - 1]) + column, total, inside)


def split_sums(
    parts: Tensor,
    first: tuple[Tensor, ...],
    second: tuple[Tensor, ...] | None,
    third: tuple[Tensor, ...] | None,
) -> None:
    """Write sums over parts (directions, count, columns) into each direction's `first`, `second` and `third`.

    Each takes as many columns as it has elements; those of an absent one, as many as the other behind `first` has.
    """
    directions, count, columns = parts.shape
    rows = min(64, triton.next_power_of_2(count))
    width = (second or third or first)[0].numel()
    _split_sums_kernel[(triton.cdiv(columns, TILE // rows), directions)](
        parts, first, second, third, count, columns, first[0].numel(), width, ROWS=rows, COLUMNS=TILE // rows
    )
