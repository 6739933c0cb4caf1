"""Parts of a computation that choose their own precision."""

import contextlib

import torch


def own_precision(device: str) -> contextlib.AbstractContextManager:
    """No autocast on a kind of device, which would take to low precision what must not be. There is none on meta."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
