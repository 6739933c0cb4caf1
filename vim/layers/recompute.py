"""Activation checkpointing for blocks with a selective scan."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


def recompute_all_but_scans(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of whose activations only x and what its scans return stay in memory for the backward.

    The rest, over two thirds of a Vim block, is computed again: matrix products, convolution and norm, which are cheap
    beside the scan. `function` must not draw random numbers: their state is not restored, which a CUDA graph forbids.
    """

    def keep_scans():
        return create_selective_checkpoint_contexts([torch.ops.vim_kernels.selective_scan.default])

    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, context_fn=keep_scans)
