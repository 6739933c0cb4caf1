"""What a Vision Mamba looks at: step sizes, implicit attention, class maps and receptive fields."""

from .config import VisualizeConfig
from .maps import class_map, image_maps, implicit_attention, receptive_field, scan_of_block, step_sizes
from .sheet import visualize

__all__ = [
    "VisualizeConfig",
    "class_map",
    "image_maps",
    "implicit_attention",
    "receptive_field",
    "scan_of_block",
    "step_sizes",
    "visualize",
]
