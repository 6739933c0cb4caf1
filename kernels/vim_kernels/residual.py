"""A residual stream and the norms that read it: public functions and operator.

A block of a model normalises the stream, and adds its branch to it. On a GPU each of these functions is one kernel, and
one for all gradients. The sequence of a branch may begin with a heading: a row more, the mean of the normalised tokens.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends, torch_norm
from .checks import check, check_shape, check_tensors


def pre_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    heading: bool = False,
    reverse: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x, to go on with, and its RMS norm, to begin a branch with.

    Whoever adds the branch to the first result, and not to x itself, gets the gradients of both in one kernel.

    Args:
        x: (batch, length, channels), any float dtype. weight: (channels,). eps: added to the mean of squares.
        heading: begin the second result with a row more, the mean of the normalised tokens. reverse: its other rows are
            the tokens from last to first, but for the last one, which stays. Only with a heading.
        dtype: of the second result; None: x's.
        backend: "auto", "triton" or "torch". A named backend runs or raises. "auto" leaves the work to the compiler
            under torch.compile.

    Returns: x, and (batch, length, channels), with a heading (batch, length + 1, channels).

    Raises: ValueError, TypeError: a wrong shape, device, dtype or backend name. RuntimeError: a named backend that
        cannot run here.
    """
    _check(x, None, None, weight, None, heading=heading, reverse=reverse)
    dtype = x.dtype if dtype is None else dtype
    if _takes_torch(x, backend):
        return x, torch_norm.with_heading(torch_norm.rms_norm(x, weight, None, eps, 1, dtype), heading, reverse)
    return _Residual.apply(x, None, None, weight, None, eps, dtype, heading, reverse)


def add_branch(
    x: Tensor,
    branch: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    heading: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x + (branch + bias) * scale, without the row of a heading, and with the tokens back in their order.

    Args:
        branch: as the second result of `pre_norm`. bias: (channels,).
        scale: (batch,), a factor of each sequence, without a gradient: for stochastic depth.
        heading, reverse, backend: see `pre_norm`.

    Returns: (batch, length, channels) in the wider dtype of x and branch.

    Raises: as `pre_norm`.
    """
    _check(x, branch, bias, None, scale, heading=heading, reverse=reverse)
    if _takes_torch(x, backend):
        return torch_norm.add(x, branch, bias, scale, heading, reverse)
    return _Residual.apply(x, branch, bias, None, scale, 0.0, x.dtype, heading, reverse)[0]


def add_and_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    heading: bool = False,
    reverse: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y = `add_branch` of x and branch, and the RMS norm of y, without a heading.

    Args: see `add_branch` and `pre_norm`; dtype: of the norm; None: that of y.

    Returns: y and its norm, (batch, length, channels).

    Raises: as `pre_norm`.
    """
    _check(x, branch, None, weight, scale, heading=heading, reverse=reverse)
    dtype = torch.promote_types(x.dtype, branch.dtype) if dtype is None else dtype
    if _takes_torch(x, backend):
        y = torch_norm.add(x, branch, None, scale, heading, reverse)
        return y, torch_norm.rms_norm(y, weight, None, eps, 1, dtype)
    return _Residual.apply(x, branch, None, weight, scale, eps, dtype, heading, reverse)


def _check(
    x: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    *,
    heading: bool,
    reverse: bool,
) -> None:
    check_tensors({"x": x, "branch": branch, "bias": bias, "weight": weight, "scale": scale}, like="x")
    check(x.dim() == 3, "x", x, "be (batch, length, channels)")
    batch, length, channels = x.shape
    check_shape("weight", weight, "(channels,)", (channels,))
    check_shape("bias", bias, "(channels,)", (channels,))
    check_shape("scale", scale, "(batch,)", (batch,))
    name = "(batch, length + 1, channels)" if heading else "the shape of x"
    check_shape("branch", branch, name, (batch, length + heading, channels))
    if reverse and not heading:
        raise ValueError("reverse must be False without a heading, got True; flip the tokens or ask for heading=True")


def _takes_torch(x: Tensor, backend: str) -> bool:
    # A grid cannot be empty.
    return backends.kernels_or_torch("residual", backend, x.device) == "torch" or x.numel() == 0


class _Residual(torch.autograd.Function):
    """The stream, x + (branch + bias) * scale or x itself, and its norm; None without a weight."""

    @staticmethod
    def forward(ctx, x, branch, bias, weight, scale, eps, dtype, heading, reverse):
        from .triton_kernels import norm as triton_norm  # imports triton, which not every platform has

        stream, y = triton_norm.residual_forward(
            x, branch, bias, scale, weight, eps, dtype, heading=heading, reverse=reverse
        )
        ctx.save_for_backward(None if weight is None else stream, weight, scale)
        ctx.options = {
            "eps": eps,
            "branch": None if branch is None else branch.dtype,
            "bias": None if bias is None else bias.dtype,
            "heading": heading,
            "reverse": reverse,
        }
        ctx.dtype = x.dtype
        ctx.set_materialize_grads(False)
        return stream, y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_stream, dy):
        from .triton_kernels import norm as triton_norm

        backends.check_no_tangents()
        if d_stream is None and dy is None:
            return (None,) * 9
        stream, weight, scale = ctx.saved_tensors
        if dy is None:  # nobody used the norm
            stream = weight = None
        dx, d_branch, d_bias, d_weight = triton_norm.residual_backward(
            d_stream, dy, stream, weight, scale, **ctx.options
        )
        return None if dx is None else dx.to(ctx.dtype), d_branch, d_bias, d_weight, None, None, None, None, None
