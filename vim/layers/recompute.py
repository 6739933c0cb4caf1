"""Gradient checkpointing for blocks with a selective scan or a state-space dual."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import vim_kernels  # noqa: F401 (it registers the operators)

KEEP_SCANS = partial(
    create_selective_checkpoint_contexts,
    [torch.ops.vim_kernels.selective_scan.default, torch.ops.vim_kernels.ssd.default],
)


def recompute_all_but_scans(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run function(x) and keep only x and the outputs of its scans and duals for the backward pass.

    The backward pass recomputes the rest, over two thirds of the activations of a Vim block: matrix products,
    convolution and norm, which are cheap compared to the scan. `function` must not draw random numbers, because their
    state is not restored: a CUDA graph forbids it.
    """
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, context_fn=KEEP_SCANS)
