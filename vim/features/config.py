"""Configurations of the feature export, kNN and the linear probe. `--help` shows the text under each field."""

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
    """Folder; null: runs/features_<name of images>. An unfinished export of the same configuration is continued."""
    pools: list[str] = field(default_factory=lambda: ["token"])
    """Tokens to store: token (the class token, or the mean of several), avg (mean over the patches), map (all patches,
    row by row). Mamba-R's registers count as class tokens."""
    blocks: list[int] | None = None
    """Blocks whose normalised tokens to store; 0 is the first, -1 the last. null: the model's final features."""
    dtype: Literal["fp16", "fp32"] = "fp32"
    """Type of the stored features."""
    l2: bool = False
    """Scale each feature vector to length 1."""
    format: Literal["parquet", "npz", "safetensors"] = "parquet"
    """File format of the shards."""
    rows_per_shard: int = 8192
    """Images per shard. A killed export loses at most one unfinished shard per process."""
    batch_size: int = 128
    """Images per batch and process."""
    num_workers: int = 2
    """Worker processes per exporting process; 0 loads in that process. Results do not depend on it."""
    precision: Precision = "fp32"
    """Autocast precision of the forward pass."""

    def __post_init__(self):
        if self.output is None:
            self.output = f"runs/features_{re.sub(r'[-_.]*[*]', '', Path(self.images).stem)}"  # also of train-*.parquet
        for pool in self.pools:
            if pool not in POOLS:
                raise ValueError(f"pools must be of {', '.join(POOLS)}, got {pool!r}")
        if not self.pools or len(set(self.pools)) < len(self.pools):
            raise ValueError(f"pools must name at least one pool, and none twice, got {self.pools}")
        if self.blocks is not None and (not self.blocks or len(set(self.blocks)) < len(self.blocks)):
            raise ValueError(f"blocks must name at least one block, and none twice, got {self.blocks}; null: the last")
        for name in ("rows_per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {self.num_workers}")


@dataclass
class KnnConfig:
    """k-nearest-neighbour classification of exported features."""

    train: str = "runs/features_train"
    """Export whose labelled images vote."""
    val: str = "runs/features_val"
    """Export whose labelled images are classified."""
    column: str | None = None
    """Column to compare by cosine similarity; null: the first."""
    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers of neighbours to try."""
    temperature: float | None = 0.07
    """A vote weighs exp(similarity / temperature); null: equal weights."""
    shots: list[int] = field(default_factory=list)
    """Few-shot runs: images per class, drawn from train. They come in addition to the run on all images."""
    draws: int = 3
    """Random draws per number of shots."""
    sheet: int = 8
    """Images of val to show with their nearest neighbours, if their files can be read; 0: none."""
    projection: int = 2000
    """Images of val in the t-SNE plot; 0: no plot."""
    output: str = "runs/knn"
    """Folder for knn.json, knn.png, neighbours.png and projection.png; existing ones are overwritten."""

    def __post_init__(self):
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k must name numbers from 1 up, got {self.k}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; null for equal votes")
        _check_shots(self.shots, self.draws)


@dataclass
class LinearProbeConfig:
    """Linear classifiers on exported features, one for each input and learning rate, trained in one pass."""

    train: str = "runs/features_train"
    """Export to train on."""
    val: str = "runs/features_val"
    """Export to report on."""
    last_blocks: list[int] = field(default_factory=lambda: [1, 4])
    """Inputs: numbers of last exported blocks to concatenate. Larger numbers mean all blocks."""
    pools: list[str] | None = None
    """Inputs: exported pools to read of each block, several joined by +; null: the first, and all except map."""
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0]
    )
    """Learning rates to try, for a batch of 256; scaled by batch_size / 256."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 256
    """Images per update."""
    select: float = 0.1
    """Held-out fraction of the training images that selects input and learning rate. The winner is retrained on all."""
    shots: list[int] = field(default_factory=list)
    """Few-shot runs: images per class, drawn from train. They come in addition to the run on all images."""
    draws: int = 3
    """Random draws per number of shots."""
    seed: int = 0
    """Seed of initial weights, order and draws."""
    output: str = "runs/linear_probe"
    """Folder for linear_probe.json and linear_probe.png; existing ones are overwritten. An unfinished probe of the same
    configuration is continued."""

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
