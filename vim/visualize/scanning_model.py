"""The interface of a Vision Mamba, for annotations: vim.visualize imports no model."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn

from vim.timm_models.timm_model import TimmModel

Scan = dict[str, Any]  # arguments of bidirectional_selective_scan, or of ssd


class Mixer(nn.Module):
    scan_inputs: Callable[[Tensor], Scan]


class Block(nn.Module):
    mixer: Mixer
    mixer_places: Callable[[Any, int], Tensor]  # for each token of a layout, its place in the mixer's sequence


class PatchEmbed(nn.Module):
    grid_size: tuple[int, int]


class ScanningModel(TimmModel):
    """Attributes of a Vision Mamba that the maps use. No model is an instance of this class: ask `has_scans`."""

    blocks: Sequence[Block]
    patch_embed: PatchEmbed
    class_token: str
    num_prefix_tokens: int
    prefix_first: Callable[[Tensor], Tensor]


def has_scans(model: nn.Module) -> TypeGuard[ScanningModel]:
    """Whether the blocks of a model have selective scans to look into."""
    blocks = getattr(model, "blocks", None)
    return blocks is not None and hasattr(getattr(blocks[0], "mixer", None), "scan_inputs")
