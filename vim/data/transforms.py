"""From a Pillow image to what is made into a batch, by timm's transforms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

from .config import AugmentConfig
from .packed import Augmented, Erasing

Transform = Callable[[Image.Image], Tensor]


@dataclass
class TrainTransform:
    """Augments a Pillow image, and knows how it is to be normalised; see `train_transform`."""

    change: Callable[[Image.Image], Image.Image]
    erasing: Erasing
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Augmented:
        pixels = np.array(self.change(image))
        pixels = pixels.reshape(*pixels.shape[:2], -1)  # grey images have no third dimension
        return Augmented(torch.from_numpy(pixels), self.erasing(pixels.shape))


def train_transform(augment: AugmentConfig, data_config: dict[str, Any]) -> TrainTransform:
    """Random crop, flips, affine map, colours and erasing, in this order; draws from the global generators.

    Args:
        augment: what to do.
        data_config: input_size, mean, std and interpolation, as timm's resolve_data_config gives them.
    """
    size, interpolation = data_config["input_size"], data_config["interpolation"]
    shape, colour, _ = create_transform(
        input_size=size,
        mean=data_config["mean"],
        interpolation=interpolation,
        is_training=True,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=augment.auto_augment,
        separate=True,
    )
    _allow_no_bits(colour)
    crop = _Crop(size[1:], augment.scale, augment.ratio, interpolation)
    return TrainTransform(
        Compose([crop, *shape.transforms[1:], *_affine(augment), colour]),
        Erasing(augment.erasing, augment.erasing_mode),
        tuple(data_config["mean"]),
        tuple(data_config["std"]),
    )


def eval_transform(data_config: dict[str, Any]) -> Transform:
    """Resize and centre crop, as timm's resolve_data_config says."""
    return create_transform(**data_config)


class _Crop(RandomResizedCropAndInterpolation):
    """timm's random crop, scaled by torch where torch can, in a third of Pillow's time.

    One value of some 250 (torch 2.14) or 13 (2.11) is another than Pillow's, by 1 or 2 of 255 levels; with 2.14 both
    are as near to exact arithmetic.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.interpolation not in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
            return super().__call__(image)
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        crop = np.array(image.crop((left, top, left + width, top + height)))
        # Channels last in every stride, that of the batch of one too: otherwise torch reorders them, in twice the time.
        pixels = torch.from_numpy(crop).view(1, height, width, -1).permute(0, 3, 1, 2)
        mode: str = self.interpolation.value  # type: ignore[attr-defined]
        scaled = F.interpolate(pixels, self.size, mode=mode, antialias=True)
        return Image.fromarray(scaled.permute(0, 2, 3, 1).reshape(*self.size, *crop.shape[2:]).numpy())


def _affine(augment: AugmentConfig) -> list[RandomAffine]:
    """timm's factory has no affine map. What it moves in from outside the image is black."""
    if not (augment.affine_degrees or augment.affine_translate or augment.affine_scale or augment.affine_shear):
        return []
    return [
        RandomAffine(
            degrees=augment.affine_degrees,
            translate=(augment.affine_translate, augment.affine_translate),
            scale=(1 - augment.affine_scale, 1 + augment.affine_scale),
            shear=augment.affine_shear,
            interpolation=InterpolationMode.BILINEAR,
        )
    ]


def _allow_no_bits(colour: Compose) -> None:
    """timm's policies ask Posterize for 0 bits at the top of its scale. Pillow gave a black image, and since version 13
    gives an error, in one of some hundred images of the usual rand-m9-mstd0.5-inc1."""
    for policy in colour.transforms:
        ops = getattr(policy, "ops", None) or [op for pair in getattr(policy, "policy", ()) for op in pair]
        for op in ops:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    return posterize(image, bits_to_keep, **kwargs) if bits_to_keep > 0 else Image.new(image.mode, image.size)
