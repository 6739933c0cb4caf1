"""The model of a tool and its weights."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """A model and its initial weights."""

    name: str = "vim_tiny"
    """Any timm model, a run folder (runs/quickstart), local-dir:<folder> or hf-hub:<repository>."""
    pretrained: bool | None = None
    """Start from the released weights, or those of the folder or repository. null: only from a folder or repository."""
    checkpoint: str | None = None
    """Start from this file: official weights, a run's checkpoint or safetensors. All tensors must fit, except a head
    for other classes."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model: img_size, patch_size, in_chans, depth, drop_path_rate ..."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the model."""
    cuda_graph: bool = True
    """Replay training steps as CUDA graphs: launching small kernels one by one can take longer than running them. No
    effect on CPUs, with accumulate, compile or fsdp, or with grad_checkpointing of models other than Vim."""

    def __post_init__(self):
        if self.pretrained and self.checkpoint:
            raise ValueError("model.pretrained and model.checkpoint both name initial weights; give one of them")


@dataclass
class LoadedModelConfig:
    """A trained model with its own classes, for the tools that do not train."""

    model: str = "vim_tiny"
    """Any timm model, a run folder (runs/quickstart), local-dir:<folder> or hf-hub:<repository>."""
    checkpoint: str | None = None
    """File of weights; null: the released weights, or those of the folder."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model, for example img_size."""
