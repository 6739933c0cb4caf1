"""What all caches of layers share: a call updates them in place, and no gradient passes through them."""

import torch
from torch import Tensor


def before_update(state: Tensor) -> Tensor:
    """The initial state for an operator that saves it for the backward pass.

    With gradients this is a copy, because the call overwrites the cache.
    """
    return state.clone() if torch.is_grad_enabled() else state
