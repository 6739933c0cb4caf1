# mypy: disable-error-code="assignment"
"""Backend `triton` of `rms_norm` and of the residual stream around it: one pass over memory forward, one backward.

A kernel does, row by row, whatever of this a call asks for:

    stream = x + (branch + bias) * scale          y = norm(stream, or x * silu(gate)) * weight

Only its inputs are saved: recomputing their mean of squares costs no memory traffic. A warp takes whole rows as long as
they fit into its registers, so that sums over channels need no barrier. Gradients of weight and bias are summed in
registers over the rows of a program and then, in a fixed order, over programs.

With a heading, a second sequence (the branch, or y) has a row more, in front, for the mean of y. In reverse it has the
tokens from last to first, but for the last one, which stays.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..precision import state_dtype
from ..rows import as_matrix, contiguous, on_device_of
from .activations import sigmoid
from .column_sums import column_sums

# Where sums stay in registers a program takes many rows, and loads them two ahead: else loads would wait for sums.
# PROGRAMS is the number of programs of one warp, eight on each multiprocessor of an H200.
PROGRAMS, STAGES = 1056, 3


@triton.jit
def _place(token, length, HEADING: tl.constexpr, REVERSE: tl.constexpr):
    """The row of a token in the second sequence."""
    if HEADING and REVERSE:
        return tl.where(token == length - 1, length, length - 1 - token)
    elif HEADING:
        return token + 1
    else:
        return token


@triton.jit(do_not_specialize=["length", "chunk"])
def _forward_kernel(
    x,  # (batch, length, groups, channels)
    branch,  # (batch, length, groups, channels), with a heading (batch, length + 1, ...); or None
    bias,  # (groups, channels) or None
    scale,  # (batch,) or None
    gate,  # (batch, length, groups, channels), rows spaced by gate_stride; or None
    weight,  # (groups, channels) or None
    stream,  # as x, or None
    y,  # as x; with a heading and without a branch (batch, length + 1, groups, channels); None without a weight
    sums,  # (batch, chunks, groups, channels), of y in a chunk, or None
    length,
    chunk,
    channels,
    stride,
    gate_stride,
    EPS: tl.constexpr,
    HEADING: tl.constexpr,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two, at least `channels`
    S: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunks = tl.cdiv(length, chunk)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * chunk
    end = tl.minimum(begin + chunk, length)
    column = tl.arange(0, COLUMNS)[None, :]
    there = column < channels
    column += tl.program_id(1) * channels
    if weight is not None:
        w = tl.load(weight + column, there, 0.0).to(S)
    if sums is not None:
        total = tl.zeros([COLUMNS], S)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)[:, None]
        inside = (token < end) & there
        row = b * length + token
        other = b * (length + HEADING) + _place(token, length, HEADING, REVERSE)
        x_t = tl.load(x + row * stride + column, inside, 0.0).to(S)
        if branch is not None:
            added = tl.load(branch + other * stride + column, inside, 0.0).to(S)
            if bias is not None:
                added += tl.load(bias + column, there, 0.0).to(S)
            if scale is not None:
                added *= tl.load(scale + b).to(S)
            x_t += added
        if stream is not None:
            rounded = x_t.to(stream.dtype.element_ty)
            tl.store(stream + row * stride + column, rounded, inside)
            x_t = rounded.to(S)  # the norm of what the backward will read
        if gate is not None:
            z = tl.load(gate + row * gate_stride + column, inside, 0.0).to(S)
            x_t *= z * sigmoid(z)
        if weight is not None:
            y_t = x_t * (1 / tl.sqrt(tl.sum(x_t * x_t, 1)[:, None] / channels + EPS)) * w
            tl.store(y + (other if branch is None else row) * stride + column, y_t, inside)
            if sums is not None:
                total += tl.sum(y_t, 0)
    if sums is not None:
        tl.store(sums + tl.program_id(0).to(tl.int64) * stride + column, total[None, :], there)


@triton.jit(do_not_specialize=["length", "chunk"])
def _backward_kernel(
    d_stream,  # as dx, or None
    dy,  # as y of the forward, or None
    x,  # (batch, length, groups, channels), what was normalised
    gate,  # (batch, length, groups, channels), rows spaced by gate_stride; or None
    weight,  # (groups, channels) or None
    scale,  # (batch,) or None
    dx,  # (batch, length, groups, channels), None without a weight: d_stream is the gradient then
    d_branch,  # as branch of the forward, or None
    d_gate,  # (batch, length, groups, channels) or None
    d_weight,  # (programs, groups, channels)
    d_bias,  # (programs, groups, channels) or None
    length,
    chunk,
    channels,
    stride,
    gate_stride,
    EPS: tl.constexpr,
    HEADING: tl.constexpr,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    S: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunks = tl.cdiv(length, chunk)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * chunk
    end = tl.minimum(begin + chunk, length)
    column = tl.arange(0, COLUMNS)[None, :]
    there = column < channels
    column += tl.program_id(1) * channels
    if weight is not None:
        w = tl.load(weight + column, there, 0.0).to(S)
        weight_sum = tl.zeros([COLUMNS], S)
    if d_bias is not None:
        bias_sum = tl.zeros([COLUMNS], S)
    if HEADING:
        heading = b * (length + 1) * stride + column
        if d_branch is not None:
            tl.store(d_branch + heading, tl.zeros([1, COLUMNS], S), there & (begin == 0))
        else:
            d_mean = tl.load(dy + heading, there, 0.0).to(S) / length
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)[:, None]
        inside = (token < end) & there
        row = b * length + token
        other = b * (length + HEADING) + _place(token, length, HEADING, REVERSE)
        d = tl.zeros([ROWS, COLUMNS], S)
        if d_stream is not None:
            d += tl.load(d_stream + row * stride + column, inside, 0.0).to(S)
        if weight is not None:
            x_t = tl.load(x + row * stride + column, inside, 0.0).to(S)
            dy_t = tl.load(dy + (other if d_branch is None else row) * stride + column, inside, 0.0).to(S)
            if HEADING and d_branch is None:
                dy_t += tl.where(token < end, d_mean, 0.0)
            gated = x_t
            if gate is not None:
                z = tl.load(gate + row * gate_stride + column, inside, 0.0).to(S)
                open = sigmoid(z)
                gated *= z * open
            inverse = 1 / tl.sqrt(tl.sum(gated * gated, 1)[:, None] / channels + EPS)
            unit = gated * inverse
            weight_sum += tl.sum(dy_t * unit, 0)
            dy_t *= w
            mean = tl.sum(dy_t * unit, 1)[:, None] / channels
            d_gated = (dy_t - unit * mean) * inverse
            if gate is not None:
                slope = open + z * open * (1 - open)
                tl.store(d_gate + row * stride + column, d_gated * x_t * slope, inside)
                d_gated *= z * open
            d += d_gated
            tl.store(dx + row * stride + column, d, inside)
        if scale is not None:
            d *= tl.load(scale + b).to(S)
        if d_branch is not None:
            tl.store(d_branch + other * stride + column, d, inside)
        if d_bias is not None:
            bias_sum += tl.sum(d, 0)
    part = tl.program_id(0).to(tl.int64) * stride + column
    if weight is not None:
        tl.store(d_weight + part, weight_sum[None, :], there)
    if d_bias is not None:
        tl.store(d_bias + part, bias_sum[None, :], there)


class _Launch:
    """Grid and sizes of a launch over sequences (batch, length, groups * channels).

    walks: a program takes many rows.
    """

    def __init__(
        self, batch: int, length: int, width: int, groups: int, gate: Tensor | None, *, walks: bool, **constants: Any
    ):
        channels = width // groups
        columns = triton.next_power_of_2(channels)
        rows = max(1, 512 // columns)
        # Walking, a row of 1,024 channels takes too many registers for one warp, or two.
        warps = min(16, max(1, columns // 256 if walks and columns > 512 else columns // 1024))
        programs = max(1, (PROGRAMS if warps == 1 else 2 * PROGRAMS // warps) // (batch * groups))
        chunk = triton.cdiv(length, programs) if walks else rows
        self.programs = batch * triton.cdiv(length, chunk)
        self.grid = self.programs, groups
        self.arguments = {
            "length": length,
            "chunk": chunk,
            "channels": channels,
            "stride": width,
            "gate_stride": 0 if gate is None else gate.stride(0),
            "HEADING": False,
            "REVERSE": False,
            "ROWS": rows,
            "COLUMNS": columns,
            "STAGES": STAGES if walks and columns <= 1024 else 1,  # wider rows might not fit into shared memory
            "num_warps": warps,
        } | constants


def _wide(*tensors: Tensor | None) -> tl.dtype:
    return tl.float64 if state_dtype(*tensors) == torch.float64 else tl.float32


def forward(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, groups: int, dtype: torch.dtype) -> Tensor:
    """See `rms_norm`."""
    x, weight, gate = x.contiguous(), weight.contiguous(), None if gate is None else as_matrix(gate)
    y = x.new_empty(x.shape, dtype=dtype)
    rows = x.numel() // x.shape[-1]
    launch = _Launch(1, rows, x.shape[-1], groups, gate, walks=False, EPS=eps, S=_wide(x, weight, gate))
    with on_device_of(x):
        _forward_kernel[launch.grid](x, None, None, None, gate, weight, None, y, None, **launch.arguments)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and gate in their dtypes; the last one is empty without a gate."""
    dy, x = dy.contiguous(), x.contiguous()
    d_gate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    gate = None if gate is None else as_matrix(gate)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    launch = _Launch(1, rows, width, groups, gate, walks=True, EPS=eps, S=_wide(x, weight, gate))
    dx = x.new_empty(x.shape)
    parts = x.new_empty(launch.programs, width, dtype=state_dtype(x, weight, gate))
    with on_device_of(x):
        _backward_kernel[launch.grid](
            None,
            dy,
            x,
            gate,
            weight.contiguous(),
            None,
            dx,
            None,
            None if gate is None else d_gate,
            parts,
            None,
            **launch.arguments,
        )
        d_weight = column_sums(parts, weight.new_empty(weight.shape))
    return dx, d_weight, d_gate


def residual_forward(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    *,
    heading: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """x + (branch + bias) * scale, (B, L, D), and its norm in `dtype`, if there is a weight; see `vim_kernels`."""
    x = x.contiguous()
    weight, bias, scale = map(contiguous, (weight, bias, scale))
    batch, length, width = x.shape
    stream, y, sums = None, None, None
    if branch is not None:
        branch = branch.contiguous()
        stream = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    constants = {"EPS": eps, "S": _wide(x, branch, weight), "HEADING": heading, "REVERSE": reverse}
    launch = _Launch(batch, length, width, 1, None, walks=heading and branch is None, **constants)
    if weight is not None:
        y = x.new_empty(batch, length + (heading and branch is None), width, dtype=dtype)
    if heading and branch is None:
        sums = x.new_empty(batch, launch.programs // batch, width, dtype=state_dtype(x, weight))
    with on_device_of(x):
        _forward_kernel[launch.grid](x, branch, bias, scale, None, weight, stream, y, sums, **launch.arguments)
        if sums is not None and y is not None:
            column_sums(sums, y[:, 0], length)
    return x if stream is None else stream, y


def residual_backward(
    d_stream: Tensor | None,
    dy: Tensor | None,
    stream: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    *,
    branch: torch.dtype | None,
    bias: torch.dtype | None,
    heading: bool,
    reverse: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, branch and bias, in the dtypes given (None: there is none), and weight; those of the norm are
    None without a weight.
    """
    first = dy if d_stream is None else d_stream
    assert first is not None
    like = first if stream is None else stream
    batch, width = first.shape[0], first.shape[2]
    length = like.shape[1]
    constants = {"EPS": eps, "S": _wide(like, weight), "HEADING": heading, "REVERSE": reverse}
    launch = _Launch(batch, length, width, 1, None, walks=True, **constants)
    d_stream, dy, stream, weight, scale = map(contiguous, (d_stream, dy, stream, weight, scale))
    dx = None if weight is None else like.new_empty(like.shape)
    d_branch = None if branch is None else like.new_empty(batch, length + heading, width, dtype=branch)
    wide = state_dtype(like, weight)
    d_weight = None if weight is None else weight.new_empty(width)
    d_bias = None if bias is None else like.new_empty(width, dtype=bias)
    # Of each program.
    weight_parts, bias_parts = (
        None if t is None else like.new_empty(launch.programs, width, dtype=wide) for t in (d_weight, d_bias)
    )
    with on_device_of(like):
        _backward_kernel[launch.grid](
            d_stream, dy, stream, None, weight, scale, dx, d_branch, None, weight_parts, bias_parts, **launch.arguments
        )
        for parts, total in ((weight_parts, d_weight), (bias_parts, d_bias)):
            if parts is not None and total is not None:
                column_sums(parts, total)
    return d_stream if dx is None else dx, d_branch, d_bias, d_weight
