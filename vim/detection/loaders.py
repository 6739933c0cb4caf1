"""Datasets and dataloaders: augmented images with boxes and masks to train on, plain images to evaluate."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from vim.console.free_on_resume import FREE_ON_RESUME
from vim.data import SampleKey
from vim.data.config import BadImages, check_loading
from vim.data.loaders import load_or_replace, loader
from vim.data.randomness import derive_seed, preserved_generators, seed_cpu_generators

from .coco import CocoData
from .transforms import Target, Transform

Sample = tuple[Tensor, Target, list[str]]  # image, target, and the paths of files that could not be read
Batch = tuple[list[Tensor], list[Target], list[str]]


@dataclass
class DetectionEvalDataConfig:
    """Data in COCO's format."""

    root: str = field(default="data/coco", metadata=FREE_ON_RESUME)
    """Folder of the data set."""
    val_annotations: str = "annotations/instances_val2017.json"
    """Annotation file to evaluate on, relative to root."""
    val_images: str = "val2017"
    """Folder of the evaluation images, relative to root."""
    batch_size: int = field(default=8, metadata=FREE_ON_RESUME)  # the total batch is checked with the checkpoint
    """Images per process and step."""
    num_workers: int = field(default=4, metadata=FREE_ON_RESUME)
    """Dataloader workers per process; 0 loads in the process itself. Results do not depend on it."""

    def __post_init__(self):
        check_loading(self.batch_size, self.num_workers)


@dataclass
class DetectionDataConfig(DetectionEvalDataConfig):
    """Data in COCO's format."""

    train_annotations: str = "annotations/instances_train2017.json"
    """Annotation file to train on, relative to root."""
    train_images: str = "train2017"
    """Folder of the training images, relative to root."""
    passes: int = 1
    """Passes over the training set per epoch, each with new augmentation; raise it for small sets."""
    bad_images: BadImages = field(default="raise", metadata=FREE_ON_RESUME)
    """Unreadable training images: raise stops at the first; skip replaces each by another, counts and lists them."""

    def __post_init__(self):
        super().__post_init__()
        if self.passes < 1:
            raise ValueError(f"data.passes must be at least 1, got {self.passes}")


class TrainImages(Dataset[Sample]):
    """Augmented images (3, H, W), 0..1, with boxes, labels and, if the data has them, masks.

    A SampleKey gives the same sample in every process.

    Args:
        passes: how often an epoch uses each image.
        bad_images: "skip" replaces an unreadable image by another.
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
    """Unchanged images (3, H, W), 0..1, with their targets, in the order of the data."""

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
    """Batches (list of images, list of targets) in the order of the data; the last one may be smaller."""
    return loader(images, batch_size, num_workers, shuffle=False, collate_fn=_as_lists)


def collate(samples: list[Sample]) -> Batch:
    images, targets, bad = zip(*samples, strict=True)
    return list(images), list(targets), [path for paths in bad for path in paths]


def _as_lists(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
