# Triton grows a tuple by `tiles + (tile,)` and by nothing else.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"
"""Backend `triton` of the causal convolution, in one direction or in both over the same x. No atomics, deterministic.

A program walks along a chunk of rows with the last W = width rows of x in registers, so each element is read once. A
window x[i .. i + W - 1] gives the output of the forward direction at row i + W - 1 and that of the reverse direction at
row i. The backward walks the same way and keeps W rows of either gradient:

    dx[i] = sum_j w_forward[W - 1 - j] d_forward[i + j] + w_reverse[W - 1 - j] d_reverse[i - j]

with d the gradients before the activation. Each chunk starts W - 1 rows early to fill the windows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..precision import state_dtype
from ..rows import as_rows, contiguous, on_device_of, row_arguments
from .activations import sigmoid


@triton.jit
def _zeros(COUNT: tl.constexpr, like, S: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros(like.shape, S),)
    return tiles


@triton.jit
def _segment(segments, row, length):
    """The segment of a row. Rows beyond an end of the sequence belong to the segment at that end."""
    return tl.load(segments + tl.minimum(tl.maximum(row, 0), length - 1))


@triton.jit
def _own(window, ids, AT: tl.constexpr):
    """The window's rows in the same segment as row AT; zero for the others."""
    own = ()
    for j in tl.static_range(len(window)):
        own = own + (tl.where(ids[j] == ids[AT], window[j], 0.0),)
    return own


@triton.jit
def _load_rows(
    x,  # points to row `begin`
    x_stride,
    past,
    row,
    begin,
    length,
    limit,
    d_inner,
    inside,
    REVERSE: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    COUNT: tl.constexpr,
):
    """COUNT rows of x from begin + row on, those before begin + limit; zero outside the sequence.

    Before the first step of the direction: its initial state.
    """
    rows = ()
    for j in tl.static_range(COUNT):
        at = begin + row + j
        value = tl.load(x + (row + j) * x_stride, inside & (at >= 0) & (at < length) & (row + j < limit), 0.0)
        if past is not None:
            step = length - 1 - at if REVERSE else at
            value = value.to(S) + tl.load(past + (step + W - 1) * d_inner, inside & (step < 0) & (step > -W), 0.0).to(S)
        rows = rows + (value,)
    return rows


@triton.jit
def _converted(rows, S: tl.constexpr):
    out = ()
    for j in tl.static_range(len(rows)):
        out = out + (rows[j].to(S),)
    return out


@triton.jit
def _taps(weight, bias, inside, W: tl.constexpr, S: tl.constexpr):
    """A filter's taps, oldest first, then the bias."""
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight + k, inside, 0.0).to(S),)
    if bias is not None:
        taps = taps + (tl.load(bias, inside, 0.0).to(S),)
    else:
        taps = taps + (tl.zeros(inside.shape, S),)
    return taps


@triton.jit
def _pre_activation(window, taps, AHEAD: tl.constexpr, W: tl.constexpr):
    """Output before the activation: of the window's last row or, with AHEAD (reverse), of its first row."""
    pre = taps[W]
    for k in tl.static_range(W):
        pre += taps[k] * window[W - 1 - k if AHEAD else k]
    return pre


@triton.jit
def _d_pre_activation(dy, window, taps, SILU: tl.constexpr, AHEAD: tl.constexpr, W: tl.constexpr):
    if SILU:
        pre = _pre_activation(window, taps, AHEAD, W)
        gate = sigmoid(pre)
        dy *= gate * (1 + pre * (1 - gate))
    return dy


@triton.jit
def _shifted(window, new):
    out = ()
    for j in tl.static_range(1, len(window)):
        out = out + (window[j],)
    return out + (new,)


@triton.jit
def _summed(sums, factor, window, AHEAD: tl.constexpr, W: tl.constexpr):
    """Gradients of the taps, then of the bias."""
    out = ()
    for k in tl.static_range(W):
        out = out + (sums[k] + factor * window[W - 1 - k if AHEAD else k],)
    return out + (sums[W] + factor,)


@triton.jit(do_not_specialize=["length", "x_pitch", "chunk"])
def _forward_kernel(
    x,  # (B, L, E)
    weight,  # (E, W), one per direction, as bias and y
    bias,  # (E,) or None
    past,  # (B, W - 1, E) or None: the initial state; one direction only
    segments,  # (B, L) or None: sequence numbers of packed sequences
    y,  # (B, L, E)
    length,
    d_inner,
    x_pitch,  # see rows.row_strides
    x_stride,
    chunk,
    SILU: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,  # no block of channels is beyond the last one in part
):
    LAST: tl.constexpr = len(weight) - 1  # with two directions, the reverse one
    chunks = tl.cdiv(length, chunk)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * chunk
    rows = tl.minimum(chunk, length - begin)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (channel < d_inner) | WHOLE
    x += (b * x_pitch + begin) * x_stride + channel
    out = (b * length + begin) * d_inner + channel
    if past is not None:
        past += b * (W - 1) * d_inner + channel
    if FORWARD:
        taps_f = _taps(weight[0] + channel * W, None if bias is None else bias[0] + channel, inside, W, S)
    if REVERSE:
        taps_r = _taps(weight[LAST] + channel * W, None if bias is None else bias[LAST] + channel, inside, W, S)
    steps = rows + (W - 1 if REVERSE else 0)
    before = _load_rows(x, x_stride, past, -W, begin, length, steps, d_inner, inside, REVERSE, W, S, W)
    window = _converted(before, S)
    fresh = _load_rows(x, x_stride, past, 0, begin, length, steps, d_inner, inside, REVERSE, W, S, BLOCK)
    if segments is not None:
        segments += b * length
        ids = (_segment(segments, begin - W, length),)
        for j in tl.static_range(1 - W, 0):
            ids = ids + (_segment(segments, begin + j, length),)
    # The window ends at row i of the chunk. The rows of the next block are on their way while this one computes.
    for block in range(tl.cdiv(steps, BLOCK)):
        new = _converted(fresh, S)
        after = (block + 1) * BLOCK
        fresh = _load_rows(x, x_stride, past, after, begin, length, steps, d_inner, inside, REVERSE, W, S, BLOCK)
        for j in tl.static_range(BLOCK):
            i = block * BLOCK + j
            window = _shifted(window, new[j])
            if segments is not None:
                ids = _shifted(ids, _segment(segments, begin + i, length))
            if FORWARD:
                own = window
                if segments is not None:
                    own = _own(window, ids, W - 1)
                value = _pre_activation(own, taps_f, False, W)
                if SILU:
                    value *= sigmoid(value)
                tl.store(y[0] + out + i * d_inner, value, inside & (i < rows))
            if REVERSE:
                own = window
                if segments is not None:
                    own = _own(window, ids, 0)
                value = _pre_activation(own, taps_r, True, W)
                if SILU:
                    value *= sigmoid(value)
                row = i - (W - 1)
                tl.store(y[LAST] + out + row * d_inner, value, inside & (row >= 0) & (row < rows))


@triton.jit(do_not_specialize=["length", "x_pitch", "dy_pitch", "chunk"])
def _backward_kernel(
    dy,  # (B, L, E), one per direction, as weight and bias
    x,  # (B, L, E)
    weight,  # (E, W)
    bias,  # (E,) or None
    past,  # (B, W - 1, E) or None
    segments,  # (B, L) or None: sequence numbers of packed sequences
    dx,  # (B, L, E)
    d_taps,  # (B * chunks, directions, W + 1, E): of the taps, then of the bias
    d_past,  # (B, W - 1, E) or None
    length,
    d_inner,
    x_pitch,
    x_stride,
    dy_pitch,
    dy_stride,
    chunk,
    SILU: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,  # no block of channels is beyond the last one in part
):
    DIRECTIONS: tl.constexpr = len(weight)
    LAST: tl.constexpr = DIRECTIONS - 1
    # The initial state acts as rows before the first one, or in reverse after the last one.
    before = 0 if past is None or REVERSE else W - 1
    behind = W - 1 if past is not None and REVERSE else 0
    chunks = tl.cdiv(before + length + behind, chunk)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * chunk - before
    rows = tl.minimum(chunk, length + behind - begin)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (channel < d_inner) | WHOLE
    x += (b * x_pitch + begin) * x_stride + channel
    d_out = (b * dy_pitch + begin) * dy_stride + channel
    dx += (b * length + begin) * d_inner + channel
    if past is not None:
        past += b * (W - 1) * d_inner + channel
        d_past += b * (W - 1) * d_inner + channel
    if FORWARD:
        taps_f = _taps(weight[0] + channel * W, None if bias is None else bias[0] + channel, inside, W, S)
        recent_f = _zeros(W, channel, S)  # d_forward of rows i - W + 1 .. i
        sums_f = _zeros(W + 1, channel, S)
    if REVERSE:
        taps_r = _taps(weight[LAST] + channel * W, None if bias is None else bias[LAST] + channel, inside, W, S)
        recent_r = _zeros(W, channel, S)  # d_reverse of rows i - 2 W + 2 .. i - W + 1
        sums_r = _zeros(W + 1, channel, S)
    steps = rows + W - 1
    earlier = _load_rows(x, x_stride, past, -W, begin, length, steps, d_inner, inside, REVERSE, W, S, W)
    window = _converted(earlier, S)
    fresh = _load_rows(x, x_stride, past, 0, begin, length, steps, d_inner, inside, REVERSE, W, S, BLOCK)
    if FORWARD:
        dy_f = dy[0] + d_out
        fresh_f = _load_rows(dy_f, dy_stride, None, 0, begin, length, steps, d_inner, inside, REVERSE, W, S, BLOCK)
    if REVERSE:
        dy_r = dy[LAST] + d_out
        fresh_r = _load_rows(dy_r, dy_stride, None, 1 - W, begin, length, rows, d_inner, inside, REVERSE, W, S, BLOCK)
    if segments is not None:
        segments += b * length
        ids = (_segment(segments, begin - W, length),)  # of rows i - W + 1 .. i, as the window
        ids_behind = (_segment(segments, begin - 2 * W + 1, length),)  # of rows i - 2 W + 2 .. i - W + 1
        for j in tl.static_range(W - 1):
            ids = ids + (_segment(segments, begin - W + 1 + j, length),)
            ids_behind = ids_behind + (_segment(segments, begin - 2 * W + 2 + j, length),)
    # The window ends at row i of the chunk; dx is complete at row i - W + 1.
    for block in range(tl.cdiv(steps, BLOCK)):
        new = _converted(fresh, S)
        after = (block + 1) * BLOCK
        fresh = _load_rows(x, x_stride, past, after, begin, length, steps, d_inner, inside, REVERSE, W, S, BLOCK)
        if FORWARD:
            new_f = _converted(fresh_f, S)
            fresh_f = _load_rows(
                dy_f, dy_stride, None, after, begin, length, steps, d_inner, inside, REVERSE, W, S, BLOCK
            )
        if REVERSE:
            new_r = _converted(fresh_r, S)
            fresh_r = _load_rows(
                dy_r, dy_stride, None, after + 1 - W, begin, length, rows, d_inner, inside, REVERSE, W, S, BLOCK
            )
        for j in tl.static_range(BLOCK):
            i = block * BLOCK + j
            row = i - (W - 1)
            window = _shifted(window, new[j])
            if segments is not None:
                ids = _shifted(ids, _segment(segments, begin + i, length))
                ids_behind = _shifted(ids_behind, ids[0])
            mine = inside & (row >= 0) & (row < rows)
            d_x = tl.zeros(channel.shape, S)
            if FORWARD:
                own = window
                if segments is not None:
                    own = _own(window, ids, W - 1)
                d_f = _d_pre_activation(new_f[j], own, taps_f, SILU, False, W)
                recent_f = _shifted(recent_f, d_f)
                # Rows from `rows` on belong to the next chunk.
                sums_f = _summed(sums_f, tl.where(i < rows, d_f, 0.0), own, False, W)
                met = recent_f
                if segments is not None:
                    met = _own(recent_f, ids, 0)
                for k in tl.static_range(W):
                    d_x += taps_f[W - 1 - k] * met[k]
            if REVERSE:
                own = window
                if segments is not None:
                    own = _own(window, ids, 0)
                d_r = _d_pre_activation(new_r[j], own, taps_r, SILU, True, W)
                recent_r = _shifted(recent_r, d_r)
                sums_r = _summed(sums_r, tl.where(mine, d_r, 0.0), own, True, W)
                met = recent_r
                if segments is not None:
                    met = _own(recent_r, ids_behind, W - 1)
                for k in tl.static_range(W):
                    d_x += taps_r[W - 1 - k] * met[W - 1 - k]
            tl.store(dx + row * d_inner, d_x, mine & (begin + row >= 0) & (begin + row < length))
            if past is not None:
                step = length - 1 - begin - row if REVERSE else begin + row
                tl.store(d_past + (step + W - 1) * d_inner, d_x, mine & (step < 0))
    d_taps += tl.program_id(0).to(tl.int64) * DIRECTIONS * (W + 1) * d_inner + channel
    for k in tl.static_range(W + 1):
        if FORWARD:
            tl.store(d_taps + k * d_inner, sums_f[k], inside)
        if REVERSE:
            tl.store(d_taps + (LAST * (W + 1) + k) * d_inner, sums_r[k], inside)


@triton.jit(do_not_specialize=["parts"])
def _tap_sums_kernel(
    d_taps,  # (parts, directions, W + 1, E)
    d_weight,  # (E, W), one per direction, as d_bias
    d_bias,  # (E,) or None
    parts,
    d_inner,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    k = tl.program_id(1)
    direction = tl.program_id(2)
    pitch = tl.num_programs(2) * (W + 1) * d_inner
    part = tl.arange(0, ROWS)[:, None]
    d_taps += (direction * (W + 1) + k) * d_inner + channel
    total = tl.zeros([ROWS, CHANNELS], d_taps.dtype.element_ty)
    for start in range(0, parts, ROWS):
        inside = (start + part < parts) & (channel < d_inner)
        total += tl.load(d_taps + (start + part).to(tl.int64) * pitch, inside, 0.0)
    total = tl.sum(total, 0)[None, :]
    for i in tl.static_range(len(d_weight)):
        tl.store(d_weight[i] + channel * W + k, total, (channel < d_inner) & (k < W) & (direction == i))
        if d_bias is not None:
            tl.store(d_bias[i] + channel, total, (channel < d_inner) & (k == W) & (direction == i))


# Rows of a program at most, rows loaded together (forward and backward) and channels of a program. Fixed, so that the
# sums of the gradients are always the same.
ROWS, BLOCK, BLOCK_BACKWARD, CHANNELS = 128, 8, 4, 64


def _chunk(rows: int) -> int:
    """Rows of a program: chunks of equal size."""
    return triton.cdiv(rows, triton.cdiv(rows, ROWS))


def forward(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    *,
    silu: bool,
    reverse: Sequence[bool],
) -> list[Tensor]:
    """y (B, L, E) of each direction in x's dtype; shapes as in `causal_conv1d` and `packing`.

    The second of two directions is the reverse one.
    """
    x = as_rows(x)
    batch, length, d_inner = x.shape
    y = tuple(x.new_empty(x.shape) for _ in reverse)
    chunk = _chunk(length)
    with on_device_of(x):
        _forward_kernel[(batch * triton.cdiv(length, chunk), triton.cdiv(d_inner, CHANNELS))](
            x,
            tuple(w.contiguous() for w in weight),
            None if bias is None else tuple(t.contiguous() for t in bias),
            _past(initial_state),
            contiguous(segments),
            y,
            length,
            d_inner,
            **row_arguments(x=x),
            chunk=chunk,
            **_constants(x, weight, silu, reverse),
            BLOCK=BLOCK,
        )
    return list(y)


def backward(
    dy: Sequence[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    *,
    silu: bool,
    reverse: Sequence[bool],
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...] | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state, each in its tensor's dtype."""
    x, past = as_rows(x), _past(initial_state)
    dy = tuple(as_rows(t) for t in dy)
    if any(t.dtype != dy[0].dtype or t.stride() != dy[0].stride() for t in dy):
        dy = tuple(t.to(x.dtype).contiguous() for t in dy)
    batch, length, d_inner = x.shape
    width = weight[0].shape[1]
    rows = length + (0 if past is None else width - 1)
    chunk = _chunk(rows)
    parts = batch * triton.cdiv(rows, chunk)
    dx = x.new_empty(x.shape)
    d_weight = tuple(t.new_empty(t.shape) for t in weight)
    d_bias = None if bias is None else tuple(t.new_empty(t.shape) for t in bias)
    d_past = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    d_taps = x.new_empty(parts, len(weight), width + 1, d_inner, dtype=state_dtype(x, *weight))
    with on_device_of(x):
        _backward_kernel[(parts, triton.cdiv(d_inner, CHANNELS))](
            dy,
            x,
            tuple(w.contiguous() for w in weight),
            None if bias is None else tuple(t.contiguous() for t in bias),
            past,
            contiguous(segments),
            dx,
            d_taps,
            None if past is None else d_past,
            length,
            d_inner,
            **row_arguments(x=x, dy=dy[0]),
            chunk=chunk,
            **_constants(x, weight, silu, reverse),
            BLOCK=BLOCK_BACKWARD,
        )
        channels = 8
        _tap_sums_kernel[(triton.cdiv(d_inner, channels), width + 1, len(weight))](
            d_taps, d_weight, d_bias, parts, d_inner, W=width, ROWS=512, CHANNELS=channels
        )
    return dx, d_weight, d_bias, d_past


def _past(initial_state: Tensor | None) -> Tensor | None:
    """The initial state, contiguous; None also for the empty state of a filter of width 1."""
    return None if initial_state is None or initial_state.numel() == 0 else initial_state.contiguous()


def _constants(x: Tensor, weight: Sequence[Tensor], silu: bool, reverse: Sequence[bool]) -> dict[str, object]:
    return {
        "SILU": silu,
        "FORWARD": not all(reverse),
        "REVERSE": any(reverse),
        "W": weight[0].shape[1],
        "S": tl.float64 if state_dtype(x, *weight) == torch.float64 else tl.float32,
        "CHANNELS": CHANNELS,
        "WHOLE": x.shape[2] % CHANNELS == 0,
        "num_warps": 1,
    }
