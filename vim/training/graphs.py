"""A training step without its launch costs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from vim.console.errors import ConfigError
from vim.timm_models.config import ModelConfig


def wants_cuda_graph(model: nn.Module, config: ModelConfig, accelerator: Accelerator, sharded: bool) -> bool:
    """Whether the run is one that `capture_training` is for: see ModelConfig.cuda_graph."""
    # Most models' checkpointing saves and restores the state of random numbers, which no capture can hold.
    capturable = not config.grad_checkpointing or getattr(model, "graph_safe_checkpointing", False)
    plain = not sharded and not config.compile and accelerator.gradient_accumulation_steps == 1
    return config.cuda_graph and capturable and plain and accelerator.device.type == "cuda"


def capture_training(model: nn.Module, images: Tensor, dtype: torch.dtype | None, memory: Any = None) -> None:
    """Make `model`, in place, replay its forward and its backward as CUDA graphs while in training mode, for batches of
    one shape; others run as before. Called again, it does the same for another shape.

    Gradients come in the same buffers at every step, so they must not be accumulated over steps.

    Args:
        model: on a GPU; parameters and buffers stay as they are.
        images: a batch of the shape.
        dtype: of autocast; None for none.
        memory: a torch.cuda.graph_pool_handle() that shapes share, of which each step has but one; None for their own.

    Raises: ConfigError if the model cannot be captured.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training, before = model.training, model.forward
    model.train()
    try:
        # A cast that autocast remembers from before a capture would be missing in the graph.
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            torch.cuda.make_graphed_callables(model, (images,), pool=memory)
    except torch.cuda.OutOfMemoryError:  # which has nothing to do with graphs: --find_batch_size looks for it
        raise
    except RuntimeError as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be captured as a CUDA graph; set model.cuda_graph to false: {error}"
        ) from error
    replay, shape = model.forward, images.shape
    model.forward = lambda batch: (replay if batch.shape == shape else before)(batch)
    model.train(training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # the warm-up of a capture moves running statistics
            buffer.copy_(buffers[name])


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replace gradients by their mean over the processes, and buffers by the first process's, as
    DistributedDataParallel does it, which all processes do together.

    That has nothing to overlap with a backward that is replayed whole, and launches two copies for each parameter
    after it: for Vim-S on two H200 GPUs 3 ms in an update of 38 (2026-11-26). Here all go in one message.

    Args:
        model: the same on all processes. A parameter without a gradient, on some of them, counts as zero there.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    _through_one_message(gradients, lambda message: (dist.all_reduce(message), message.div_(dist.get_world_size())))
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if buffers:
        _through_one_message(buffers, lambda message: dist.broadcast(message, src=0))


def _through_one_message(tensors: list[Tensor], send: Callable[[Tensor], Any]) -> None:
    """Change tensors of one type in place by what `send` does to all their numbers in a row."""
    message = torch.cat([tensor.flatten() for tensor in tensors])
    send(message)
    pieces = message.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)])
