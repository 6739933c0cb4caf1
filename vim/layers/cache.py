"""What the caches of layers have in common: a call updates them in place, and no gradient passes through them."""

import torch
from torch import Tensor


def before_update(state: Tensor) -> Tensor:
    """The part of a cache that a call starts from, for operators that keep it for their backward: with gradients a
    copy, because the call overwrites the cache."""
    return state.clone() if torch.is_grad_enabled() else state
