"""Configuration of the sheets of maps. `--help` shows the text under each field."""

from dataclasses import dataclass

from vim.timm_models.config import LoadedModelConfig


@dataclass
class VisualizeConfig(LoadedModelConfig):
    """The sheets."""

    model: str = "vim_tiny"
    """A Vision Mamba: timm's name, a run folder (runs/quickstart), local-dir:<folder> or hf-hub:<repository>."""
    images: str = "data/imagenet/val"
    """A folder of images at any depth, a list (.txt, .tsv), a .tar file or a folder of such."""
    count: int = 4
    """Number of images to show, evenly spaced in `images`."""
    blocks: list[int] | None = None
    """Blocks to show; 0 is the first, -1 the last. null: the first, the middle and the last."""
    output: str = "runs/visualize"
    """Folder for one PNG per image, and receptive_fields.png."""

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.blocks is not None and not self.blocks:
            raise ValueError("blocks must name at least one block; null for the first, the middle and the last")
