"""The configuration of a feature export; every field is read, and explained in `--help`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vim.training.config import Precision

POOLS = ("token", "avg", "map")


@dataclass
class FeaturesConfig:
    """The export."""

    model: str = "vim_tiny"
    """Any timm model, a run folder (runs/quickstart), local-dir:<folder> or hf-hub:<repository>."""
    checkpoint: str | None = None
    """File of weights; null for the model's released weights, or those of the folder."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model, for example img_size."""
    images: str = "data/imagenet/val"
    """A folder of images at any depth, a list (.txt, .tsv: path, tab, label), a .tar file or a folder of such."""
    output: str = "runs/features"
    """Folder of the export. An unfinished one of the same configuration is gone on with."""
    pools: list[str] = field(default_factory=lambda: ["token"])
    """What to keep of the tokens: token (the class token), avg (mean over the image), map (the image, row by row)."""
    blocks: list[int] | None = None
    """Blocks whose normalised tokens to take, from 0, or from -1 backwards; null: the model's last features."""
    dtype: Literal["fp16", "fp32"] = "fp32"
    """Of the stored features."""
    l2: bool = False
    """Scale each feature vector to length 1."""
    format: Literal["parquet", "npz", "safetensors"] = "parquet"
    """Of the shards."""
    rows_per_shard: int = 8192
    """Images in a shard. A killed export loses at most the shard at hand of each process."""
    batch_size: int = 128
    """Images in a step."""
    num_workers: int = 2
    """Processes that load images, for each exporting process; 0: it loads itself. Results do not depend on it."""
    precision: Precision = "fp32"
    """Of the forward pass."""

    def __post_init__(self):
        for pool in self.pools:
            if pool not in POOLS:
                raise ValueError(f"pools must be of {', '.join(POOLS)}, got {pool!r}")
        if not self.pools or len(set(self.pools)) < len(self.pools):
            raise ValueError(f"pools must name at least one, and none twice, got {self.pools}")
        if self.blocks is not None and (not self.blocks or len(set(self.blocks)) < len(self.blocks)):
            raise ValueError(f"blocks must name at least one, and none twice, got {self.blocks}; null for the last")
        for name in ("rows_per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {self.num_workers}")
