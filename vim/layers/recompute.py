"""Activation checkpointing for blocks with a selective scan."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import vim_kernels  # noqa: F401 (it registers the operator)

KEEP_SCANS = partial(create_selective_checkpoint_contexts, [torch.ops.vim_kernels.selective_scan.default])


def recompute_all_but_scans(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of whose activations only x and what its scans return stay in memory for the backward.

    The rest, over two thirds of a Vim block, is computed again: matrix products, convolution and norm, which are cheap
    beside the scan. `function` must not draw random numbers: their state is not restored, which a CUDA graph forbids.
    """
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, context_fn=KEEP_SCANS)
