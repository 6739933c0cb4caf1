"""A block of Vision Mamba in one call, on a CPU and without gradients."""

import ctypes
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from . import backends
from .block_weights import direction_shapes
from .checks import check, check_shape, check_tensors
from .cpu_kernels import library as cpu

_DTYPES = (torch.float32, torch.float64)


class SSMWeights(NamedTuple):
    """The parameters of one direction. Shapes: E d_inner, N d_state, R dt_rank, W taps."""

    conv: Tensor  # (E, 1, W), as nn.Conv1d holds it
    conv_bias: Tensor | None  # (E,)
    x_proj: Tensor  # (R + 2 N, E): the rows of dt, B and C
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A_log: Tensor  # (E, N)
    D: Tensor  # (E,)


class BiMambaBlockWeights(NamedTuple):
    """The parameters of x + out_proj(both scans(in_proj(norm(x)))) for x of D channels. All have one dtype."""

    norm: Tensor  # (D,)
    in_proj: Tensor  # (2 E, D): the rows of x, then those of z
    out_proj: Tensor  # (D, E)
    forward: SSMWeights
    reverse: SSMWeights

    def named(self) -> dict[str, Tensor | None]:
        """Every tensor, or None for an absent bias."""
        directions = {name: getattr(self, name)._asdict() for name in ("forward", "reverse")}
        shared = {name: getattr(self, name) for name in ("norm", "in_proj", "out_proj")}
        return shared | {f"{d}.{name}": t for d, own in directions.items() for name, t in own.items()}


def bimamba_block(x: Tensor, weights: BiMambaBlockWeights, *, scale: float = 0.5, eps: float = 1e-5) -> Tensor:
    """Run x + mixer(rms_norm(x)) with the mixer of Vision Mamba. No gradients.

        x, z = in_proj(rms_norm(x))
        per direction: u = silu(causal_conv1d(x)),    dt, B, C = x_proj(u),    dt = dt_proj(dt)
        mixed = out_proj(bidirectional_selective_scan(u, dt, -exp(A_log), B, C, D=D, z=z, dt_bias=dt_bias, scale=scale))

    The kernel takes a few sequences at a time, whose tensors stay in the processor's cache. Operators of their own
    write and read those of the whole batch.

    Args:
        x: (batch, length, d_model), fp32 or fp64, on a CPU.
        weights: the block's parameters, in x's dtype.
        scale: factor of the sum of both directions. eps: of the norm.

    Returns: (batch, length, d_model), contiguous.

    Raises: ValueError, TypeError: a wrong shape, device or dtype. RuntimeError: the kernel cannot run here.

    Source: Zhu et al. 2024, arXiv 2401.09417, Algorithm 1.
    """
    _check(x, weights)
    if (reason := backends.unavailable("cpu")) is not None:
        raise RuntimeError(f"bimamba_block cannot run here: {reason}")
    y = cpu.empty(x.shape, x.dtype)
    if y.numel() == 0:
        return y
    ssms = weights.forward, weights.reverse
    batch, length, d_model = x.shape
    d_inner, d_state = ssms[0].A_log.shape
    block = _Block(
        batch=batch,
        length=length,
        d_model=d_model,
        d_inner=d_inner,
        d_state=d_state,
        dt_rank=ssms[0].dt_proj.shape[1],
        width=ssms[0].conv.shape[2],
        scale=scale,
        eps=eps,
    )
    # The kernel reads memory of these copies, so they live until it has run.
    sequences = {"x": cpu.readable(x, x.dtype), "y": y}
    shared, *own = (
        {name: cpu.dense(t, x.dtype) for name, t in tensors.items()}
        for tensors in ({name: getattr(weights, name) for name in _SHARED}, *(ssm._asdict() for ssm in ssms))
    )
    cpu.fill(block, sequences, shared, reverse=False)
    for struct, arrays in zip(block.direction, own, strict=True):
        cpu.fill(struct, {}, arrays, reverse=False)
    cpu.run("bimamba_block", x.dtype, block)
    return y


def bimamba_block_serves(x: Tensor, weights: BiMambaBlockWeights) -> bool:
    """Whether `bimamba_block` may stand in for the operators that it consists of.

    It may not if something needs to see them: gradients, autocast, a trace, a transform, a counter of operations, or
    tensors of a subclass.
    """
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and all(
            t is None or (type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype and t.device == x.device)
            for t in weights.named().values()
        )
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"))
        and not backends.transformed()
        and _len_torch_dispatch_stack() == 0
        and backends.unavailable("cpu") is None
    )


def _check(x: Tensor, weights: BiMambaBlockWeights) -> None:
    """Raise for the first argument that breaks a rule."""
    tensors: dict[str, Tensor | None] = {f"weights.{name}": t for name, t in weights.named().items()}
    tensors["x"] = x
    check_tensors(tensors, like="x", dtypes=_DTYPES)
    check(x.device.type == "cpu", "x", x, "be on a CPU", x.device)
    check(x.dim() == 3, "x", x, "be (batch, length, d_model)")
    d_model = x.shape[2]
    for name, dims in (("A_log", 2), ("dt_proj", 2), ("conv", 3)):
        t = getattr(weights.forward, name)
        check(t.dim() == dims, f"weights.forward.{name}", t, f"have {dims} dimensions")
    (d_inner, d_state), (_, rank), (_, _, taps) = (
        weights.forward.A_log.shape,
        weights.forward.dt_proj.shape,
        weights.forward.conv.shape,
    )
    check(d_inner * d_state > 0, "weights.forward.A_log", weights.forward.A_log, "have at least one channel and state")
    check(taps > 0, "weights.forward.conv", weights.forward.conv, "have at least one tap")
    shapes = {"norm": (d_model,), "in_proj": (2 * d_inner, d_model), "out_proj": (d_model, d_inner)}
    own = {"conv": (d_inner, 1, taps), **direction_shapes(d_inner, d_state, rank)}
    shapes |= {f"{direction}.{name}": shape for direction in ("forward", "reverse") for name, shape in own.items()}
    for name, shape in shapes.items():
        t = tensors[f"weights.{name}"]
        check_shape(f"weights.{name}", t, "of the block's sizes", shape)
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"weights.{name} must have the dtype of x, {x.dtype}, got {t.dtype}")


_SHARED = ("norm", "in_proj", "out_proj")


class _Weights(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in SSMWeights._fields)


class _Block(cpu.Call):
    _fields_: ClassVar[tuple] = (
        *((n, ctypes.c_int64) for n in ("batch", "length", "d_model", "d_inner", "d_state", "dt_rank", "width")),
        *((name, ctypes.c_double) for name in ("scale", "eps")),
        *((name, cpu.Sequence) for name in ("x", "y")),
        *((name, ctypes.c_void_p) for name in _SHARED),
        ("direction", _Weights * 2),
    )
