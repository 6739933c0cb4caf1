"""Root-mean-square normalisation of a residual stream: public function and operator."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .checks import check, check_shape, check_tensors


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 at least and rounded once.

    With autocast a stream stays in fp32 and what is made of it is not: torch normalises into fp32 and casts in a pass
    of its own. On a GPU this is one kernel, and one for both gradients.

    Args:
        x: (..., channels), any float dtype. weight: (channels,).
        eps: added to the mean of squares.
        dtype: of the result, x's if None.

    Returns: (..., channels).

    Raises: ValueError, TypeError: a wrong shape, device or dtype.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467, equation 4.
    """
    check_tensors({"x": x, "weight": weight}, like="x")
    check(x.dim() > 0, "x", x, "have a dimension")
    check_shape("weight", weight, "(channels,)", (x.shape[-1],))
    dtype = x.dtype if dtype is None else dtype
    # The compiler fuses torch's own with its neighbours.
    if x.numel() == 0 or torch.compiler.is_compiling() or backends.resolve("auto", x.device) != "triton":
        full = torch.promote_types(torch.float32, torch.promote_types(x.dtype, weight.dtype))
        return F.rms_norm(x.to(full), weight.shape, weight.to(full), eps).to(dtype)
    return torch.ops.vim_kernels.rms_norm(x, weight, eps, dtype)


@torch.library.custom_op(
    "vim_kernels::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, float eps, ScalarType dtype) -> Tensor",
)
def _forward_op(x, weight, eps, dtype):
    from . import triton_norm  # imports triton, which not every platform has

    return triton_norm.forward(x, weight, eps, dtype)


@_forward_op.register_fake
def _(x, weight, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op(
    "vim_kernels::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
)
def _backward_op(dy, x, weight, eps):
    from . import triton_norm

    return triton_norm.backward(dy, x, weight, eps)


@_backward_op.register_fake
def _(dy, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    return *torch.ops.vim_kernels.rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
