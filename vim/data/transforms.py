"""From a Pillow image to a normalised tensor, by timm's transforms."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

from .config import AugmentConfig

Transform = Callable[[Image.Image], Tensor]


def train_transform(augment: AugmentConfig, data_config: dict[str, Any]) -> Transform:
    """Random crop, flips, affine map, colours and erasing, in this order; draws from the global generators.

    Args:
        augment: what to do.
        data_config: input_size, mean, std and interpolation, as timm's resolve_data_config gives them.
    """
    shape, colour, tensor = create_transform(
        input_size=data_config["input_size"],
        mean=data_config["mean"],
        std=data_config["std"],
        interpolation=data_config["interpolation"],
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=augment.auto_augment,
        re_prob=augment.erasing,
        re_mode=augment.erasing_mode,
        separate=True,
    )
    _allow_no_bits(colour)
    return Compose([shape, *_affine(augment), colour, tensor])


def eval_transform(data_config: dict[str, Any]) -> Transform:
    """Resize and centre crop, as timm's resolve_data_config says."""
    return create_transform(**data_config)


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
