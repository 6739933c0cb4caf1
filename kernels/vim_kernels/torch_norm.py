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
