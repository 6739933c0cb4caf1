"""Backend `triton` of `swiglu`: one pass over memory forward, one backward. Only the inputs are saved."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..precision import state_dtype
from ..rows import on_device_of
from .activations import sigmoid

BLOCK = 2048  # elements of a program

# Triton compiles twice: for counts that divide by 16, whose loads take 16 bytes, and for others.


@triton.jit
def _forward_kernel(gate, x, y, count, S: tl.constexpr, BLOCK: tl.constexpr):  # all (count,)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    g = tl.load(gate + i, inside, 0.0).to(S)
    tl.store(y + i, g * sigmoid(g) * tl.load(x + i, inside, 0.0).to(S), inside)


@triton.jit
def _backward_kernel(dy, gate, x, d_gate, dx, count, S: tl.constexpr, BLOCK: tl.constexpr):  # all (count,)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    dy_t = tl.load(dy + i, inside, 0.0).to(S)
    g = tl.load(gate + i, inside, 0.0).to(S)
    open = sigmoid(g)
    tl.store(dx + i, dy_t * g * open, inside)
    tl.store(d_gate + i, dy_t * tl.load(x + i, inside, 0.0).to(S) * open * (1 + g * (1 - open)), inside)


def _sizes(gate: Tensor, x: Tensor) -> dict[str, object]:
    wide = tl.float64 if state_dtype(gate, x) == torch.float64 else tl.float32
    return {"count": x.numel(), "S": wide, "BLOCK": BLOCK, "num_warps": 8}


def forward(gate: Tensor, x: Tensor) -> Tensor:
    """See `swiglu`."""
    gate, x = gate.contiguous(), x.contiguous()
    y = x.new_empty(x.shape)
    with on_device_of(x):
        _forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](gate, x, y, **_sizes(gate, x))
    return y


def backward(dy: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and x in their dtypes."""
    dy, gate, x = dy.contiguous(), gate.contiguous(), x.contiguous()
    d_gate, dx = gate.new_empty(gate.shape), x.new_empty(x.shape)
    with on_device_of(x):
        _backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](dy, gate, x, d_gate, dx, **_sizes(gate, x))
    return d_gate, dx
