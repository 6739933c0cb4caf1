"""Root-mean-square normalisation of a residual stream or of a gated output: public function and operator."""

import torch
from torch import Tensor

from . import backends, torch_norm
from .checks import check, check_shape, check_tensors


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    gate: Tensor | None = None,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; with a gate, the same of x * silu(gate).

    Computed in fp32 at least and rounded once. Under autocast the stream stays in fp32 and its consumers do not: torch
    normalises into fp32 and casts in a second pass. On a GPU this is one kernel forward and one for all gradients.
    "auto" leaves the norm to the compiler under torch.compile, which fuses it with its neighbours.

    Args:
        x: (..., channels), any float dtype. weight: (channels,).
        eps: added to the mean of squares.
        gate: x's shape, any float dtype.
        groups: number of equal blocks of channels; each is normalised separately.
        dtype: of the result; None: x's.
        backend: "auto", "triton" or "torch". A named backend runs or raises.

    Returns: (..., channels).

    Raises: ValueError, TypeError: a wrong shape, device, dtype or backend name. RuntimeError: a named backend that
        cannot run here.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467, equation 4; gate and groups: Dao & Gu 2024, arXiv 2405.21060,
        section 7.
    """
    check_tensors({"x": x, "weight": weight, "gate": gate}, like="x")
    check(x.dim() > 0, "x", x, "have a dimension")
    check_shape("weight", weight, "(channels,)", (x.shape[-1],))
    check_shape("gate", gate, "the shape of x", tuple(x.shape))
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups must divide the {x.shape[-1]} channels of x, got {groups}")
    dtype = x.dtype if dtype is None else dtype
    chosen = backends.kernels_or_torch("rms_norm", backend, x.device)
    if chosen == "torch" or x.numel() == 0:  # a grid cannot be empty
        return torch_norm.rms_norm(x, weight, gate, eps, groups, dtype)
    return torch.ops.vim_kernels.rms_norm(x, weight, gate, eps, groups, dtype)


@torch.library.custom_op(
    "vim_kernels::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? gate, float eps, int groups, ScalarType dtype) -> Tensor",
)
def _forward_op(x, weight, gate, eps, groups, dtype):
    from .triton_kernels import norm as triton_norm  # imports triton, which not every platform has

    backends.check_no_tangents()
    return triton_norm.forward(x, weight, gate, eps, groups, dtype)


@_forward_op.register_fake
def _(x, weight, gate, eps, groups, dtype):
    return x.new_empty(x.shape, dtype=dtype)


# The last gradient, that of the gate, is empty if there is no gate.
@torch.library.custom_op(
    "vim_kernels::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? gate, float eps, int groups) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(dy, x, weight, gate, eps, groups):
    from .triton_kernels import norm as triton_norm

    backends.check_no_tangents()
    return triton_norm.backward(dy, x, weight, gate, eps, groups)


@_backward_op.register_fake
def _(dy, x, weight, gate, eps, groups):
    d_gate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_gate


def _setup_context(ctx, inputs, output):
    x, weight, gate, ctx.eps, ctx.groups, _ = inputs
    ctx.save_for_backward(x, weight, gate)


def _backward(ctx, dy):
    x, weight, gate = ctx.saved_tensors
    dx, d_weight, d_gate = torch.ops.vim_kernels.rms_norm_backward(dy, x, weight, gate, ctx.eps, ctx.groups)
    return dx, d_weight, None if gate is None else d_gate, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(backends.refuse_transform)
