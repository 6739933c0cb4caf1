"""CUDA graphs for training steps: no launch overhead per kernel."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from vim.console.errors import ConfigError
from vim.timm_models.config import ModelConfig


def wants_cuda_graph(model: nn.Module, config: ModelConfig, accelerator: Accelerator, sharded: bool) -> bool:
    """Whether `capture_training` supports this run: see ModelConfig.cuda_graph."""
    # In most models activation checkpointing saves and restores the random state, which cannot be captured.
    capturable = not config.grad_checkpointing or getattr(model, "graph_safe_checkpointing", False)
    plain = not sharded and not config.compile and accelerator.gradient_accumulation_steps == 1
    return config.cuda_graph and capturable and plain and accelerator.device.type == "cuda"


def capture_training(model: nn.Module, images: Tensor, dtype: torch.dtype | None, memory: Any = None) -> None:
    """Make `model` replay its forward and backward pass as CUDA graphs in training mode, for batches of one shape.

    Works in place. Batches of other shapes run as before; call it again to capture another shape. Gradients are written
    to the same buffers at every step, so they must not be accumulated over steps.

    Args:
        model: on a GPU; parameters and buffers keep their values.
        images: a batch of the shape.
        dtype: of autocast; None: no autocast.
        memory: a torch.cuda.graph_pool_handle() to share among shapes, if each step uses one shape only; None: separate
            memory for each shape.

    Raises: ConfigError if the model cannot be captured.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training, before = model.training, model.forward
    model.train()
    try:
        # A cast that autocast cached before the capture would be missing in the graph.
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            torch.cuda.make_graphed_callables(model, (images,), pool=memory)
    except torch.cuda.OutOfMemoryError:  # not a problem of graphs; --find_batch_size catches it
        raise
    except RuntimeError as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be captured as a CUDA graph; set model.cuda_graph to false: {error}"
        ) from error
    replay, shape = model.forward, images.shape  # make_graphed_callables has replaced model.forward
    model.forward = lambda batch: (replay if batch.shape == shape else before)(batch)
    model.train(training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # the warm-up of a capture changes running statistics
            buffer.copy_(buffers[name])


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Average gradients over the processes and copy buffers from the first process, like DistributedDataParallel.

    A replayed CUDA graph leaves no compute to overlap with the all-reduce, so all gradients go out in one. DDP would
    launch two copies per parameter after the replay: 3 ms of a 38 ms update of Vim-S on two H200 GPUs (2026-11-26).

    All processes call this together.

    Args:
        model: the same on all processes. A gradient that a process lacks counts as zero.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    _in_one_message(gradients, lambda message: (dist.all_reduce(message), message.div_(dist.get_world_size())))
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if buffers:
        _in_one_message(buffers, lambda message: dist.broadcast(message, src=0))


def _in_one_message(tensors: list[Tensor], communicate: Callable[[Tensor], Any]) -> None:
    """Concatenate tensors of one dtype, communicate the result in place, and copy it back."""
    message = torch.cat([tensor.flatten() for tensor in tensors])
    communicate(message)
    pieces = message.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)])
