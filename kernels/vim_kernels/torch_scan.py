"""Backend `torch` of the scan: ATen operators only, on any device, in chunks of steps with a hand-written backward.

Within a chunk everything except the recurrence is computed for all steps at once. Tensors are laid out steps first,
(K, B, E, N), so that a step is one operator on contiguous memory.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .directions import CHECKPOINT_INTERVAL, Direction, DirectionGrads, ScanOutput, checkpoint_rows
from .precision import own_precision

__all__ = ["backward", "checkpoint_rows", "forward"]


def forward(
    directions: Sequence[Direction], z: Tensor | None, *, dt_softplus: bool, scale: float, save: bool
) -> ScanOutput:
    """See `directions`."""
    ys, states, checkpoints = zip(*(_forward(d, dt_softplus, save) for d in directions), strict=True)
    y, y_sum = gate(ys, z, scale, directions[0].u.dtype, save)
    return ScanOutput(y, torch.stack(states), torch.stack(checkpoints) if save else states[0].new_empty(0), y_sum)


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
    dy, dz = gate_backward(dy, z, y_sum, scale, directions[0].A.dtype)
    d_states = [None] * len(directions) if d_last_state is None else d_last_state.unbind(0)
    return [
        _backward(d, dy, d_state, checkpoint, dt_softplus)
        for d, d_state, checkpoint in zip(directions, d_states, checkpoints, strict=True)
    ], dz


def gate(ys: Sequence[Tensor], z: Tensor | None, scale: float, dtype: torch.dtype, save: bool) -> tuple[Tensor, Tensor]:
    """y = scale * sum(ys) * silu(z) and the sum that `gate_backward` needs (empty if not), both in `dtype`."""
    y_sum = ys[0] if len(ys) == 1 else ys[0] + ys[1]
    y = y_sum if scale == 1 else y_sum * scale
    if z is None:
        return y.to(dtype, copy=y is ys[0]), y.new_empty(0, dtype=dtype)
    y = y * F.silu(z.to(y.dtype))
    return y.to(dtype), y_sum.to(dtype, copy=True) if save else y.new_empty(0, dtype=dtype)


def gate_backward(
    dy: Tensor, z: Tensor | None, y_sum: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the ungated y of each direction, in `dtype`, and of z."""
    dy = dy.to(dtype) * scale if scale != 1 else dy.to(dtype)
    if z is None:
        return dy, None
    sigmoid = torch.sigmoid(z.to(dtype))
    silu = z * sigmoid
    dz = dy * y_sum * (sigmoid + silu * (1 - sigmoid))
    return dy * silu, dz.to(z.dtype)


class _Chunk:
    """The steps [start, start + K) of a direction, in processing order: h[k] = decay[k] * h[k-1] + x[k] * B[k].

    Shapes split the channels by group, so that B and C broadcast: states (K, B, G, E/G, N).
    """

    def __init__(self, d: Direction, start: int, dt_softplus: bool):
        length = d.u.shape[1]
        stop = min(start + CHECKPOINT_INTERVAL, length)
        self.slice = slice(length - stop, length - start) if d.reverse else slice(start, stop)
        self.reverse, self.dtype, self.groups = d.reverse, d.A.dtype, d.B.shape[2]
        self.u, self.dt = self.steps(d.u), self.steps(d.dt)  # (K, B, E)
        self.B, self.C = self.steps(d.B), self.steps(d.C)  # (K, B, G, N)
        if d.dt_bias is not None:
            self.dt = self.dt + d.dt_bias.to(self.dtype)
        self.delta = F.softplus(self.dt) if dt_softplus else self.dt
        self.A = d.A.unflatten(0, (self.groups, -1))
        self.decay = self.grouped(self.delta).unsqueeze(-1).mul(self.A).exp_()
        if (starts := d.starts()) is not None:
            starts = starts[:, self.slice].transpose(0, 1)
            starts = starts.flip(0) if self.reverse else starts
            self.decay.masked_fill_(starts[..., None, None, None], 0)

    def steps(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (K, B, ...)"""
        x = x[:, self.slice].transpose(0, 1).to(self.dtype)
        return x.flip(0) if self.reverse else x.contiguous()

    def grouped(self, x: Tensor) -> Tensor:
        """(K, B, E) -> (K, B, G, E/G)"""
        return x.unflatten(2, (self.groups, -1))

    def put(self, out: Tensor, x: Tensor) -> None:
        """Write (K, B, ...) to this chunk of `out` (B, L, ...)."""
        out[:, self.slice] = (x.flip(0) if self.reverse else x).transpose(0, 1)

    def states(self, h: Tensor) -> Tensor:
        """All h[k], from the state (B, G, E/G, N) before the chunk."""
        hs = self.grouped(self.delta * self.u).unsqueeze(-1) * self.B.unsqueeze(3)
        for decay, h_k in zip(self.decay.unbind(0), hs.unbind(0), strict=True):
            h = h_k.addcmul_(decay, h)
        return hs


def _without_autocast(function):
    """Run `function(d, ...)` in the precision of its tensors: autocast would run its matrix products in bf16."""

    @functools.wraps(function)
    def wrapper(d: Direction, *args):
        with own_precision(d.u.device.type):
            return function(d, *args)

    return wrapper


@_without_autocast
def _forward(d: Direction, dt_softplus: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E) without the gate, the last state, and the checkpoints (B, chunks, E, N) if `save`."""
    batch, length, d_inner = d.u.shape
    if d.initial_state is None:
        h = d.A.new_zeros(batch, *d.A.shape)
    else:
        h = d.initial_state.to(d.A.dtype, copy=True)
    y = d.A.new_empty(batch, length, d_inner)
    starts = range(0, length, CHECKPOINT_INTERVAL)
    checkpoints = h.new_empty((batch, len(starts), *d.A.shape) if save else 0)
    for i, start in enumerate(starts):
        if save:
            checkpoints[:, i] = h
        chunk = _Chunk(d, start, dt_softplus)
        hs = chunk.states(h.unflatten(1, (chunk.groups, -1)))
        y_chunk = (hs @ chunk.C.unsqueeze(-1)).reshape(chunk.u.shape)
        chunk.put(y, y_chunk if d.D is None else y_chunk.addcmul_(chunk.u, d.D.to(y.dtype)))
        h = hs[-1].flatten(1, 2)
    return y, h.clone(), checkpoints


@_without_autocast
def _backward(
    d: Direction, dy: Tensor, d_last_state: Tensor | None, checkpoints: Tensor, dt_softplus: bool
) -> DirectionGrads:
    """Take chunks from last to first: recompute the states, then run the adjoint g[k] = dy C + decay[k+1] g[k+1]."""
    batch, length, _ = d.u.shape
    carry = d.A.new_zeros(batch, *d.A.shape) if d_last_state is None else d_last_state
    du, ddt, dB, dC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (d.u, d.dt, d.B, d.C))
    dA = torch.zeros_like(d.A)
    dD, d_bias = (d.A.new_zeros(d.A.shape[0]) for _ in range(2))
    for i, start in reversed(list(enumerate(range(0, length, CHECKPOINT_INTERVAL)))):
        chunk = _Chunk(d, start, dt_softplus)
        groups = (chunk.groups, -1)
        h = checkpoints[:, i].unflatten(1, groups)
        hs = chunk.states(h)
        dy_k = chunk.steps(dy)
        dy_g = chunk.grouped(dy_k).unsqueeze(3)  # (K, B, G, 1, E/G)
        chunk.put(dC, (dy_g @ hs).squeeze(3))

        g = dy_g.transpose(3, 4) * chunk.C.unsqueeze(3)
        carry = carry.unflatten(1, groups)
        for decay, g_k in zip(reversed(chunk.decay.unbind(0)), reversed(g.unbind(0)), strict=True):
            carry = g_k.add_(carry) * decay
        carry = carry.flatten(1, 2)

        x = chunk.grouped(chunk.delta * chunk.u).unsqueeze(3)
        chunk.put(dB, (x @ g).squeeze(3))
        g_B = (g @ chunk.B.unsqueeze(-1)).reshape(chunk.u.shape)
        # d(decay) / d(delta A) = decay, so q is the gradient of the exponent delta * A.
        q = g.mul_(chunk.decay)
        q[0].mul_(h)
        q[1:].mul_(hs[:-1])
        d_delta = (q * chunk.A).sum(-1).reshape(chunk.u.shape).addcmul_(chunk.u, g_B)
        dA += torch.einsum("kbge,kbgen->gen", chunk.grouped(chunk.delta), q).flatten(0, 1)
        d_u = chunk.delta * g_B
        if d.D is not None:
            d_u.addcmul_(dy_k, d.D.to(dy.dtype))
            dD += (dy_k * chunk.u).sum((0, 1))
        if dt_softplus:
            d_delta *= torch.sigmoid(chunk.dt)
        d_bias += d_delta.sum((0, 1))
        chunk.put(du, d_u)
        chunk.put(ddt, d_delta)
    return DirectionGrads(
        du,
        ddt,
        dA,
        dB,
        dC,
        None if d.D is None else dD.to(d.D.dtype),
        None if d.dt_bias is None else d_bias.to(d.dt_bias.dtype),
        None if d.initial_state is None else carry.to(d.initial_state.dtype, copy=True),
    )
