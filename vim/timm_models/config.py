"""The model of a tool: which one, and from which weights."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """Which model, and from which weights it starts."""

    name: str = "vim_tiny"
    """Any timm model, a run folder (runs/quickstart), local-dir:<folder> or hf-hub:<repository>."""
    pretrained: bool | None = None
    """Start from the model's released weights, or those of the folder or repository. null: from the latter only."""
    checkpoint: str | None = None
    """Start from this file: official weights, a run's checkpoint, safetensors. All must fit, but for the head where
    classes differ."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model: img_size, patch_size, in_chans, depth, drop_path_rate ..."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the model."""
    cuda_graph: bool = True
    """Replay training steps as CUDA graphs: launching small kernels one by one can take longer than running them. On
    GPUs, without accumulate, compile, fsdp and, but for Vim, grad_checkpointing; else without effect."""

    def __post_init__(self):
        if self.pretrained and self.checkpoint:
            raise ValueError("model.pretrained and model.checkpoint both name weights to start from; give one of them")


@dataclass
class LoadedModelConfig:
    """A model as it is, with its classes and its weights, for the tools that do not train."""

    model: str = "vim_tiny"
    """Any timm model, a run folder (runs/quickstart), local-dir:<folder> or hf-hub:<repository>."""
    checkpoint: str | None = None
    """File of weights; null for the model's released weights, or those of the folder."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model, for example img_size."""
