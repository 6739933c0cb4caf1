"""The precision of a computation: fp32 or fp64 by its inputs, and no autocast."""

import contextlib

import torch
from torch import Tensor


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any tensor is, else fp32: low precision cannot hold exp(delta * A) close to 1."""
    double = any(t is not None and t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return torch.float64 if double else torch.float32


def own_precision(device: str) -> contextlib.AbstractContextManager:
    """Disable autocast on a device type: it would run parts in low precision that must not be. None on meta."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
