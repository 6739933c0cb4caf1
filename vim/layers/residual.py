"""The residual stream of a block, and the norms that read it.

Kernels take the weights of a plain RMSNorm. Another norm is called.
"""

from typing import Any

import torch
from torch import Tensor

import vim_kernels
from vim_kernels import add_branch, torch_norm

from .norm import LayerNorm, RMSNorm, dtype_behind
from .plain import is_plain

# FX keeps these calls as leaves; inside, they branch on device and dtype.
torch.fx.wrap("_pre_norm")
torch.fx.wrap("_add_and_norm")
torch.fx.wrap("add_branch")


def pre_norm(
    norm: RMSNorm | LayerNorm, x: Tensor, *, heading: bool = False, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """`vim_kernels.pre_norm` in the dtype to which a Linear behind it would cast."""
    if is_plain(norm):
        return _pre_norm(x, norm.weight, norm.eps, heading, reverse)
    return x, torch_norm.with_heading(norm(x), heading, reverse)


def add_and_norm(
    x: Tensor,
    branch: Tensor,
    norm: RMSNorm | LayerNorm,
    *,
    scale: Tensor | None = None,
    heading: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`vim_kernels.add_and_norm` in that dtype."""
    if is_plain(norm):
        return _add_and_norm(x, branch, norm.weight, norm.eps, scale, heading, reverse)
    x = add_branch(x, branch, scale=scale, heading=heading, reverse=reverse)
    return x, norm(x)


def _pre_norm(x: Tensor, weight: Tensor, eps: float | None, heading: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    assert eps is not None
    return vim_kernels.pre_norm(x, weight, eps, heading=heading, reverse=reverse, dtype=dtype_behind(x, weight))


def _add_and_norm(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float | None, scale: Tensor | None, heading: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    assert eps is not None
    options: dict[str, Any] = {"scale": scale, "heading": heading, "reverse": reverse}
    return vim_kernels.add_and_norm(x, branch, weight, eps, **options, dtype=dtype_behind(x, weight))
