"""Backend `cpu` of the causal convolution: hands tensors to csrc/conv.c."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from . import cpu
from .reference import state_dtype
from .torch_conv import gathered

_ARRAYS = ("weight", "bias", "initial_state")


class _Conv(cpu.Call):
    _fields_: ClassVar[tuple] = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "width", "silu")),
        *((name, cpu.Sequence) for name in ("x", "y")),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        *((name, cpu.Sequence) for name in ("dy", "dx")),
        *((f"d_{name}", ctypes.c_void_p) for name in _ARRAYS),
    )


def forward(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    initial_state: Tensor | None,
    *,
    silu: bool,
    reverse: Sequence[bool],
) -> list[Tensor]:
    """y (B, L, E) of each direction in x's dtype; shapes as in `causal_conv1d`."""
    dtype = state_dtype(x, *weight)
    x_dense, outputs = cpu.readable(x, dtype), []
    for i, backwards in enumerate(reverse):
        y = cpu.empty(x.shape, dtype)
        inputs = weight[i], None if bias is None else bias[i], initial_state
        arrays = {name: cpu.dense(t, dtype) for name, t in zip(_ARRAYS, inputs, strict=True)}
        _run("conv_forward", x, weight[i], {"x": x_dense, "y": y}, arrays, silu, backwards)
        outputs.append(y.to(x.dtype))
    return outputs


def backward(
    dy: Sequence[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    initial_state: Tensor | None,
    *,
    silu: bool,
    reverse: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor] | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state, each in its tensor's dtype."""
    dtype = state_dtype(x, *weight)
    x_dense, found = cpu.readable(x, dtype), []
    for i, backwards in enumerate(reverse):
        inputs = x, weight[i], None if bias is None else bias[i], initial_state
        dx, *d_arrays = grads = [None if t is None else cpu.empty(t.shape, dtype) for t in inputs]
        sequences = {"x": x_dense, "dy": cpu.readable(dy[i], dtype), "dx": dx}
        arrays = {name: cpu.dense(t, dtype) for name, t in zip(_ARRAYS, inputs[1:], strict=True)}
        arrays |= {f"d_{name}": grad for name, grad in zip(_ARRAYS, d_arrays, strict=True)}
        _run("conv_backward", x, weight[i], sequences, arrays, silu, backwards)
        found.append(grads)
    return gathered(found, x, weight, bias, initial_state)


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
