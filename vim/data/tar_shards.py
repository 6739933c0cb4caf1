"""Images in plain tar files: a scan of the headers finds them, and each is read in place."""

import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .errors import DataError, reason
from .image_files import is_image, no_images, report_left_out
from .local_images import LocalImages, Span, classes_of_numbers
from .names import LONGEST_LABEL, class_positions, parse_label, plain_name


def read_tar(shards: Sequence[Path], path: str | Path, names: Path | None, others: Sequence[str] = ()) -> LocalImages:
    """Images of plain tar files, in order, with the numbers in .cls files as labels.

    <key>.cls holds the label of <key>.jpg, as in WebDataset. A key is the path up to the first dot of the file name.

    Args:
        path: place of all shards, for messages.
        names: file with the names of the classes, one per line.
        others: other files near the shards, to report as left out.

    Raises: DataError for shards that are damaged or empty, and for labels without an image.
    """
    found, inside = _read(shards)
    if not found.paths:
        raise no_images(path, [*inside, *others], "files")
    report_left_out(path, [*inside, *others])
    classes = classes_of_numbers(found.paths, found.labels, names, path)
    return LocalImages(path, found.paths, found.labels, classes, spans=found.spans)


def read_labelled_tar(shards: Sequence[Path], path: str | Path, names: Path) -> LocalImages:
    """As `read_tar`, with a label for every image. Without .cls files, the folder of an image in its tar file is its
    class.

    timm's tar reader knows class folders alone; its WebDataset reader has no random access, which resuming within an
    epoch needs.

    Raises: DataError as `read_tar`, and for images without a class.
    """
    found, others = _read(shards)
    if not found.paths:
        raise no_images(path, others, "<class>/<image> or <key>.jpg with <key>.cls")
    labels = found.labels
    if labels.count(None) == len(labels):
        classes, labels = _folder_labels(found.paths, path)
    elif None in labels:
        bad = plain_name(found.paths[labels.index(None)])
        raise DataError(f"image {bad} has no .cls file beside it, others have; all or none may have one")
    else:
        classes = classes_of_numbers(found.paths, labels, names, path)
    report_left_out(path, others)
    return LocalImages(path, found.paths, labels, classes, spans=found.spans)


def _folder_labels(paths: Sequence[str], where: str | Path) -> tuple[list[str], list[int | None]]:
    """Classes, and the label of each path."""
    folders = [PurePosixPath(plain_name(path)).parts[1:-1] for path in paths]
    if () in folders:
        bad = plain_name(paths[folders.index(())])
        raise DataError(f"image {bad} has no class: want a .cls file beside it, or <class>/<image> in the tar file")
    classes, positions = class_positions((parts[-1] for parts in folders), where)
    return classes, [positions[parts[-1]] for parts in folders]


class _Found(NamedTuple):
    """Images of tar files: paths <shard>/<member>, labels and spans."""

    paths: list[str]
    labels: list[int | None]
    spans: list[Span]


def _read(shards: Iterable[Path]) -> tuple[_Found, list[str]]:
    """Images of tar files, and the names of the other files in them.

    Raises: DataError for a file that is no tar file, is compressed or ends early, and for labels that belong to no
        image or to several.
    """
    found = _Found([], [], [])
    others: list[str] = []
    for shard in shards:
        members, file = _members(shard), str(shard)
        labels = _labels(shard, members)
        for member in members.images:
            found.paths.append(f"{shard.name}/{member.name}")
            found.labels.append(labels.get(_key(member.name)))
            found.spans.append((file, member.offset_data, member.size))
        others += [f"{shard.name}/{name}" for name in (*members.others, *members.hidden)]
    return found, others


class _Members(NamedTuple):
    """Contents of a shard: images, texts of labels by file name, names of other files, of hidden files and of links."""

    images: list[tarfile.TarInfo]
    labels: dict[str, str]
    others: list[str]
    hidden: list[str]


def _members(shard: Path) -> _Members:
    found = _Members([], {}, [], [])
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if member.isdir():
                    continue
                if not member.isfile() or any(part.startswith(".") for part in path.parts if part != ".."):
                    found.hidden.append(member.name)
                elif is_image(path.name):
                    found.images.append(member)
                elif path.suffix.lower() == ".cls":
                    content = tar.extractfile(member).read(LONGEST_LABEL + 1)  # type: ignore[union-attr]
                    found.labels[member.name] = content.decode(errors="replace")
                else:
                    found.others.append(member.name)
            _check_end(tar)
    except (
        tarfile.TarError,
        OSError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:  # the last three for wrong sizes
        what = f"cannot read {shard}: {reason(error)}"
        raise DataError(f"{what}; shards must be plain tar files, not compressed") from error
    return found


def _labels(shard: Path, members: _Members) -> dict[str, int]:
    """Labels in the .cls files of a shard, by key.

    Each label must belong to one image. No file may have the name of an image in another folder: such folders divide
    the files of a sample, so they are not classes.
    """
    of_key: dict[str, list[str]] = {}
    for image_name in dict.fromkeys(member.name for member in members.images):
        of_key.setdefault(_key(image_name), []).append(image_name)
    by_name = {key.rpartition("/")[2]: names[0] for key, names in of_key.items()}
    for name in (*members.labels, *members.others):
        image = by_name.get(_key(name).rpartition("/")[2])
        if _key(name) not in of_key and (image is not None or name in members.labels):
            found = f" of its path, only to {plain_name(image)}" if image is not None else ""
            raise DataError(
                f"{shard}/{plain_name(name)} belongs to no image{found}: want one with the same path up to the first "
                "dot of the name, as <key>.cls for <key>.jpg"
            )
    numbers: dict[str, int] = {}
    for name, text in members.labels.items():
        key, where = _key(name), f"{shard}/{plain_name(name)}"
        if key in numbers:
            raise DataError(f"{where} is a second label of {plain_name(of_key[key][0])}; want one")
        if len(of_key[key]) > 1:
            raise DataError(
                f"{where} belongs to {len(of_key[key])} images, {plain_name(' and '.join(of_key[key][:2]))}: a key "
                "ends at the first dot of a name; want one image per label"
            )
        numbers[key] = parse_label(text, where)
    return numbers


def _key(name: str) -> str:
    """What the files of one sample share: the path up to the first dot of the file name."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    return folder + slash + file.partition(".")[0]


def _check_end(tar: tarfile.TarFile) -> None:
    """A tar file ends with a block of zeros. Python's tarfile also takes a damaged header for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it ends early or is damaged at byte {tar.offset}")
