"""A training step without its launch costs."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .config import ModelConfig
from .errors import ConfigError


def wants_cuda_graph(model: nn.Module, config: ModelConfig, accelerator: Accelerator) -> bool:
    """Whether the run is one that `capture_training` is for: see ModelConfig.cuda_graph."""
    # Most models' checkpointing saves and restores the state of random numbers, which no capture can hold.
    capturable = not config.grad_checkpointing or getattr(model, "graph_safe_checkpointing", False)
    plain = not config.compile and accelerator.gradient_accumulation_steps == 1
    return config.cuda_graph and capturable and plain and accelerator.device.type == "cuda"


def capture_training(model: nn.Module, images: Tensor, dtype: torch.dtype | None) -> None:
    """Make `model`, in place, replay its forward and its backward as CUDA graphs while in training mode.

    Gradients come in the same buffers at every step, so they must not be accumulated over steps.

    Args:
        model: on a GPU; parameters and buffers stay as they are.
        images: a batch of the shape that every batch will have.
        dtype: of autocast; None for none.

    Raises: ConfigError if the model cannot be captured.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    model.train()
    try:
        # A cast that autocast remembers from before a capture would be missing in the graph.
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            torch.cuda.make_graphed_callables(model, (images,))
    except RuntimeError as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be captured as a CUDA graph; set model.cuda_graph to false: {error}"
        ) from error
    model.train(training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # the warm-up of a capture moves running statistics
            buffer.copy_(buffers[name])
