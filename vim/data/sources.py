"""Where training, evaluation and the other tools get images from, however they are stored."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from .errors import DataError


class Shards(NamedTuple):
    """Shards that are fetched as a whole.

    lengths: images per shard, in order. fetch: copies a shard, given by its number, to this machine.
    """

    lengths: Sequence[int]
    fetch: Callable[[int], None]


class ImageSource(Protocol):
    """Images in a fixed order, at random access. A label is a position in `classes`."""

    @property
    def path(self) -> str | Path:
        """Where the images are, for messages."""

    @property
    def classes(self) -> list[str]:
        """Names in label order; empty without labels."""

    @property
    def shards(self) -> Shards | None:
        """None if each image can be read in place."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of an image for messages, lists and records, as `plain_name` writes it."""

    def label(self, index: int) -> int | None:
        """Label of an image, without decoding the image; None if it has none.

        Raises: DataError with the name of an image whose label is wrong.
        """

    def load(self, index: int, in_chans: int = 3) -> Image.Image:
        """Image with 1 (grey) or 3 channels.

        Raises: DataError with the name of an image that cannot be read.
        """


def load_labelled(source: ImageSource, index: int, in_chans: int) -> tuple[Image.Image, int]:
    """Image and label of a source that `open_split` has opened, where every image has a label."""
    # In this order: the label is at hand once the image has been read.
    image, label = source.load(index, in_chans), source.label(index)
    assert label is not None
    return image, label


def image_names(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def spread(length: int, count: int) -> list[int]:
    """`count` positions, evenly spread from the first of `length` to the last; some repeat if count is larger."""
    return np.linspace(0, length - 1, count).round().astype(int).tolist()


def check_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Raise DataError unless both splits have the same classes in the same order."""
    for name in sorted(set(train.classes) ^ set(val.classes)):
        here, there = (train, val) if name in train.classes else (val, train)
        raise DataError(f"class {name!r} is in {here.path} but not in {there.path}; splits need the same classes")
    if len(train.classes) != len(val.classes):  # several classes share a name
        counts = f"{len(train.classes)} in {train.path} and {len(val.classes)} in {val.path}"
        raise DataError(f"splits need the same classes; there are {counts}, some of one name")
    for label, (name, other) in enumerate(zip(train.classes, val.classes, strict=True)):
        if name != other:
            raise DataError(
                f"label {label} is {name!r} in {train.path} and {other!r} in {val.path}; give both one order"
            )
