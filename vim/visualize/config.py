"""The configuration of a sheet of maps; every field is read, and explained in `--help`."""

from dataclasses import dataclass

from vim.timm_models.config import LoadedModelConfig


@dataclass
class VisualizeConfig(LoadedModelConfig):
    """The sheets."""

    model: str = "vim_tiny"
    """A Vision Mamba: timm's name, a run folder (runs/quickstart), local-dir:<folder> or hf-hub:<repository>."""
    images: str = "data/imagenet/val"
    """A folder at any depth, a list (.txt, .tsv), .tar or .parquet shards, or hf://datasets/..."""
    count: int = 4
    """Images to show, evenly spread over all."""
    blocks: list[int] | None = None
    """Blocks to show, from 0, or from -1 backwards; null: the first, the middle and the last."""
    output: str = "runs/visualize"
    """Folder for a PNG for each image, and receptive_fields.png."""

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.blocks is not None and not self.blocks:
            raise ValueError("blocks must name at least one; null for the first, the middle and the last")
