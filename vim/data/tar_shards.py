"""Images in plain tar files: found by a scan of the headers, and read from where they lie in the file."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from timm.data import get_img_extensions
from timm.utils import natural_key

from .decode import decode_image
from .errors import DataError
from .labelled_images import numbered_classes

CLASS_NAMES = "classnames.txt"  # a name a line, as the hub's WebDataset sets have it beside their splits
LONGEST_LABEL = 20  # bytes


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """An image of a source.

    path: as it is reported: relative to a folder or list, or <shard>/<member> of a tar file.
    label: position of its class in the sorted names, or the number given for it; None if there is none.
    file, offset, size: bytes of the image; the whole file if size is None.
    """

    path: str
    label: int | None
    file: str
    offset: int = 0
    size: int | None = None


class TarImages:
    """The images of one split in local tar shards.

    The class of an image is the number in <key>.cls beside <key>.jpg, as in WebDataset, with a name from line so and so
    of classnames.txt, if that is there; or it is the folder that the image has in the tar file. (timm's reader of tar
    files knows the second way only, and its WebDataset reader has no random access, without which no run can go on in
    the midst of an epoch.)

    Args:
        shards: the files.
        names: a folder that may hold classnames.txt.
        path: of all of them, for messages.

    Raises: DataError for shards that are damaged or empty, and for images without a class.
    """

    shards = None  # the order of the images need not care: they lie on this machine

    def __init__(self, shards: Sequence[Path], names: Path, path: str):
        self.path = path
        self.entries = [entry for shard in shards for entry in tar_entries(shard)]
        if not self.entries:
            raise DataError(f"no images in {path}: want members as {' '.join(get_img_extensions())}")
        labels = {entry.label for entry in self.entries}
        self.classes, self.labels = self._by_folder() if labels == {None} else self._by_number(names / CLASS_NAMES)

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        """<shard>/<member>."""
        return self.entries[index].path

    def load(self, index: int, in_chans: int = 3) -> tuple[Image.Image, int]:
        return load_entry(self.entries[index], in_chans), int(self.labels[index])

    def _by_folder(self) -> tuple[list[str], np.ndarray]:
        folders = [PurePosixPath(entry.path).parts[1:-1] for entry in self.entries]
        if () in folders:
            bad = self.entries[folders.index(())].path
            raise DataError(f"image {bad} has no class: want a .cls file beside it, or <class>/<image> in the tar file")
        classes = sorted({parts[-1] for parts in folders}, key=natural_key)  # as in a folder tree
        positions = {name: label for label, name in enumerate(classes)}
        return classes, np.array([positions[parts[-1]] for parts in folders])

    def _by_number(self, names: Path) -> tuple[list[str], np.ndarray]:
        numbers = []
        for entry in self.entries:
            if entry.label is None:
                raise DataError(f"image {entry.path} has no .cls file beside it, others have; all or none may have one")
            numbers.append(entry.label)
        highest = max(numbers)
        if not names.is_file():
            return numbered_classes(highest, self.path), np.array(numbers)
        classes = names.read_text().splitlines()
        if highest >= len(classes):
            bad = self.entries[numbers.index(highest)].path
            raise DataError(f"image {bad} has the label {highest}, {names} has {len(classes)} names, from 0 up")
        return classes, np.array(numbers)


def tar_entries(shard: Path) -> list[ImageEntry]:
    """The images of a tar file, with the numbers in .cls files as labels.

    Raises: DataError for a file that is none, is compressed or ends early.
    """
    images, labels = [], {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                stem, dot, kind = member.name.rpartition(".")
                if member.isfile() and dot + kind.lower() in get_img_extensions():
                    images.append((stem, member))
                elif member.isfile() and kind == "cls":
                    text = tar.extractfile(member).read(LONGEST_LABEL).decode(errors="replace")  # type: ignore[union-attr]
                    if member.size > LONGEST_LABEL or not text.strip().isdecimal():
                        raise DataError(f"{shard}/{member.name}: a label is a number from 0 up, got {text!r}")
                    labels[stem] = int(text)
            _check_end(tar)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"cannot read {shard}: {error}; shards are plain tar files, not compressed ones") from error
    return [
        ImageEntry(f"{shard.name}/{member.name}", labels.get(stem), str(shard), member.offset_data, member.size)
        for stem, member in images
    ]


def _check_end(tar: tarfile.TarFile) -> None:
    """Tar files end with a block of zeros; without one, tarfile takes a damaged header for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it ends early or is damaged at byte {tar.offset}")


def load_entry(entry: ImageEntry, in_chans: int) -> Image.Image:
    """Image with so many channels, 1 (grey) or 3.

    Raises: DataError with the path of an image that cannot be read.
    """
    if entry.size is None:
        return decode_image(entry.file, in_chans, entry.path)
    try:
        with open(entry.file, "rb") as file:
            file.seek(entry.offset)
            content = file.read(entry.size)
    except OSError as error:
        raise DataError(f"cannot read image {entry.path}: {error}") from error
    return decode_image(io.BytesIO(content), in_chans, entry.path)
