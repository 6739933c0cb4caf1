"""Norms of a residual stream and of a gated output, as in mamba_ssm.ops.triton.layer_norm and layernorm_gated."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_shape, check_tensors
from ..precision import state_dtype
from ..rms_norm import rms_norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
):
    """Add x to a residual stream and normalise the sum over the last dimension.

    Args:
        x, residual: (..., dim). weight, bias: (dim,).
        rowscale: (...), factors of the rows of x; then dropout with probability dropout_p.
        prenorm: also return the sum.
        residual_in_fp32: without a residual, the sum is returned in fp32 and not in x's dtype. With one it has the
            residual's dtype.
        is_rms_norm: divide by the root of the mean square, without subtracting the mean.
        x1, weight1, bias1, return_dropout_mask: refused.

    Returns: (..., dim) in x's dtype, or (normalised, sum).

    Raises: ValueError, TypeError: a wrong shape, device or dtype. NotImplementedError: a refused option.
    """
    refused = {"x1": x1, "weight1": weight1, "bias1": bias1, "return_dropout_mask": return_dropout_mask or None}
    for name, value in refused.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not supported, it must be left out; call the norm once per output")
    check_tensors({"x": x, "weight": weight, "bias": bias, "residual": residual, "rowscale": rowscale}, like="x")
    check_shape("weight", weight, "(dim,)", (x.shape[-1],))
    check_shape("bias", bias, "(dim,)", (x.shape[-1],))
    check_shape("residual", residual, "the shape of x", tuple(x.shape))
    check_shape("rowscale", rowscale, "the shape of x without the last dimension", tuple(x.shape[:-1]))
    full = state_dtype(x, weight, bias, residual)
    stream = x
    if rowscale is not None:
        stream = stream.to(full) * rowscale.to(full).unsqueeze(-1)
    if dropout_p > 0:
        stream = F.dropout(stream, dropout_p)
    if residual is not None:
        stream = stream.to(full) + residual.to(full)
    y = _normed(stream, weight, bias, eps, is_rms_norm=is_rms_norm, dtype=x.dtype)
    if not prenorm:
        return y
    if residual is not None:
        return y, stream.to(residual.dtype)
    return y, stream.to(torch.float32 if residual_in_fp32 else x.dtype)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
):
    """`layer_norm_fn` with is_rms_norm=True."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        is_rms_norm=True,
        return_dropout_mask=return_dropout_mask,
    )


class RMSNorm(nn.Module):
    """`rms_norm_fn` with its weight; dropout in training only."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False):
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """norm(x) * silu(z), or norm(x * silu(z)) if the gate comes before the norm.

    Args:
        x, z: (..., dim). weight, bias: (dim,).
        group_size: channels that are normalised together; None takes all.
        is_rms_norm: divide by the root of the mean square, without subtracting the mean.

    Returns: (..., dim) in x's dtype.

    Raises: ValueError, TypeError: a wrong shape, device, dtype or group_size.
    """
    dim = x.shape[-1]
    group_size = dim if group_size is None else group_size
    if group_size < 1 or dim % group_size:
        raise ValueError(f"group_size must divide the {dim} channels of x, got {group_size}")
    check_tensors({"x": x, "weight": weight, "bias": bias, "z": z}, like="x")
    check_shape("weight", weight, "(dim,)", (dim,))
    check_shape("bias", bias, "(dim,)", (dim,))
    check_shape("z", z, "the shape of x", tuple(x.shape))
    full, before, after = state_dtype(x, weight, bias, z), z, None
    if norm_before_gate:
        before, after = None, z
    y = _normed(
        x,
        weight,
        bias,
        eps,
        gate=before,
        groups=dim // group_size,
        is_rms_norm=is_rms_norm,
        dtype=x.dtype if after is None else full,
    )
    return y if after is None else (y * F.silu(after.to(full))).to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`layernorm_fn` with is_rms_norm=True."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


class RMSNormGated(nn.Module):
    """`rmsnorm_fn` with its weight: the RMSNorm of layernorm_gated."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)


def _normed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    gate: Tensor | None = None,
    groups: int = 1,
    is_rms_norm: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The norm of x, or of x * silu(gate), in blocks of channels; computed in fp32 at least and rounded once."""
    full = state_dtype(x, weight, bias, gate)
    if is_rms_norm and bias is None:
        return rms_norm(x, weight, eps, gate=gate, groups=groups, dtype=dtype)
    if is_rms_norm:
        y = rms_norm(x, weight, eps, gate=gate, groups=groups, dtype=full)
    else:
        x = x.to(full) if gate is None else x.to(full) * F.silu(gate.to(full))
        blocks = x.unflatten(-1, (groups, -1))
        y = F.layer_norm(blocks, blocks.shape[-1:], eps=eps).flatten(-2) * weight.to(full)
    return (y if bias is None else y + bias.to(full)).to(dtype)
