"""Data sets of tensors, and the loaders that accelerate prepares."""

import functools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .config import BadImages
from .decode import IMAGE_MODES
from .errors import DataError, ShardError
from .labelled_images import LabelledImages
from .packed import Augmented, PackedImages
from .randomness import derive_seed, preserved_generators, seed_cpu_generators
from .sampler import KeyedSampler, SampleKey
from .transforms import TrainTransform, Transform

# Image, label, and the paths of files that could not be read.
TrainSample = tuple[Augmented, int, list[str]]
Sample = tuple[Tensor, int, list[str]]
# (B, C, H, W), (B,), and these paths of all samples.
TrainBatch = tuple[PackedImages, Tensor, list[str]]
Batch = tuple[Tensor, Tensor, list[str]]
Loaded = TypeVar("Loaded")

NO_LABEL = -1  # of an image to evaluate on that could not be read
MOST_REPLACEMENTS = 10  # in a row; then something else is wrong than single files


class TrainImages(Dataset[TrainSample]):
    """Augmented images: a SampleKey gives the same one in any process and order.

    With bad_images "skip", another image takes the place of one that cannot be read. `early` holds the transforms of
    the first epochs, one for each, where they are others.
    """

    def __init__(
        self,
        source: LabelledImages,
        transform: TrainTransform,
        seed: int,
        in_chans: int = 3,
        bad_images: BadImages = "raise",
        early: Sequence[TrainTransform] = (),
    ):
        self.source, self.transform, self.seed, self.in_chans = source, transform, seed, in_chans
        self.bad_images, self.early = bad_images, early

    def __len__(self) -> int:
        return len(self.source)

    def name(self, key: SampleKey) -> str:
        return self.source.name(key.image)

    def __getitem__(self, key: SampleKey) -> TrainSample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[SampleKey]) -> list[TrainSample]:
        # torch's loader asks for a batch at once: saving the generators costs as much as augmenting a small image.
        with preserved_generators():
            load = functools.lru_cache(1)(self._load)  # repeats of an image follow each other: decode it once
            return [self._augmented(key, load) for key in keys]

    def collate(self, samples: list[TrainSample]) -> TrainBatch:
        images, labels, bad = _transposed(samples)
        return PackedImages.pack(images, self.transform.mean, self.transform.std), labels, bad

    def _augmented(self, key: SampleKey, load: Callable[[int], tuple[Image.Image, int]]) -> TrainSample:
        (image, label), bad = load_or_replace(load, self.source.name, key, len(self), self.seed, self.bad_images)
        seed_cpu_generators(derive_seed("augment", self.seed, *key))
        transform = self.early[key.epoch] if key.epoch < len(self.early) else self.transform
        return transform(image), label, bad

    def _load(self, index: int) -> tuple[Image.Image, int]:
        return self.source.load(index, self.in_chans)


class EvalImages(Dataset[Sample]):
    """Images (in_chans, H, W) in the order of the source.

    With bad_images "skip", one that cannot be read is black and has NO_LABEL.
    """

    def __init__(
        self, source: LabelledImages, transform: Transform, in_chans: int = 3, bad_images: BadImages = "raise"
    ):
        self.source, self.transform, self.in_chans, self.bad_images = source, transform, in_chans, bad_images

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            image, label = self.source.load(index, self.in_chans)
        except ShardError:
            raise
        except DataError:
            if self.bad_images == "raise":
                raise
            black = Image.new(IMAGE_MODES[self.in_chans], (1, 1))
            return self.transform(black), NO_LABEL, [self.source.name(index)]
        return self.transform(image), label, []


def load_or_replace(
    load: Callable[[int], Loaded],
    name: Callable[[int], str],
    key: SampleKey,
    size: int,
    seed: int,
    bad_images: BadImages,
) -> tuple[Loaded, list[str]]:
    """The image of a key, or where it cannot be read and may be skipped, another one that the key decides on.

    Args:
        load: gives an image by its number, below `size`, or raises DataError.
        name: gives its path.

    Returns: what `load` gives, and the names of the files that could not be read.
    """
    bad: list[str] = []
    for attempt in range(MOST_REPLACEMENTS + 1):
        index = key.image if attempt == 0 else derive_seed("instead", seed, *key, attempt) % size
        try:
            return load(index), bad
        except ShardError:
            raise
        except DataError:
            if bad_images == "raise" or attempt == MOST_REPLACEMENTS:
                raise
            bad.append(name(index))
    raise AssertionError


def collate(samples: list[Sample]) -> Batch:
    images, labels, bad = _transposed(samples)
    return torch.stack(images), labels, bad


def _transposed(samples: list[tuple[Loaded, int, list[str]]]) -> tuple[tuple[Loaded, ...], Tensor, list[str]]:
    """Images, labels (B,), and the paths of files that could not be read."""
    images, labels, bad = zip(*samples, strict=True)
    return images, torch.tensor(labels), [path for paths in bad for path in paths]


def train_loader(images: TrainImages, sampler: KeyedSampler, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches in the sampler's order. `accelerator.prepare` deals them out to the processes, and moves them to the
    device, which makes tensors of PackedImages."""
    return loader(images, batch_size, num_workers, sampler=sampler, collate_fn=images.collate)


def eval_loader(images: EvalImages, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches in the source's order, the last one as small as it is."""
    return loader(images, batch_size, num_workers, shuffle=False, collate_fn=collate)


def loader(images: Dataset, batch_size: int, num_workers: int, **options) -> DataLoader:
    """torch's loader; `options` are its own, order among them."""
    return DataLoader(
        images,
        batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_parent,
        **options,
    )


def leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a group, and the parent still needs its loaders to end
    the step that it is in. A worker ends when its parent says so, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
