"""Parts of a layer that choose their own precision."""

import torch
from torch import Tensor


def at_least_fp32(t: Tensor) -> Tensor:
    """In fp32 if it is in half precision, which rounds sums along a whole sequence or through all layers."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
