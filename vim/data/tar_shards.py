"""Images in plain tar files: found by a scan of the headers, and read from where they lie in the file."""

import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from .decode import decode_image
from .errors import DataError, reason
from .image_files import is_image, no_images, report_left_out
from .names import LONGEST_LABEL, class_positions, numbered_classes, parse_label, plain_name, read_lines

CLASS_NAMES = "classnames.txt"  # a name a line, as the hub's WebDataset sets have it beside their splits


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """An image of a source.

    path: as it is reported, see `plain_name`: relative to a folder or list, or <shard>/<member> of a tar file.
    label: position of its class among the classes, or the number given for it; None if there is none.
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
    of classnames.txt, if that is there; or it is the folder that the image has in the tar file. A key is the path up to
    the first dot of the file's name. (timm's reader of tar files knows the second way only, and its WebDataset reader
    has no random access, without which no run can go on in the midst of an epoch.)

    Args:
        shards: the files.
        names: a folder that may hold classnames.txt.
        path: of all of them, for messages.

    Raises: DataError for shards that are damaged or empty, for images without a class, and for labels without an image.
    """

    shards = None  # the order of the images need not care: they lie on this machine

    def __init__(self, shards: Sequence[Path], names: Path, path: str):
        self.path = path
        self.entries, others = tar_entries(shards)
        if not self.entries:
            raise no_images(path, others, "<class>/<image> or <key>.jpg with <key>.cls")
        labels = {entry.label for entry in self.entries}
        self.classes, self.labels = self._by_folder() if labels == {None} else self._by_number(names / CLASS_NAMES)
        report_left_out(path, others)

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
        classes, positions = class_positions((parts[-1] for parts in folders), self.path)
        return classes, np.array([positions[parts[-1]] for parts in folders])

    def _by_number(self, names: Path) -> tuple[list[str], np.ndarray]:
        numbers = []
        for entry in self.entries:
            if entry.label is None:
                raise DataError(f"image {entry.path} has no .cls file beside it, others have; all or none may have one")
            numbers.append(entry.label)
        return classes_of_numbers(self.entries, names, self.path), np.array(numbers)


def classes_of_numbers(entries: Iterable[ImageEntry], names: Path | None, where: str) -> list[str]:
    """Classes of numbered images: the lines of a file, or the numbers where there is none.

    Raises: DataError for a label above the last line, or one that is no number of a class.
    """
    highest, path = max((entry.label, entry.path) for entry in entries if entry.label is not None)
    if names is None or not names.is_file():
        return numbered_classes(highest, where)
    classes = [plain_name(line.removesuffix("\r")) for line in read_lines(names)]
    if highest >= len(classes):
        raise DataError(f"image {path} has the label {highest}, {names} has {len(classes)} names, from 0 up")
    return classes


def tar_entries(shards: Iterable[Path]) -> tuple[list[ImageEntry], list[str]]:
    """The images of tar files, with the numbers in .cls files as labels, and the names of what else they hold.

    Raises: DataError for a file that is none, is compressed or ends early, and for labels that belong to no image or to
        several.
    """
    entries: list[ImageEntry] = []
    others: list[str] = []
    for shard in shards:
        members = _members(shard)
        entries += _with_labels(shard, members)
        others += [f"{shard.name}/{name}" for name in (*members.beside, *members.left_out)]
    return entries, others


class _Members(NamedTuple):
    """What a shard holds: images, texts of labels by name, and names of other files and of what is hidden or a link."""

    images: list[tarfile.TarInfo]
    labels: dict[str, str]
    beside: list[str]
    left_out: list[str]


def _members(shard: Path) -> _Members:
    found = _Members([], {}, [], [])
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if member.isdir():
                    continue
                if not member.isfile() or any(part.startswith(".") for part in path.parts if part != ".."):
                    found.left_out.append(member.name)
                elif is_image(path.name):
                    found.images.append(member)
                elif path.suffix.lower() == ".cls":
                    content = tar.extractfile(member).read(LONGEST_LABEL + 1)  # type: ignore[union-attr]
                    found.labels[member.name] = content.decode(errors="replace")
                else:
                    found.beside.append(member.name)
            _check_end(tar)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:  # the last three of sizes
        what = f"cannot read {shard}: {reason(error)}"
        raise DataError(f"{what}; shards are plain tar files, not compressed ones") from error
    return found


def _with_labels(shard: Path, members: _Members) -> list[ImageEntry]:
    """The images of a shard. A label must belong to one, and no other file may stand apart from an image of its name:
    folders that divide images from what belongs to them are no classes."""
    of_key: dict[str, list[str]] = {}
    for image_name in dict.fromkeys(member.name for member in members.images):
        of_key.setdefault(_key(image_name), []).append(image_name)
    by_name = {key.rpartition("/")[2]: names[0] for key, names in of_key.items()}
    for name in (*members.labels, *members.beside):
        image = by_name.get(_key(name).rpartition("/")[2])
        if _key(name) not in of_key and (image is not None or name in members.labels):
            found = f", only for {plain_name(image)}" if image is not None else ""
            raise DataError(
                f"{shard}/{plain_name(name)} is for no image{found}: want one of the same path up to the first dot of "
                "the name, as <key>.cls for <key>.jpg"
            )
    numbers: dict[str, int] = {}
    for name, text in members.labels.items():
        key, where = _key(name), f"{shard}/{plain_name(name)}"
        if key in numbers:
            raise DataError(f"{where} is a second label of {plain_name(of_key[key][0])}; want one")
        if len(of_key[key]) > 1:
            raise DataError(
                f"{where} is for {len(of_key[key])} images, {plain_name(' and '.join(of_key[key][:2]))}: what follows "
                "the first dot of a name is no part of the key; want one image a label"
            )
        numbers[key] = parse_label(text, where)
    return [
        ImageEntry(
            plain_name(f"{shard.name}/{member.name}"),
            numbers.get(_key(member.name)),
            str(shard),
            member.offset_data,
            member.size,
        )
        for member in members.images
    ]


def _key(name: str) -> str:
    """What the files of one sample have in common: the path up to the first dot of the file's name."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    return folder + slash + file.partition(".")[0]


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
