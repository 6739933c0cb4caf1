"""Images on a local disk that are read in place: files of a folder or a list, and members of tar files."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .decode import decode_image
from .errors import DataError
from .names import numbered_classes, plain_name, read_lines

CLASS_NAMES = "classnames.txt"  # one name per line, as in the hub's WebDataset data sets

Span = tuple[str, int, int]  # bytes of an image in a tar file: the file, offset and size


class LocalImages:
    """An `ImageSource` of images that are read in place.

    Args:
        path: place of all images, for messages.
        paths: path of each image: relative to `folder`, or <shard>/<member> in tar files.
        labels: label of each image, or None.
        classes: names in label order; empty without labels.
        folder: folder of the files.
        prefix: precedes the path in the name of an image.
        spans: span of each image in its tar file; None if images have their own files.
    """

    # Lists of plain values: a data set has millions of images, and spawned workers get a copy.
    shards = None

    def __init__(
        self,
        path: str | Path,
        paths: Sequence[str],
        labels: Sequence[int | None],
        classes: list[str],
        folder: str | Path = "",
        prefix: str = "",
        spans: Sequence[Span] | None = None,
    ):
        self.path, self.paths, self.labels, self.classes = path, paths, labels, classes
        self.folder, self.prefix, self.spans = folder, prefix, spans

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return plain_name(self.prefix + self.paths[index])

    def label(self, index: int) -> int | None:
        return self.labels[index]

    def load(self, index: int, in_chans: int = 3) -> Image.Image:
        name = self.name(index)
        if self.spans is None:
            return decode_image(self.file(index), in_chans, name)
        path, offset, size = self.spans[index]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise DataError(f"cannot read image {name}: {error}") from error
        return decode_image(io.BytesIO(content), in_chans, name)

    def file(self, index: int) -> str:
        """Path of an image with its own file."""
        return os.path.join(self.folder, self.paths[index])


def classes_of_numbers(
    paths: Sequence[str], labels: Sequence[int | None], names: Path | None, where: str | Path
) -> list[str]:
    """Classes of images with numbers as labels: the lines of the file `names`, or the numbers without such a file.

    Args:
        paths, labels: path and label of each image.
        names: file with one name per line; None for none.
        where: place of the images, for messages.

    Raises: DataError for a label above the last line, or above any plausible number of classes.
    """
    labelled = [(label, path) for label, path in zip(labels, paths, strict=True) if label is not None]
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
