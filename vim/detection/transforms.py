"""Random augmentation of training images, with their boxes and masks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_area
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Mask
from torchvision.tv_tensors import Image as TVImage

Target = dict[str, Any]
Transform = Callable[[Image.Image, Target], tuple[Tensor, Target]]
SMALLEST_EDGE = 1.0  # pixels; boxes that a crop makes thinner are dropped
MOST_HIDDEN = 0.5  # share of a box's area; boxes that erasing hides further are dropped


@dataclass
class JitterConfig:
    """Random augmentation of the training images, with their boxes and masks."""

    scale: tuple[float, float] = (0.1, 2.0)
    """Large-scale jitter: range of the random zoom. 1 fits the image to the square; larger images are cropped."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of a top-bottom flip; useful for aerial images."""
    color_jitter: float = 0.0
    """Maximum relative change of brightness, contrast and saturation; 0 for none."""
    erasing: float = 0.0
    """Probability of erasing a rectangle with one random colour; drops boxes that are more than half hidden."""

    def __post_init__(self):
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"augment.scale must be (low, high) with 0 < low <= high, got {(low, high)}")
        for name in ("hflip", "vflip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is a probability, from 0 to 1, got {getattr(self, name)}")
        if self.color_jitter < 0:
            raise ValueError(f"augment.color_jitter must be 0 or more, got {self.color_jitter}")


def train_transform(augment: JitterConfig, size: int) -> Transform:
    """Large-scale jitter, a random crop to at most size x size pixels, flips, colour jitter and erasing.

    Draws from the global random generators. A box that the crop leaves less than one pixel wide or high is dropped,
    with its label and mask. Padding waits for the batch.

    Source: Ghiasi et al. 2021, arXiv 2012.07177, "large scale jittering".
    """
    jitter = augment.color_jitter
    steps = [
        v2.ScaleJitter((size, size), augment.scale),
        _CropToFit(size),
        v2.RandomHorizontalFlip(augment.hflip),
        v2.RandomVerticalFlip(augment.vflip),
        *([v2.ColorJitter(jitter, jitter, jitter)] if jitter else []),
        v2.ClampBoundingBoxes(),
        v2.ToDtype(torch.float32, scale=True),
        *([_RandomErasing(augment.erasing)] if augment.erasing else []),
        v2.SanitizeBoundingBoxes(min_size=SMALLEST_EDGE, labels_getter=_rows_per_box),
        v2.ToPureTensor(),
    ]
    compose = v2.Compose(steps)

    def transform(image: Image.Image, target: Target) -> tuple[Tensor, Target]:
        pixels = v2.functional.to_image(image)
        canvas = (image.height, image.width)
        boxes = BoundingBoxes(target["boxes"], format=BoundingBoxFormat.XYXY, canvas_size=canvas)
        masks = {"masks": Mask(target["masks"])} if "masks" in target else {}
        return compose(pixels, target | {"boxes": boxes} | masks)

    return transform


class _CropToFit(v2.Transform):
    """Crop images larger than the square, at a random place."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        new = min(height, self.size), min(width, self.size)
        top, left = (int(torch.randint(old - n + 1, ())) for old, n in zip((height, width), new, strict=True))
        return {"top": top, "left": left, "height": new[0], "width": new[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


class _RandomErasing(v2.RandomErasing):
    """Fill a random rectangle with one random colour; empty the boxes that it hides by more than half.

    torchvision's RandomErasing leaves boxes and masks unchanged. Takes images in 0..1. SanitizeBoundingBoxes must
    follow: it drops the emptied boxes.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return params if params["v"] is None else params | {"v": torch.rand(3, 1, 1)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if params["v"] is None:  # no place found for a rectangle
            return inpt
        top, left, bottom, right = params["i"], params["j"], params["i"] + params["h"], params["j"] + params["w"]
        changed = inpt.clone()
        if isinstance(inpt, BoundingBoxes):
            hidden = inpt.as_subclass(Tensor).clone()
            hidden[:, 0::2].clamp_(left, right)
            hidden[:, 1::2].clamp_(top, bottom)
            changed[box_area(hidden) > MOST_HIDDEN * box_area(inpt)] = 0
        else:
            changed[..., top:bottom, left:right] = params["v"] if isinstance(inpt, TVImage) else 0
        return changed


def _rows_per_box(inputs: tuple[Tensor, Target]) -> tuple[Tensor, ...]:
    """The parts of a target that have one row per box."""
    target = inputs[1]
    return tuple(target[name] for name in ("labels", "masks") if name in target)
