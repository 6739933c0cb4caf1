"""Images that are read in place: files of a folder or a list, and members of tar files."""

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .decode import decode_image
from .errors import DataError
from .names import numbered_classes, plain_name, read_lines

CLASS_NAMES = "classnames.txt"  # one name per line, as in the hub's WebDataset data sets


class Span(NamedTuple):
    """Bytes of a file."""

    file: str
    offset: int
    size: int


class ImageEntry(NamedTuple):
    """One image.

    path: of its file, relative to the folder or list; <shard>/<member> in a tar file.
    label: position of its class; None without one.
    span: its bytes in a tar file; None if it has its own file.
    """

    path: str
    label: int | None = None
    span: Span | None = None


class EntryImages:
    """An `ImageSource` of images that are read in place.

    Args:
        path: where they are, for messages.
        entries: the images, in order.
        classes: names in label order; empty without labels.
        folder: paths of files are relative to it.
        prefix: precedes the paths in names.
    """

    shards = None

    def __init__(
        self,
        path: str | Path,
        entries: Sequence[ImageEntry],
        classes: list[str],
        folder: str | Path = "",
        prefix: str = "",
    ):
        self.path, self.entries, self.classes, self.folder, self.prefix = path, entries, classes, folder, prefix

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return plain_name(self.prefix + self.entries[index].path)

    def label(self, index: int) -> int | None:
        return self.entries[index].label

    def load(self, index: int, in_chans: int = 3) -> Image.Image:
        entry, name = self.entries[index], self.name(index)
        if entry.span is None:
            return decode_image(self.file(index), in_chans, name)
        try:
            with open(entry.span.file, "rb") as file:
                file.seek(entry.span.offset)
                content = file.read(entry.span.size)
        except OSError as error:
            raise DataError(f"cannot read image {name}: {error}") from error
        return decode_image(io.BytesIO(content), in_chans, name)

    def file(self, index: int) -> str:
        """Path of an image with its own file."""
        return os.path.join(self.folder, self.entries[index].path)


def classes_of_numbers(entries: Iterable[ImageEntry], names: Path | None, where: str | Path) -> list[str]:
    """Classes of images with numbers as labels: the lines of the file `names`, or the numbers without such a file.

    Raises: DataError for a label above the last line, or above any plausible number of classes.
    """
    labelled = [(entry.label, entry.path) for entry in entries if entry.label is not None]
    if not labelled:
        return []
    highest, path = max(labelled)
    if names is None or not names.is_file():
        return numbered_classes(highest, str(where))
    classes = [plain_name(line.removesuffix("\r")) for line in read_lines(names)]
    if highest >= len(classes):
        raise DataError(
            f"image {plain_name(path)} has the label {highest}, {names} has {len(classes)} names, from 0 up"
        )
    return classes
