"""Transforms of Pillow images for training and evaluation, built from timm's."""

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
    """Augments a Pillow image, and knows its mean and std for later; see `train_transform`."""

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
        augment: the augmentation.
        data_config: input_size, mean, std and interpolation, as timm's resolve_data_config returns them.
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
    """Resize and centre crop, as in the result of timm's resolve_data_config."""
    return create_transform(**data_config)


class _Crop(RandomResizedCropAndInterpolation):
    """timm's random crop, resized by torch for bilinear and bicubic interpolation, in a third of Pillow's time.

    About one value in 250 (torch 2.14) or in 13 (torch 2.11) differs from Pillow's, by 1 or 2 of 255 levels. With
    torch 2.14 both are equally close to exact arithmetic.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.interpolation not in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
            return super().__call__(image)
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        crop = np.array(image.crop((left, top, left + width, top + height)))
        # Channels last in all strides, also of the batch of one: otherwise torch reorders them, in twice the time.
        pixels = torch.from_numpy(crop).view(1, height, width, -1).permute(0, 3, 1, 2)
        mode: str = self.interpolation.value  # type: ignore[attr-defined]
        scaled = F.interpolate(pixels, self.size, mode=mode, antialias=True)
        return Image.fromarray(scaled.permute(0, 2, 3, 1).reshape(*self.size, *crop.shape[2:]).numpy())


def _affine(augment: AugmentConfig) -> list[RandomAffine]:
    """timm's factory has no affine map. Pixels from outside the image are black."""
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
    """Let Posterize keep 0 bits, which gives a black image.

    timm's policies ask for 0 bits at the top of the scale: with the usual rand-m9-mstd0.5-inc1, in about one image in a
    hundred. Pillow returned a black image before version 13, and raises an error since.
    """
    for policy in colour.transforms:
        ops = getattr(policy, "ops", None) or [op for pair in getattr(policy, "policy", ()) for op in pair]
        for op in ops:
            if op.aug_fn is posterize:
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    return posterize(image, bits_to_keep, **kwargs) if bits_to_keep > 0 else Image.new(image.mode, image.size)
