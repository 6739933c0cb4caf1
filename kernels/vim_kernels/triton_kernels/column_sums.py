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
