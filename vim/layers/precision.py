"""Parts of a layer that choose their own precision."""

import torch
from torch import Tensor


def at_least_fp32(t: Tensor) -> Tensor:
    """A parameter of a model in half precision, for sums along a whole sequence."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
