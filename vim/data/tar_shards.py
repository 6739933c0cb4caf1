"""Images in plain tar files: a scan of the headers finds them, and each is read in place."""

import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .entries import EntryImages, ImageEntry, Span, classes_of_numbers
from .errors import DataError, reason
from .image_files import is_image, no_images, report_left_out
from .names import LONGEST_LABEL, class_positions, parse_label, plain_name


def read_tar(shards: Sequence[Path], path: str | Path, names: Path | None, others: Sequence[str] = ()) -> EntryImages:
    """Images of plain tar files, in order, with the numbers in .cls files as labels.

    <key>.cls holds the label of <key>.jpg, as in WebDataset. A key is the path up to the first dot of the file name.

    Args:
        path: of all shards together, for messages.
        names: file with the names of the classes, one per line.
        others: files beside the shards to report as left out.

    Raises: DataError for shards that are damaged or empty, and for labels without an image.
    """
    entries, inside = _tar_entries(shards)
    if not entries:
        raise no_images(path, [*inside, *others], "files")
    report_left_out(path, [*inside, *others])
    return EntryImages(path, entries, classes_of_numbers(entries, names, path))


def read_labelled_tar(shards: Sequence[Path], path: str | Path, names: Path) -> EntryImages:
    """As `read_tar`, with a label for every image. Without .cls files, the folder of an image in its tar file is its
    class.

    timm's tar reader knows class folders alone; its WebDataset reader has no random access, which resuming within an
    epoch needs.

    Raises: DataError as `read_tar`, and for images without a class.
    """
    entries, others = _tar_entries(shards)
    if not entries:
        raise no_images(path, others, "<class>/<image> or <key>.jpg with <key>.cls")
    unlabelled = [entry for entry in entries if entry.label is None]
    if len(unlabelled) == len(entries):
        source = _by_folder(entries, path)
    elif unlabelled:
        bad = plain_name(unlabelled[0].path)
        raise DataError(f"image {bad} has no .cls file beside it, others have; all or none may have one")
    else:
        source = EntryImages(path, entries, classes_of_numbers(entries, names, path))
    report_left_out(path, others)
    return source


def _by_folder(entries: list[ImageEntry], path: str | Path) -> EntryImages:
    folders = [PurePosixPath(plain_name(entry.path)).parts[1:-1] for entry in entries]
    if () in folders:
        bad = plain_name(entries[folders.index(())].path)
        raise DataError(f"image {bad} has no class: want a .cls file beside it, or <class>/<image> in the tar file")
    classes, labels = class_positions((parts[-1] for parts in folders), path)
    pairs = zip(entries, folders, strict=True)
    return EntryImages(path, [entry._replace(label=labels[parts[-1]]) for entry, parts in pairs], classes)


def _tar_entries(shards: Iterable[Path]) -> tuple[list[ImageEntry], list[str]]:
    """Images of tar files, and the names of the other files in them.

    Raises: DataError for a file that is no tar file, is compressed or ends early, and for labels that belong to no
        image or to several.
    """
    entries: list[ImageEntry] = []
    others: list[str] = []
    for shard in shards:
        members = _members(shard)
        entries += _with_labels(shard, members)
        others += [f"{shard.name}/{name}" for name in (*members.beside, *members.left_out)]
    return entries, others


class _Members(NamedTuple):
    """Contents of a shard: images, label texts by file name, names of other files, and of hidden files and links."""

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
    """Images of a shard, with the labels of .cls files.

    Each label must belong to one image. No other file may lie in another folder than the image of its name: such
    folders divide the files of a sample, so they are no classes.
    """
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
    file = str(shard)
    return [
        ImageEntry(
            f"{shard.name}/{member.name}", numbers.get(_key(member.name)), Span(file, member.offset_data, member.size)
        )
        for member in members.images
    ]


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
