"""The configuration of a feature export; every field is read, and explained in `--help`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vim.timm_models.config import LoadedModelConfig
from vim.timm_models.precision import Precision

POOLS = ("token", "avg", "map")


@dataclass
class FeaturesConfig(LoadedModelConfig):
    """The export."""

    images: str = "data/imagenet/val"
    """A folder at any depth, a list (.txt, .tsv: path, tab, label), .tar or .parquet shards, or hf://datasets/..."""
    output: str | None = None
    """Folder; null: runs/features_<name of images>. An unfinished export of the same configuration is gone on with."""
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
        if self.output is None:
            self.output = f"runs/features_{re.sub(r'[-_.]*[*]', '', Path(self.images).stem)}"  # also of train-*.parquet
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


@dataclass
class KnnConfig:
    """Nearest-neighbour classification of exported features."""

    train: str = "runs/features_train"
    """Export whose labelled images vote."""
    val: str = "runs/features_val"
    """Export whose labelled images are classified."""
    column: str | None = None
    """Features to compare, by cosine; null: the first column."""
    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers of neighbours."""
    temperature: float | None = 0.07
    """A vote weighs exp(similarity / temperature); null: all weigh the same."""
    shots: list[int] = field(default_factory=list)
    """Also with so many images of each class, drawn from train."""
    draws: int = 3
    """Draws for each number of shots."""
    sheet: int = 8
    """Images of val to show with their nearest neighbours, if their files can be read; 0: none."""
    projection: int = 2000
    """Images of val to lay out in the plane by t-SNE; 0: none."""
    output: str = "runs/knn"
    """Folder for knn.json, knn.png, neighbours.png and projection.png; those of an earlier run are overwritten."""

    def __post_init__(self):
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k must name numbers from 1 up, got {self.k}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; null for equal votes")
        _check_shots(self.shots, self.draws)


@dataclass
class LinearProbeConfig:
    """Linear classifiers on exported features: inputs x learning rates, in one pass."""

    train: str = "runs/features_train"
    """Export to train on."""
    val: str = "runs/features_val"
    """Export to report on."""
    last_blocks: list[int] = field(default_factory=lambda: [1, 4])
    """Inputs: the last so many of the exported blocks, side by side. More than there are count as all."""
    pools: list[str] | None = None
    """Inputs: of each block, pools that were exported, joined by +; null: the first, and all but maps together."""
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0]
    )
    """The grid, for 256 images an update; scaled by batch_size / 256."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 256
    """Images an update."""
    select: float = 0.1
    """Part of the training images that chooses inputs and learning rate; the chosen one is trained again on all."""
    shots: list[int] = field(default_factory=list)
    """Also with so many images of each class, drawn from train."""
    draws: int = 3
    """Draws for each number of shots."""
    seed: int = 0
    """Of weights, order and draws."""
    output: str = "runs/linear_probe"
    """Folder for linear_probe.json and linear_probe.png; those of an earlier run are overwritten. An unfinished probe
    of the same configuration is gone on with."""

    def __post_init__(self):
        for name in ("last_blocks", "pools", "learning_rates"):
            if getattr(self, name) == []:
                raise ValueError(f"{name} must name at least one")
        if min(self.last_blocks) < 1 or min(self.learning_rates) <= 0:
            raise ValueError("last_blocks must be from 1 up, learning_rates positive")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}")
        if not 0 < self.select < 1:
            raise ValueError(f"select must be above 0 and below 1, got {self.select}")
        _check_shots(self.shots, self.draws)


def _check_shots(shots: list[int], draws: int) -> None:
    if shots and min(shots) < 1:
        raise ValueError(f"shots must be from 1 up, got {shots}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
