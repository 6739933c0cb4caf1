# mypy: disable-error-code="assignment"
"""Backend `triton` of `swiglu` and `biased_swiglu`: one pass over memory forward, one backward; only inputs are saved.

A program takes a block of channels and walks along a chunk of rows: it loads the biases once, and sums their gradients
in registers. The sums over programs have a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..precision import state_dtype
from ..rows import as_matrix, contiguous, on_device_of
from .activations import sigmoid, sigmoids
from .column_sums import column_sums

# Channels of a program, rows at a time; with sums in registers, programs of a launch and loads in flight.
CHANNELS, ROWS, PROGRAMS, STAGES = 256, 2, 2112, 2


@triton.jit(do_not_specialize=["rows", "chunk"])
def _forward_kernel(
    gate,  # (rows, channels), rows spaced by gate_stride
    x,  # (rows, channels), rows spaced by x_stride
    bias,  # (2, channels), of gate and x, or None
    y,  # (rows, channels)
    rows,
    chunk,
    channels,
    gate_stride,
    x_stride,
    S: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = channel < channels
    if bias is not None:
        gate_bias = tl.load(bias + channel, there, 0.0).to(S)
        x_bias = tl.load(bias + channels + channel, there, 0.0).to(S)
    begin = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, rows)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < end) & there
        g = tl.load(gate + row * gate_stride + channel, inside, 0.0).to(S)
        x_t = tl.load(x + row * x_stride + channel, inside, 0.0).to(S)
        if bias is not None:
            g += gate_bias
            x_t += x_bias
        tl.store(y + row * channels + channel, g * sigmoid(g) * x_t, inside)


@triton.jit(do_not_specialize=["rows", "chunk"])
def _backward_kernel(
    dy,  # (rows, channels)
    gate,  # (rows, channels), rows spaced by gate_stride
    x,  # (rows, channels), rows spaced by x_stride
    bias,  # (2, channels), of gate and x, or None
    d_gate,  # (rows, channels), rows spaced by d_stride
    dx,  # (rows, channels), rows spaced by d_stride
    d_bias,  # (chunks, 2, channels) or None
    rows,
    chunk,
    channels,
    gate_stride,
    x_stride,
    d_stride,
    S: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = channel < channels
    if bias is not None:
        gate_bias = tl.load(bias + channel, there, 0.0).to(S)
        x_bias = tl.load(bias + channels + channel, there, 0.0).to(S)
        gate_sum = tl.zeros([CHANNELS], S)
        x_sum = tl.zeros([CHANNELS], S)
    begin = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, rows)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < end) & there
        dy_t = tl.load(dy + row * channels + channel, inside, 0.0).to(S)
        g = tl.load(gate + row * gate_stride + channel, inside, 0.0).to(S)
        x_t = tl.load(x + row * x_stride + channel, inside, 0.0).to(S)
        if bias is not None:
            g += gate_bias
            x_t += x_bias
        open, closed = sigmoids(g)
        d_x = dy_t * g * open
        d_g = dy_t * x_t * open * (1 + g * closed)
        tl.store(dx + row * d_stride + channel, d_x, inside)
        tl.store(d_gate + row * d_stride + channel, d_g, inside)
        if bias is not None:
            gate_sum += tl.sum(d_g, 0)
            x_sum += tl.sum(d_x, 0)
    if bias is not None:
        d_bias += tl.program_id(0).to(tl.int64) * 2 * channels + channel
        tl.store(d_bias, gate_sum[None, :], there)
        tl.store(d_bias + channels, x_sum[None, :], there)


def _view(t: Tensor) -> Tensor:
    """(rows, channels)"""
    return t.view(-1, t.shape[-1])


def _launch(x: Tensor, *others: Tensor | None, walks: bool) -> tuple[tuple[int, int], dict[str, Any]]:
    rows, channels = x.shape
    blocks = triton.cdiv(channels, CHANNELS)
    chunk = triton.cdiv(rows, max(1, PROGRAMS // blocks)) if walks else ROWS
    wide = tl.float64 if state_dtype(x, *others) == torch.float64 else tl.float32
    sizes = {
        "rows": rows,
        "chunk": chunk,
        "channels": channels,
        "S": wide,
        "STAGES": STAGES if walks else 1,
        "ROWS": ROWS,
        "CHANNELS": CHANNELS,
    }
    return (triton.cdiv(rows, chunk), blocks), sizes | {"num_warps": 1}  # only the first dimension may be large


def forward(gate: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `swiglu`; bias: (2 * channels,), added to gate and x."""
    y = x.new_empty(x.shape)
    gate, x, bias = as_matrix(gate), as_matrix(x), contiguous(bias)
    grid, sizes = _launch(x, gate, bias, walks=False)
    with on_device_of(x):
        _forward_kernel[grid](gate, x, bias, y, gate_stride=gate.stride(0), x_stride=x.stride(0), **sizes)
    return y


def backward(dy: Tensor, gate: Tensor, x: Tensor, bias: Tensor | None, d_gate: Tensor, dx: Tensor) -> Tensor | None:
    """Write the gradients of gate and x into d_gate and dx. Returns: that of the bias."""
    dy, gate, x, d_gate, dx = as_matrix(dy).contiguous(), as_matrix(gate), as_matrix(x), _view(d_gate), _view(dx)
    grid, sizes = _launch(x, gate, bias, walks=bias is not None)
    parts = None
    if bias is not None:
        bias = bias.contiguous()
        parts = x.new_empty(grid[0], 2 * x.shape[1], dtype=state_dtype(x, gate, bias))
    strides = {"gate_stride": gate.stride(0), "x_stride": x.stride(0), "d_stride": dx.stride(0)}
    with on_device_of(x):
        _backward_kernel[grid](dy, gate, x, bias, d_gate, dx, parts, **strides, **sizes)
        return None if parts is None or bias is None else column_sums(parts, bias.new_empty(bias.shape))
