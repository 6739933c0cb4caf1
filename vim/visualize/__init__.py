"""Look inside a Vision Mamba: step sizes, implicit attention, class maps and receptive fields."""

from .config import VisualizeConfig
from .maps import (
    CLASS_MAP,
    as_pixels,
    block_maps,
    class_map,
    image_maps,
    implicit_attention,
    receptive_field,
    scan_of_block,
    step_sizes,
)
from .scanning_model import has_scans
from .sheet import visualize

__all__ = [
    "CLASS_MAP",
    "VisualizeConfig",
    "as_pixels",
    "block_maps",
    "class_map",
    "has_scans",
    "image_maps",
    "implicit_attention",
    "receptive_field",
    "scan_of_block",
    "step_sizes",
    "visualize",
]
