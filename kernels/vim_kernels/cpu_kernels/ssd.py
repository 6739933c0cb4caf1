"""Backend `cpu` of `ssd`: passes tensors to csrc/ssd.c, which divides the sequence into chunks of its own length."""

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from ..precision import state_dtype
from . import library as cpu

_SIZES = ("batch", "length", "heads", "head_dim", "d_state", "groups", "softplus")
_SEQUENCES, _ARRAYS = ("x", "dt", "B", "C"), ("A", "D", "dt_bias", "initial_state")


class _Ssd(cpu.Call):
    _fields_: ClassVar[tuple] = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, cpu.Sequence) for name in (*_SEQUENCES, "y")),
        *((name, ctypes.c_void_p) for name in (*_ARRAYS, "last_state")),
        *((name, cpu.Sequence) for name in ("dy", "dx", "ddt", "dB", "dC")),
        *((name, ctypes.c_void_p) for name in ("d_last_state", "dA", "dD", "d_bias", "d_initial_state")),
    )


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    dt_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """See `vim_kernels.ssd`: y and the last state, both contiguous."""
    inputs = x, dt, A, B, C, D, dt_bias, initial_state
    dtype = state_dtype(*inputs)
    (batch, _, heads, head_dim), d_state = x.shape, B.shape[3]
    y = cpu.empty(x.shape, dtype)
    last_state = cpu.empty((batch, heads, head_dim, d_state), dtype)
    sequences, arrays = _read(inputs, dtype)
    _run("ssd_forward", inputs, sequences | {"y": y}, arrays | {"last_state": last_state}, dt_softplus, reverse)
    return y.to(x.dtype), last_state


def backward(
    dy: Tensor, d_last_state: Tensor | None, inputs: tuple[Tensor | None, ...], *, dt_softplus: bool, reverse: bool
) -> list[Tensor | None]:
    """Gradients of the inputs, in the order of `forward`'s arguments and in their dtypes; all contiguous."""
    dtype = state_dtype(*inputs)
    grads = [None if t is None else cpu.empty(t.shape, dtype) for t in inputs]
    dx, ddt, dA, dB, dC, dD, d_bias, d_initial_state = grads
    sequences, arrays = _read(inputs, dtype)
    sequences |= {"dy": cpu.readable(dy, dtype), "dx": dx, "ddt": ddt, "dB": dB, "dC": dC}
    arrays |= {"dA": dA, "dD": dD, "d_bias": d_bias, "d_initial_state": d_initial_state}
    arrays |= {"d_last_state": cpu.dense(d_last_state, dtype)}
    _run("ssd_backward", inputs, sequences, arrays, dt_softplus, reverse)
    return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]


_Tensors = dict[str, Tensor | None]


def _read(inputs: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[_Tensors, _Tensors]:
    """The inputs as the sequences and arrays that the kernel reads."""
    x, dt, A, B, C, D, dt_bias, initial_state = inputs
    sequences = {name: cpu.readable(t, dtype) for name, t in zip(_SEQUENCES, (x, dt, B, C), strict=True)}
    arrays = {name: cpu.dense(t, dtype) for name, t in zip(_ARRAYS, (A, D, dt_bias, initial_state), strict=True)}
    return sequences, arrays


def _run(
    kernel: str,
    inputs: tuple[Tensor | None, ...],
    sequences: _Tensors,
    arrays: _Tensors,
    dt_softplus: bool,
    reverse: bool,
) -> None:
    x, _, _, B, *_ = inputs
    assert x is not None
    assert B is not None
    groups, d_state = B.shape[2:]
    call = _Ssd(**dict(zip(_SIZES, (*x.shape, d_state, groups, dt_softplus), strict=True)))
    cpu.fill(call, sequences, arrays, reverse)
    cpu.run(kernel, state_dtype(*inputs), call)
