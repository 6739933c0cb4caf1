"""Backend `cpu` of the causal convolution: passes tensors to csrc/conv.c."""

import ctypes
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..precision import state_dtype
from . import library as cpu

_ARRAYS = ("weight", "bias", "initial_state")


class _Conv(cpu.Call):
    _fields_: ClassVar[tuple] = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "width", "silu")),
        *((name, cpu.Sequence) for name in ("x", "y")),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        *((name, cpu.Sequence) for name in ("segments", "dy", "dx")),
        *((f"d_{name}", ctypes.c_void_p) for name in _ARRAYS),
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    *,
    silu: bool,
    reverse: bool,
) -> Tensor:
    """y (B, L, E) in x's dtype; shapes as in `causal_conv1d` and `packing`."""
    dtype = state_dtype(x, weight)
    y = cpu.empty(x.shape, dtype)
    sequences = {"x": cpu.readable(x, dtype), "y": y, "segments": cpu.per_step(segments, torch.int32)}
    arrays = {name: cpu.dense(t, dtype) for name, t in zip(_ARRAYS, (weight, bias, initial_state), strict=True)}
    _run("conv_forward", x, weight, sequences, arrays, silu, reverse)
    return y.to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    *,
    silu: bool,
    reverse: bool,
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state, in the precision of the computation."""
    dtype = state_dtype(x, weight)
    inputs = (x, weight, bias, initial_state)
    dx, *d_arrays = grads = [None if t is None else cpu.empty(t.shape, dtype) for t in inputs]
    sequences = {"x": cpu.readable(x, dtype), "dy": cpu.readable(dy, dtype), "dx": dx}
    sequences["segments"] = cpu.per_step(segments, torch.int32)
    arrays = {name: cpu.dense(t, dtype) for name, t in zip(_ARRAYS, inputs[1:], strict=True)}
    arrays |= {f"d_{name}": grad for name, grad in zip(_ARRAYS, d_arrays, strict=True)}
    _run("conv_backward", x, weight, sequences, arrays, silu, reverse)
    return grads


def _run(
    kernel: str,
    x: Tensor,
    weight: Tensor,
    sequences: Mapping[str, Tensor | None],
    arrays: Mapping[str, Tensor | None],
    silu: bool,
    reverse: bool,
) -> None:
    batch, length, channels = x.shape
    conv = _Conv(batch=batch, length=length, channels=channels, width=weight.shape[1], silu=silu)
    cpu.fill(conv, sequences, arrays, reverse)
    cpu.run(kernel, state_dtype(x, weight), conv)
