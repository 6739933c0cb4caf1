"""The gated activation of an MLP: public functions and operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .checks import check, check_shape, check_tensors
from .precision import state_dtype


def swiglu(gate: Tensor, x: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * x, computed in fp32 at least and rounded once.

    On a GPU this is one kernel forward and one for both gradients, where PyTorch takes two and three. "auto" leaves it
    to the compiler under torch.compile, which fuses it with its neighbours.

    Args:
        gate, x: any shape, the same for both, and any float dtypes.
        backend: "auto", "triton" or "torch". A named backend runs or raises.

    Returns: x's shape and dtype.

    Raises: ValueError, TypeError: a wrong shape, device, dtype or backend name. RuntimeError: a named backend that
        cannot run here.

    Source: Shazeer 2020, arXiv 2002.05202, equation 6.
    """
    check_tensors({"gate": gate, "x": x}, like="x")
    check_shape("gate", gate, "the shape of x", tuple(x.shape))
    chosen = backends.kernels_or_torch("swiglu", backend, x.device)
    if chosen == "torch" or x.numel() == 0:  # a grid cannot be empty
        wide = torch.promote_types(torch.promote_types(gate.dtype, x.dtype), torch.float32)
        return (F.silu(gate.to(wide)) * x.to(wide)).to(x.dtype)
    return torch.ops.vim_kernels.swiglu(gate, x)


def biased_swiglu(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """`swiglu` of the two halves of x + bias: the gate is the first half.

    For one matrix product in place of two. The kernel adds the biases, and sums their gradients as it finds them:
    another pass would read all gradients again.

    Args:
        x: (..., 2 * channels), any float dtype. bias: (2 * channels,).
        backend: see `swiglu`.

    Returns: (..., channels) in x's dtype.

    Raises: as `swiglu`.
    """
    check_tensors({"x": x, "bias": bias}, like="x")
    check(x.dim() > 0 and x.shape[-1] % 2 == 0, "x", x, "have an even number of channels")
    check_shape("bias", bias, "(2 * channels,)", (x.shape[-1],))
    if backends.kernels_or_torch("swiglu", backend, x.device) == "torch" or x.numel() == 0:
        gate, half = (x.to(state_dtype(x, bias)) + bias).chunk(2, dim=-1)
        return (F.silu(gate) * half).to(x.dtype)
    return torch.ops.vim_kernels.biased_swiglu(x, bias)


@torch.library.custom_op("vim_kernels::swiglu", mutates_args=(), schema="(Tensor gate, Tensor x) -> Tensor")
def _forward_op(gate, x):
    from .triton_kernels import swiglu as triton_swiglu  # imports triton, which not every platform has

    backends.check_no_tangents()
    return triton_swiglu.forward(gate, x)


@_forward_op.register_fake
def _(gate, x):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "vim_kernels::swiglu_backward", mutates_args=(), schema="(Tensor dy, Tensor gate, Tensor x) -> (Tensor, Tensor)"
)
def _backward_op(dy, gate, x):
    from .triton_kernels import swiglu as triton_swiglu

    backends.check_no_tangents()
    d_gate, dx = gate.new_empty(gate.shape), x.new_empty(x.shape)
    triton_swiglu.backward(dy, gate, x, None, d_gate, dx)
    return d_gate, dx


@_backward_op.register_fake
def _(dy, gate, x):
    return gate.new_empty(gate.shape), x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return torch.ops.vim_kernels.swiglu_backward(dy, *ctx.saved_tensors)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(backends.refuse_transform)


@torch.library.custom_op("vim_kernels::biased_swiglu", mutates_args=(), schema="(Tensor x, Tensor bias) -> Tensor")
def _biased_op(x, bias):
    from .triton_kernels import swiglu as triton_swiglu

    backends.check_no_tangents()
    gate, half = x.chunk(2, dim=-1)
    return triton_swiglu.forward(gate, half, bias)


@_biased_op.register_fake
def _(x, bias):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op(
    "vim_kernels::biased_swiglu_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor bias) -> (Tensor, Tensor)",
)
def _biased_backward_op(dy, x, bias):
    from .triton_kernels import swiglu as triton_swiglu

    backends.check_no_tangents()
    dx = x.new_empty(x.shape)
    (gate, half), (d_gate, d_half) = x.chunk(2, dim=-1), dx.chunk(2, dim=-1)
    return dx, triton_swiglu.backward(dy, gate, half, bias, d_gate, d_half)


@_biased_backward_op.register_fake
def _(dy, x, bias):
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _biased_backward(ctx, dy):
    return torch.ops.vim_kernels.biased_swiglu_backward(dy, *ctx.saved_tensors)


_biased_op.register_autograd(_biased_backward, setup_context=_setup_context)
_biased_backward_op.register_autograd(backends.refuse_transform)
