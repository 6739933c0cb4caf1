"""Precision of the parts of a layer that need at least fp32."""

import torch
from torch import Tensor


def at_least_fp32(t: Tensor) -> Tensor:
    """Cast half precision to fp32: its rounding errors add up along a sequence or through the layers."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
