"""The operators as ATen operators only, for programs that must run without this package.

An exported program calls `vim_kernels::selective_scan`. These functions replace it:

    program = torch.export.export(model, (images,))
    program = program.run_decompositions(decompositions())          # ATen operators only
    program = program.run_decompositions(decompositions(loop=True))  # the scan as one loop, which becomes ONNX's Scan

They are functional and for inference. Both directions of a scan run as one batch, the reverse one on flipped tensors.
Shapes in comments: S directions, B batch, L length, G groups, E channels of a group, N d_state, R = S B G.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan_op as torch_scan_operator

from . import reference, torch_ssd
from .precision import state_dtype
from .ssd import Settings


def decompositions(*, loop: bool = False) -> dict[torch._ops.OpOverload, Callable]:
    """A table for `torch.export.ExportedProgram.run_decompositions`.

    Args:
        loop: express the recurrence as torch's `scan` operator, a graph of constant size that torch.onnx turns into
            ONNX's Scan. By default it is unrolled to some 20 sqrt(length) ATen operators.

    The program must have been exported under `torch.no_grad()`; otherwise the functions raise.
    """
    recurrence = _looped if loop else _chunked
    return {
        torch.ops.vim_kernels.selective_scan.default: partial(_selective_scan, recurrence),
        torch.ops.vim_kernels.causal_conv1d.default: _causal_conv1d,
        torch.ops.vim_kernels.ssd.default: _ssd,
    }


def _causal_conv1d(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    initial_state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
    reverse: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """The operator `causal_conv1d`."""
    biases: Sequence[Tensor | None] = bias or [None] * len(weight)
    if segments is not None:
        return [
            reference.causal_conv1d(x, w, b, initial_state, segments, silu=silu, reverse=r).to(x.dtype)
            for w, b, r in zip(weight, biases, reverse, strict=True)
        ]
    dtype, width = state_dtype(x, *weight), weight[0].shape[1]
    rows = x.to(dtype).unsqueeze(1).permute(0, 3, 1, 2)  # (B, E, 1, L)

    def one(weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
        padding = (0, width - 1) if reverse else (width - 1, 0)
        if initial_state is None:
            padded = F.pad(rows, padding)
        else:
            past = initial_state.to(dtype).unsqueeze(1).permute(0, 3, 1, 2)
            padded = torch.cat([rows, past.flip(3)] if reverse else [past, rows], 3)
        taps = weight.flip(1) if reverse else weight
        y = F.conv2d(padded, taps.to(dtype)[:, None, None], None if bias is None else bias.to(dtype), groups=x.shape[2])
        y = y.permute(0, 2, 3, 1).squeeze(1)
        return (F.silu(y) if silu else y).to(x.dtype)

    return [one(w, b, r) for w, b, r in zip(weight, biases, reverse, strict=True)]


def _ssd(*args) -> tuple[Tensor, Tensor]:
    """The operator `ssd`."""
    dt_softplus, reverse, chunk_size, _, last = Settings(*args[8:])
    y, state = torch_ssd.ssd(*args[:8], dt_softplus=dt_softplus, chunk_size=chunk_size, reverse=reverse)
    return y, state if last else state.new_empty(0)


def _selective_scan(
    recurrence: Callable,
    u: Sequence[Tensor],
    dt: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    D: Sequence[Tensor],
    dt_bias: Sequence[Tensor],
    initial_state: Sequence[Tensor],
    z: Tensor | None,
    cuts: Tensor | None,
    reverse: Sequence[bool],
    dt_softplus: bool,
    scale: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `selective_scan`."""
    if save:
        raise RuntimeError("the scan was exported for training; export under torch.no_grad()")
    dtype, groups = A[0].dtype, B[0].shape[2]
    batch, _, channels = u[0].shape
    split = (len(u), batch, groups)
    rows = len(u) * batch * groups  # each with its own B, C and channels
    d_state = A[0].shape[1]

    def steps(sequences: Sequence[Tensor]) -> Tensor:
        """Each (B, L, ...) -> (L, S, B, ...), in processing order."""
        turned = [x.transpose(0, 1).flatten(1) for x in sequences]
        joined = torch.cat([x.flip(0) if r else x for x, r in zip(turned, reverse, strict=True)], 1).to(dtype)
        return joined.unflatten(1, (len(sequences), *sequences[0].shape[0:1], *sequences[0].shape[2:]))

    def per_channel(vectors: Sequence[Tensor]) -> Tensor:
        """Each (G E,) -> (S, 1, G E)."""
        return torch.stack(list(vectors)).to(dtype).unsqueeze(1)

    def states(tensors: Sequence[Tensor]) -> Tensor:
        """Each (B or 1, G E, N) -> (R, N, E), with the largest dimension, the channels, innermost."""
        turned = torch.stack(list(tensors)).to(dtype).unflatten(2, (groups, -1)).transpose(3, 4)
        return turned.expand(*split, -1, -1).reshape(rows, d_state, -1).contiguous()

    delta, inputs = steps(dt), steps(u)  # (L, S, B, G E)
    if dt_bias:
        delta = delta + per_channel(dt_bias)
    if dt_softplus:
        delta = _softplus(delta)
    rates = states([a.unsqueeze(0) for a in A])
    h = states(initial_state) if initial_state else torch.zeros_like(rates)
    keep = None  # (L, R, 1, 1): factor of each step's decay, 0 where a sequence begins
    if cuts is not None:
        keep = 1 - steps([cuts[:, 1:] if r else cuts[:, :-1] for r in reverse])  # (L, S, B)
        keep = keep.unsqueeze(3).expand(-1, -1, -1, groups).reshape(-1, rows, 1, 1)
    y, h = recurrence(
        h,
        rates,
        delta.reshape(-1, rows, 1, channels // groups),
        (delta * inputs).reshape(-1, rows, 1, channels // groups),
        steps(B).reshape(-1, rows, d_state, 1),
        steps(C).reshape(-1, rows, 1, d_state),
        keep,
    )
    y = y.reshape(-1, len(u), batch, channels)
    if D:
        y = y + inputs * per_channel(D)
    ys = [y_d.flip(0) if r else y_d for y_d, r in zip(y.unbind(1), reverse, strict=True)]
    y = (sum(ys[1:], ys[0]) * scale).transpose(0, 1)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    h = h.reshape(*split, d_state, -1).transpose(3, 4).flatten(2, 3)
    empty = h.new_empty(0)
    return y.to(u[0].dtype), h, empty, empty.to(u[0].dtype)


def _softplus(x: Tensor) -> Tensor:
    """max(x, 0) + log(1 + e) with e = exp(-|x|), to full relative precision (a small result is e itself).

    Written out because ONNX has no log1p, and its Softplus is several times slower in ONNX Runtime.
    """
    e = torch.exp(-x.abs())
    one_more = 1 + e
    lost = (one_more - 1) - e  # the exact rounding error; it matters for small e, where the slope of log is 1
    return torch.relu(x) + (torch.log(one_more) - lost)


def _looped(
    h: Tensor, A: Tensor, delta: Tensor, x: Tensor, B: Tensor, C: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (L, R, 1, E) and the last state, step by step."""

    def step(h: Tensor, delta: Tensor, x: Tensor, B: Tensor, C: Tensor, A: Tensor) -> list[Tensor]:
        if packed:
            B, keep = B[:, :-1], B[:, -1:]
            h = keep * h
        h = torch.exp(delta * A) * h + x * B
        return [h, C @ h]

    packed = keep is not None
    if keep is not None:
        # Part of B, not a fifth input: after scans of four inputs torch would trace the number of inputs as dynamic,
        # which torch.onnx cannot translate.
        B = torch.cat([B, keep], 2)
    # The operator and not its function `scan`, which compiles: torch 2.10 cannot do that in a decomposition.
    h, y = torch_scan_operator(step, [h], [delta, x, B, C], (A,))
    return y, h


def _chunked(
    h: Tensor, A: Tensor, delta: Tensor, x: Tensor, B: Tensor, C: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_looped` in chunks of T steps: all chunks in parallel as if each began at zero, then the states between them."""
    length = delta.shape[0]
    T = math.ceil(math.sqrt(length) / 2)
    chunks = -(-length // T)

    def by_step(t: Tensor, fill: float = 0.0) -> tuple[Tensor, ...]:
        """(L, R, ...) -> T times (chunks, R, ...), padded with steps of 0, which leave the state unchanged."""
        return F.pad(t, (0,) * 7 + (chunks * T - length,), value=fill).unflatten(0, (chunks, T)).unbind(1)

    deltas, xs, Bs, Cs = by_step(delta), by_step(x), by_step(B), by_step(C)
    since_start = torch.stack(deltas).cumsum(0).unbind(0)  # sums of delta from the chunk's start to each step
    keeps: Sequence[Tensor | None] = [None] * T  # of each step
    all_keeps = keeps  # products of `keeps` from the chunk's start to each step
    if keep is not None:
        steps = by_step(keep, 1.0)
        keeps, all_keeps = steps, torch.stack(steps).cumprod(0).unbind(0)

    def decay(delta: Tensor, keep: Tensor | None) -> Tensor:
        factor = torch.exp(delta * A)
        return factor if keep is None else factor * keep

    local = [xs[0] * Bs[0]]  # (chunks, R, N, E), the state at each step if the chunk began at zero
    for t in range(1, T):
        local.append(decay(deltas[t], keeps[t]) * local[-1] + xs[t] * Bs[t])
    starts = []
    for factor, end in zip(decay(since_start[-1], all_keeps[-1]).unbind(0), local[-1].unbind(0), strict=True):
        starts.append(h)
        h = factor * h + end
    start = torch.stack(starts)
    y = [Cs[t] @ (local[t] + decay(since_start[t], all_keeps[t]) * start) for t in range(T)]
    return torch.stack(y, 1).flatten(0, 1)[:length], h
