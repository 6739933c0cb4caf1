"""Images with boxes and masks for training, and images for evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.ops import box_area
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Mask
from torchvision.tv_tensors import Image as TVImage

from vim.data import SampleKey
from vim.data.config import BadImages
from vim.data.loaders import load_or_replace, loader
from vim.data.randomness import derive_seed, preserved_generators, seed_cpu_generators

from .coco import CocoData
from .config import JitterConfig

Target = dict[str, Any]
Sample = tuple[Tensor, Target, list[str]]  # image, target, and the paths of files that could not be read
Batch = tuple[list[Tensor], list[Target], list[str]]
Transform = Callable[[Image.Image, Target], tuple[Tensor, Target]]
SMALLEST_EDGE = 1.0  # pixels; of a box that a cut has left
MOST_HIDDEN = 0.5  # of a box's area, by erasing


class _CropToFit(v2.Transform):
    """Cut off at random places what is larger than a square; padding waits for the batch."""

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
    """A rectangle in one random colour over the image; boxes go of which it hides more than half.

    (torchvision's own leaves boxes and masks as they are.) For images of 0..1, in front of SanitizeBoundingBoxes.
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


def train_transform(augment: JitterConfig, size: int) -> Transform:
    """Large-scale jitter, a cut to fit into size x size pixels, flips, colours and erasing; from the global generators.

    A box of which a cut leaves less than a pixel goes, with its mask.

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
        v2.SanitizeBoundingBoxes(min_size=SMALLEST_EDGE, labels_getter=_follow_boxes),
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


def _follow_boxes(inputs: tuple[Tensor, Target]) -> tuple[Tensor, ...]:
    """What has a row for each box."""
    target = inputs[1]
    return tuple(target[name] for name in ("labels", "masks") if name in target)


class TrainImages(Dataset[Sample]):
    """Augmented images (3, H, W), 0..1, with boxes, labels and maybe masks: a SampleKey gives the same in any process.

    passes: times that an epoch has each image.
    bad_images: with "skip", another image takes the place of one that cannot be read.
    """

    def __init__(self, data: CocoData, transform: Transform, seed: int, passes: int, bad_images: BadImages = "raise"):
        self.data, self.transform, self.seed, self.passes = data, transform, seed, passes
        self.bad_images = bad_images

    def __len__(self) -> int:
        return len(self.data) * self.passes

    def name(self, key: SampleKey) -> str:
        return self.data.name(key.image % len(self.data))

    def __getitem__(self, key: SampleKey) -> Sample:
        count = len(self.data)
        once = key._replace(image=key.image % count)
        with preserved_generators():
            (image, target), bad = load_or_replace(
                self.data.load, self.data.name, once, count, self.seed, self.bad_images
            )
            seed_cpu_generators(derive_seed("augment", self.seed, *key))
            return *self.transform(image, target), bad


class EvalImages(Dataset[tuple[Tensor, Target]]):
    """Images (3, H, W), 0..1, as they are, with their image_id, in the order of the data."""

    def __init__(self, data: CocoData):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, target = self.data.load(index)
        return v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True), target


def train_loader(images: TrainImages, sampler: Sampler, batch_size: int, num_workers: int) -> DataLoader:
    """Batches in the sampler's order."""
    return loader(images, batch_size, num_workers, sampler=sampler, collate_fn=collate)


def eval_loader(images: EvalImages, batch_size: int, num_workers: int) -> DataLoader:
    """Batches (list of images, list of targets) in the data's order, the last one as small as it is."""
    return loader(images, batch_size, num_workers, shuffle=False, collate_fn=_as_lists)


def collate(samples: list[Sample]) -> Batch:
    images, targets, bad = zip(*samples, strict=True)
    return list(images), list(targets), [path for paths in bad for path in paths]


def _as_lists(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
