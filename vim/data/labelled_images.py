"""What training and evaluation read from: images with labels and names, at random access, however they are stored."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from .errors import DataError


class Shards(NamedTuple):
    """Of images that come shard by shard from far away.

    lengths: images in each, in order. fetch: puts one, by its number, where its images are read from.
    """

    lengths: Sequence[int]
    fetch: Callable[[int], None]


class LabelledImages(Protocol):
    """The images of one split. A label is a position in the list of class names."""

    @property
    def path(self) -> str | Path:
        """Where they lie, for messages."""

    @property
    def classes(self) -> list[str]: ...

    @property
    def shards(self) -> Shards | None:
        """None if single images can be read where they lie."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Of an image, for messages and lists."""

    def load(self, index: int, in_chans: int = 3) -> tuple[Image.Image, int]:
        """Image with so many channels, 1 (grey) or 3, and its label.

        Raises: DataError with the name of an image that cannot be read.
        """


def check_same_classes(train: LabelledImages, val: LabelledImages) -> None:
    """Raise DataError unless both splits have the same classes: labels are positions in the list of names."""
    for name in sorted(set(train.classes) ^ set(val.classes)):
        here, there = (train, val) if name in train.classes else (val, train)
        raise DataError(f"class {name!r} is in {here.path} but not in {there.path}; splits need the same classes")
    if len(train.classes) != len(val.classes):  # of which some are the same name
        counts = f"{len(train.classes)} in {train.path} and {len(val.classes)} in {val.path}"
        raise DataError(f"splits need the same classes; there are {counts}, some of one name")
    for label, (name, other) in enumerate(zip(train.classes, val.classes, strict=True)):
        if name != other:
            raise DataError(
                f"label {label} is {name!r} in {train.path} and {other!r} in {val.path}; give both one order"
            )
