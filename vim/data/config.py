"""The `data` and `augment` sections of a training configuration."""

import re
from dataclasses import dataclass, field
from typing import Literal

from vim.console.free_on_resume import FREE_ON_RESUME

# timm's policies; it leaves out sections that it does not know, or fails at them without a word.
AUTO_AUGMENT = re.compile(
    r"rand(-(m|n|mmax)\d+|-inc[01]|-(p|mstd)\d+(\.\d+)?|-t(weights|3aw?))*"
    r"|augmix(-[mwd]\d+|-b[01]|-(a|mstd)\d+(\.\d+)?)*"
    r"|(original|originalr|v0|v0r|3a)(-mstd\d+(\.\d+)?)?"
)


def check_loading(batch_size: int, num_workers: int) -> None:
    if batch_size < 1:
        raise ValueError(f"data.batch_size must be at least 1, got {batch_size}")
    if num_workers < 0:
        raise ValueError(f"data.num_workers must be 0 or more, got {num_workers}")


BadImages = Literal["raise", "skip"]


@dataclass
class EvalDataConfig:
    """Images: root/<split>/<class>/<image>, or tar or Parquet shards root/<split>-*."""

    root: str = field(default="data/imagenet", metadata=FREE_ON_RESUME)
    """Folder of the data set; for Parquet also on the hub: hf://datasets/<organisation>/<name>[@<revision>][/<folder>]."""
    val_split: str = "val"
    """Split to evaluate on."""
    batch_size: int = field(default=128, metadata=FREE_ON_RESUME)  # the total batch is checked with the checkpoint
    """Images per process and step."""
    num_workers: int = field(default=2, metadata=FREE_ON_RESUME)
    """Processes that load images, for each training process; 0: it loads itself. Results do not depend on it."""
    bad_images: BadImages = field(default="raise", metadata=FREE_ON_RESUME)
    """Files that cannot be read: raise stops at the first; skip goes on without them, counts them and lists them."""
    cache_gib: float | None = field(default=None, metadata=FREE_ON_RESUME)
    """GiB of disk for fetched Parquet shards, in $HF_ASSETS_CACHE; the longest unused give way. null: all stay."""
    img_size: int | None = None
    """Edge of the images in pixels, for models that take any size; null takes the model's."""
    mean: tuple[float, ...] | None = None
    """Subtracted from pixels in 0..1, one value a channel; null takes the model's."""
    std: tuple[float, ...] | None = None
    """Pixels are divided by it, one value a channel; null takes the model's."""
    crop_pct: float | None = None
    """Evaluation: part of the resized image that the centre crop keeps, 0..1; null takes the model's."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    """For resizing; null takes the model's."""

    def __post_init__(self):
        check_loading(self.batch_size, self.num_workers)
        if self.cache_gib is not None and not self.cache_gib > 0:
            raise ValueError(f"data.cache_gib must be positive, or null for no limit, got {self.cache_gib}")
        if self.img_size is not None and self.img_size < 1:
            raise ValueError(f"data.img_size must be at least 1 pixel, got {self.img_size}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"data.crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"data.std must be positive, got {self.std}")


@dataclass
class DataConfig(EvalDataConfig):
    """Images: root/<split>/<class>/<image>, or tar or Parquet shards root/<split>-*."""

    train_split: str = "train"
    """Split to train on."""
    # The hub's shards hold up to 500 MB: eight of them are 4 GB, or 35 batches of 1024 images of ImageNet.
    window: int = 8
    """Parquet shards, taken at random, whose images are mixed; shards that are sorted by class want many."""
    progressive: list[tuple[int, int]] = field(default_factory=list)
    """Smaller images at first: pairs of pixels and epochs, in turn: [[128, 100], [160, 100]]; then their full size."""

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"data.window must be at least 1 shard, got {self.window}")
        for pair in self.progressive:
            if min(pair) < 1:
                raise ValueError(f"data.progressive: want at least 1 pixel and 1 epoch in each pair, got {list(pair)}")

    @property
    def early_sizes(self) -> list[int]:
        """Edge of the images in each of the epochs that `progressive` speaks of, in pixels."""
        return [size for size, epochs in self.progressive for _ in range(epochs)]


@dataclass
class AugmentConfig:
    """Random changes of the training images and targets."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Random crop: range of its area, as a part of the image's. (1, 1) with ratio (1, 1) keeps a square image whole."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random crop: range of width / height."""
    hflip: float = 0.5
    """Probability of a left-right flip; 0 for digits and text."""
    vflip: float = 0.0
    """Probability of a top-bottom flip."""
    affine_degrees: float = 0.0
    """Random rotation by up to this many degrees either way."""
    affine_translate: float = 0.0
    """Random shift by up to this part of the image's edge, in x and in y."""
    affine_scale: float = 0.0
    """Random zoom by a factor of 1 - this .. 1 + this."""
    affine_shear: float = 0.0
    """Random shear along x by up to this many degrees either way."""
    color_jitter: float = 0.0
    """Random brightness, contrast and saturation by up to this factor; off where auto_augment is on."""
    auto_augment: str | None = None
    """timm's policy string, for example rand-m9-mstd0.5-inc1; null for none."""
    erasing: float = 0.0
    """Probability of erasing a random rectangle."""
    erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    """Erase with zeros, one random colour, or random pixels."""
    repeats: int = 1
    """Repeated augmentation: an epoch takes 1 / repeats of the images, each this many times with other augmentation."""
    mixup: float = 0.0
    """Mixup: alpha of its beta distribution; 0 for none."""
    cutmix: float = 0.0
    """CutMix: alpha of its beta distribution; 0 for none."""
    mix_prob: float = 1.0
    """Probability that a batch is mixed."""
    mix_switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    smoothing: float = 0.0
    """Label smoothing: part of the target spread over all classes."""

    def __post_init__(self):
        for name in ("hflip", "vflip", "erasing", "mix_prob", "mix_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is a probability, from 0 to 1, got {getattr(self, name)}")
        for name in ("affine_translate", "affine_scale", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"augment.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("affine_degrees", "affine_shear", "color_jitter", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"augment.{name} must be (low, high) with 0 < low <= high, got {(low, high)}")
        if self.auto_augment is not None and not AUTO_AUGMENT.fullmatch(self.auto_augment):
            raise ValueError(
                "augment.auto_augment is rand, with any of -m9 -n2 -p0.5 -mstd0.5 -mmax10 -inc1 -tweights, or augmix, "
                "with -m3 -w3 -d2 -b1 -a1 -mstd0.5, or original, originalr, v0, v0r or 3a, with -mstd0.5, or null; "
                f"got {self.auto_augment!r}"
            )
        for name, needs in (
            ("erasing_mode", ("erasing",)),
            ("mix_prob", ("mixup", "cutmix")),
            ("mix_switch_prob", ("mixup", "cutmix")),
        ):
            if getattr(self, name) != getattr(AugmentConfig, name) and not any(getattr(self, n) for n in needs):
                wanted = " or ".join(f"augment.{n}" for n in needs)
                raise ValueError(f"augment.{name} has no effect without {wanted}; set it, or leave augment.{name} out")
        if self.repeats < 1:
            raise ValueError(f"augment.repeats must be at least 1, got {self.repeats}")
