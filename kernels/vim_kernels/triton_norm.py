# mypy: disable-error-code="assignment"
"""The kernels of `rms_norm`: a read of x and a write of y; for the gradients a read of both and a write of dx.

Nothing is saved but x: its mean of squares costs no memory traffic to find again. The gradient of the weight is summed
over the rows of a program in registers, and over programs, in a fixed order, by torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import on_device_of

# Programs that share the rows in the backward: each adds a row to the sum that is left to torch.
PROGRAMS = 1024


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,  # (rows, channels)
    weight,  # (channels,)
    y,  # (rows, channels)
    rows,
    channels,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two, channels at least
    S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < channels)
    at = row * channels + column
    x_t = tl.load(x + at, inside, 0.0).to(S)
    w = tl.load(weight + column, column < channels, 0.0).to(S)
    scale = 1 / tl.sqrt(tl.sum(x_t * x_t, 1)[:, None] / channels + EPS)
    tl.store(y + at, x_t * scale * w, inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy,  # (rows, channels)
    x,  # (rows, channels)
    weight,  # (channels,)
    dx,  # (rows, channels)
    d_weight,  # (programs, channels)
    rows,
    channels,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    S: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[None, :]
    w = tl.load(weight + column, column < channels, 0.0).to(S)
    total = tl.zeros([ROWS, COLUMNS], S)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < channels)
        at = row * channels + column
        x_t = tl.load(x + at, inside, 0.0).to(S)
        dy_t = tl.load(dy + at, inside, 0.0).to(S)
        scale = 1 / tl.sqrt(tl.sum(x_t * x_t, 1)[:, None] / channels + EPS)
        unit = x_t * scale
        total += dy_t * unit
        dy_t *= w
        mean = tl.sum(dy_t * unit, 1)[:, None] / channels
        tl.store(dx + at, (dy_t - unit * mean) * scale, inside)
    tl.store(d_weight + tl.program_id(0) * channels + column, tl.sum(total, 0)[None, :], column < channels)


def _constants(x: Tensor, eps: float) -> dict[str, object]:
    columns = triton.next_power_of_2(x.shape[-1])
    rows = max(1, 2048 // columns)
    return {
        "EPS": eps,
        "ROWS": rows,
        "COLUMNS": columns,
        "S": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": 4 if columns <= 2048 else 8,
    }


def forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `rms_norm`."""
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(x.shape, dtype=dtype)
    rows, constants = x.numel() // x.shape[-1], _constants(x, eps)
    with on_device_of(x):
        _forward_kernel[(triton.cdiv(rows, constants["ROWS"]),)](x, weight, y, rows, x.shape[-1], **constants)
    return y


def backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, in their dtypes."""
    dy, x = dy.contiguous(), x.contiguous()
    rows, constants = x.numel() // x.shape[-1], _constants(x, eps)
    programs = min(PROGRAMS, triton.cdiv(rows, constants["ROWS"]))
    dx = x.new_empty(x.shape)
    parts = x.new_empty(programs, x.shape[-1], dtype=torch.promote_types(torch.float32, x.dtype))
    with on_device_of(x):
        _backward_kernel[(programs,)](dy, x, weight.contiguous(), dx, parts, rows, x.shape[-1], **constants)
    return dx, parts.sum(0).to(weight.dtype)
