# mypy: disable-error-code="assignment"
"""Backend `triton` of `rms_norm`: one pass over memory forward, one backward.

Only the inputs are saved: recomputing their mean of squares costs no memory traffic. The gradient of the weight is
summed in registers over the rows of a program, and by torch, in a fixed order, over programs. A program takes some rows
of one group of channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..precision import state_dtype
from ..rows import on_device_of
from .activations import sigmoid

# Programs of the backward. Each leaves one row of the weight's gradient for torch to sum.
PROGRAMS = 1024


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,  # (rows, groups, channels)
    weight,  # (groups, channels)
    gate,  # (rows, groups, channels), rows spaced by gate_stride
    y,  # (rows, groups, channels)
    rows,
    channels,
    stride,
    gate_stride,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two, at least `channels`
    S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    first = tl.program_id(1) * channels
    inside = (row < rows) & (column < channels)
    at = row * stride + first + column
    x_t = tl.load(x + at, inside, 0.0).to(S)
    if gate is not None:
        z = tl.load(gate + row * gate_stride + first + column, inside, 0.0).to(S)
        x_t *= z * sigmoid(z)
    w = tl.load(weight + first + column, column < channels, 0.0).to(S)
    scale = 1 / tl.sqrt(tl.sum(x_t * x_t, 1)[:, None] / channels + EPS)
    tl.store(y + at, x_t * scale * w, inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy,  # (rows, groups, channels)
    x,  # (rows, groups, channels)
    weight,  # (groups, channels)
    gate,  # (rows, groups, channels), rows spaced by gate_stride
    dx,  # (rows, groups, channels)
    d_weight,  # (programs, groups, channels)
    d_gate,  # (rows, groups, channels)
    rows,
    channels,
    stride,
    gate_stride,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    S: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)[None, :]
    first = tl.program_id(1) * channels
    w = tl.load(weight + first + column, column < channels, 0.0).to(S)
    total = tl.zeros([ROWS, COLUMNS], S)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < channels)
        at = row * stride + first + column
        x_t = tl.load(x + at, inside, 0.0).to(S)
        dy_t = tl.load(dy + at, inside, 0.0).to(S)
        gated = x_t
        if gate is not None:
            z = tl.load(gate + row * gate_stride + first + column, inside, 0.0).to(S)
            open = sigmoid(z)
            gated *= z * open
        scale = 1 / tl.sqrt(tl.sum(gated * gated, 1)[:, None] / channels + EPS)
        unit = gated * scale
        total += dy_t * unit
        dy_t *= w
        mean = tl.sum(dy_t * unit, 1)[:, None] / channels
        d_gated = (dy_t - unit * mean) * scale
        if gate is not None:
            tl.store(d_gate + at, d_gated * x_t * (open * (1 + z * (1 - open))), inside)
            d_gated *= z * open
        tl.store(dx + at, d_gated, inside)
    at = tl.program_id(0) * stride + first + column
    tl.store(d_weight + at, tl.sum(total, 0)[None, :], column < channels)


def _sizes(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, groups: int) -> dict[str, object]:
    channels = x.shape[-1] // groups
    columns = triton.next_power_of_2(channels)
    return {
        "rows": x.numel() // x.shape[-1],
        "channels": channels,
        "stride": x.shape[-1],
        "gate_stride": 0 if gate is None else gate.stride(0),
        "EPS": eps,
        "ROWS": max(1, 2048 // columns),
        "COLUMNS": columns,
        "S": tl.float64 if state_dtype(x, weight, gate) == torch.float64 else tl.float32,
        "num_warps": 4 if columns <= 2048 else 8,
    }


def _as_rows(gate: Tensor | None) -> Tensor | None:
    """(rows, channels), without copying a slice of a wider tensor."""
    if gate is None:
        return None
    gate = gate.reshape(-1, gate.shape[-1])
    return gate if gate.stride(1) == 1 else gate.contiguous()


def forward(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, groups: int, dtype: torch.dtype) -> Tensor:
    """See `rms_norm`."""
    x, gate = x.contiguous(), _as_rows(gate)
    y = x.new_empty(x.shape, dtype=dtype)
    sizes = _sizes(x, weight, gate, eps, groups)
    with on_device_of(x):
        grid = triton.cdiv(sizes["rows"], sizes["ROWS"]), groups
        _forward_kernel[grid](x, weight.contiguous(), gate, y, **sizes)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and gate in their dtypes; the last one is empty without a gate."""
    dy, x = dy.contiguous(), x.contiguous()
    d_gate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    gate = _as_rows(gate)
    sizes = _sizes(x, weight, gate, eps, groups)
    programs = min(PROGRAMS, triton.cdiv(sizes["rows"], sizes["ROWS"]))
    dx = x.new_empty(x.shape)
    parts = x.new_empty(programs, x.shape[-1], dtype=state_dtype(x, weight, gate))
    with on_device_of(x):
        _backward_kernel[(programs, groups)](dy, x, weight.contiguous(), gate, dx, parts, d_gate, **sizes)
    return dx, parts.sum(0).to(weight.dtype), d_gate
