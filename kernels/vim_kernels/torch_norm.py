"""Backend `torch` of `rms_norm`: ATen operators only."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import state_dtype


def rms_norm(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, groups: int, dtype: torch.dtype) -> Tensor:
    """See `vim_kernels.rms_norm`."""
    full = state_dtype(x, weight, gate)
    x = x.to(full) if gate is None else x.to(full) * F.silu(gate.to(full))
    if groups == 1:
        return F.rms_norm(x, weight.shape, weight.to(full), eps).to(dtype)
    blocks = x.unflatten(-1, (groups, -1))
    return (F.rms_norm(blocks, blocks.shape[-1:], eps=eps).flatten(-2) * weight.to(full)).to(dtype)


def with_heading(y: Tensor, heading: bool, reverse: bool) -> Tensor:
    """The second result of `vim_kernels.pre_norm`, from the normalised tokens."""
    if not heading:
        return y
    mean = y.mean(1, keepdim=True)
    return torch.cat((mean, y[:, :-1].flip(1), y[:, -1:]) if reverse else (mean, y), 1)


def add(x: Tensor, branch: Tensor, bias: Tensor | None, scale: Tensor | None, heading: bool, reverse: bool) -> Tensor:
    """See `vim_kernels.add_branch`."""
    if heading:
        branch = torch.cat((branch[:, 1:-1].flip(1), branch[:, -1:]), 1) if reverse else branch[:, 1:]
    if bias is not None:
        branch = branch + bias
    return x + (branch if scale is None else branch * scale[:, None, None])
