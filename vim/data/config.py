"""The `data` and `augment` sections of a training configuration."""

import re
from dataclasses import dataclass, field
from typing import Literal

from vim.console.free_on_resume import FREE_ON_RESUME

# timm's policies. timm ignores a section that it does not know, or fails without a clear message.
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
    """Images: root/<split>/<class>/<image>, tar or Parquet shards root/<split>-*, or a list root/<split>.txt."""

    root: str = field(default="data/imagenet", metadata=FREE_ON_RESUME)
    """Folder of the data set, or for Parquet a hub address: hf://datasets/<organisation>/<name>[@<revision>][/<folder>]."""
    val_split: str = "val"
    """Split to evaluate on."""
    batch_size: int = field(default=128, metadata=FREE_ON_RESUME)  # the total batch is checked with the checkpoint
    """Images per step and process."""
    num_workers: int = field(default=2, metadata=FREE_ON_RESUME)
    """Worker processes per training process; 0 loads in the training process. Results do not depend on it."""
    bad_images: BadImages = field(default="raise", metadata=FREE_ON_RESUME)
    """Unreadable files: raise stops at the first one; skip leaves them out, counts them and lists them."""
    cache_gib: float | None = field(default=None, metadata=FREE_ON_RESUME)
    """GiB of disk for fetched Parquet shards, in $HF_ASSETS_CACHE; the least recently used go first. null: no limit."""
    img_size: int | None = None
    """Image size in pixels, for models that take any size; null takes the model's."""
    mean: tuple[float, ...] | None = None
    """Subtracted from pixels in 0..1, one value per channel; null takes the model's."""
    std: tuple[float, ...] | None = None
    """Pixels are divided by it, one value per channel; null takes the model's."""
    crop_pct: float | None = None
    """Evaluation: fraction of the resized image that the centre crop keeps, 0..1; null takes the model's."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    """Interpolation of resizing; null takes the model's."""

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
    """Images: root/<split>/<class>/<image>, tar or Parquet shards root/<split>-*, or a list root/<split>.txt."""

    train_split: str = "train"
    """Split to train on."""
    # Shards on the hub have up to 500 MB. Eight of them are 4 GB, or 35 batches of 1024 ImageNet images.
    window: int = 8
    """Number of random Parquet shards to shuffle together. Raise it if shards are sorted by class."""
    progressive: list[tuple[int, int]] = field(default_factory=list)
    """Smaller images first: pairs of pixels and epochs, in order, as [[128, 100], [160, 100]]; then the full size."""

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"data.window must be at least 1 shard, got {self.window}")
        for pair in self.progressive:
            if min(pair) < 1:
                raise ValueError(f"data.progressive: want at least 1 pixel and 1 epoch in each pair, got {list(pair)}")

    @property
    def early_sizes(self) -> list[int]:
        """Image size in pixels in each epoch of `progressive`."""
        return [size for size, epochs in self.progressive for _ in range(epochs)]


@dataclass
class AugmentConfig:
    """Augmentation of the training images and targets."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Random crop: range of its area, as a fraction of the image. With (1, 1) and ratio (1, 1) a square stays whole."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random crop: range of the aspect ratio, width / height."""
    hflip: float = 0.5
    """Probability of a left-right flip; 0 for digits and text."""
    vflip: float = 0.0
    """Probability of a top-bottom flip."""
    affine_degrees: float = 0.0
    """Random rotation by up to this many degrees in either direction."""
    affine_translate: float = 0.0
    """Random shift in x and y by up to this fraction of the image size."""
    affine_scale: float = 0.0
    """Random zoom by a factor of 1 - this .. 1 + this."""
    affine_shear: float = 0.0
    """Random shear along x by up to this many degrees in either direction."""
    color_jitter: float = 0.0
    """Random brightness, contrast and saturation by up to this factor, after auto_augment; off with all its policies
    but 3a and rand-t3a."""
    auto_augment: str | None = None
    """timm's policy string, as rand-m9-mstd0.5-inc1; null for none. 3a: ThreeAugment of DeiT III, each image grey,
    solarised or blurred, to use with color_jitter 0.3."""
    erasing: float = 0.0
    """Probability of erasing a random rectangle."""
    erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    """Fill of the erased rectangle: zeros, one random colour, or random pixels."""
    repeats: int = 1
    """Repeated augmentation: an epoch uses 1 / repeats of the images, each this many times, augmented differently."""
    mixup: float = 0.0
    """Mixup: alpha of the beta distribution; 0 for none."""
    cutmix: float = 0.0
    """CutMix: alpha of the beta distribution; 0 for none."""
    mix_prob: float = 1.0
    """Probability of mixing a batch."""
    mix_switch_prob: float = 0.5
    """Probability of CutMix if both are on."""
    smoothing: float = 0.0
    """Label smoothing: fraction of the target spread over all classes."""

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
