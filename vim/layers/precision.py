"""Parts of a layer that choose their own precision."""

import contextlib

import torch
from torch import Tensor


def own_precision(device: str) -> contextlib.AbstractContextManager:
    """No autocast on a kind of device, which would take to low precision what must not be. There is none on meta."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def at_least_fp32(t: Tensor) -> Tensor:
    """A parameter of a model in half precision, for sums along a whole sequence."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
