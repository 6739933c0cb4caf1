"""Which files are images, by their names; what they hold is for `decode` to see."""

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .decode import image_formats
from .errors import DataError
from .names import natural_order, plain_name

NAMED = 5  # of the files that are left out

_log = logging.getLogger("vim.data")


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Of files in the formats that are read, in lower case: .jpg, .png, .webp, .tif and so on, as Pillow knows them."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in image_formats())


def is_image(name: str) -> bool:
    """By its suffix, in any case. Hidden files, which begin with a dot, are none."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()


def find_images(folder: Path) -> tuple[list[str], list[str]]:
    """Images at any depth below a folder, links followed.

    Returns: paths of the images, and of all other files and hidden folders; relative to the folder, in natural order.
    Raises: DataError for a folder that cannot be read, or is a link to one that it is in.
    """
    images: list[str] = []
    others: list[str] = []
    below = [""]
    while below:
        prefix = below.pop()
        try:
            for entry in os.scandir(folder / prefix):
                path = prefix + entry.name
                if entry.is_dir() and not entry.name.startswith("."):
                    if entry.is_symlink() and (folder / prefix).resolve().is_relative_to(os.path.realpath(entry)):
                        raise DataError(f"folder {plain_name(entry.path)} is a link to one that it is in; remove it")
                    below.append(f"{path}/")
                elif is_image(entry.name) and (
                    entry.is_file() or not os.path.exists(entry)
                ):  # a dangling link; no pipe
                    images.append(path)
                else:
                    others.append(path)
        except OSError as error:
            where = plain_name(str(error.filename or folder / prefix))
            raise DataError(f"cannot read {where}: {error.strerror}") from error
    return sorted(images, key=natural_order), sorted(others, key=natural_order)


def report_left_out(where: str | Path, others: Sequence[str]) -> None:
    """Count and name, in one line and once, files that a reader does not take for images."""
    if others and os.environ.get("RANK", "0") == "0":
        named = ", ".join(map(plain_name, others[:NAMED])) + ", ..." * (len(others) > NAMED)
        _say(f"{where}: files left out, hidden or no images: {len(others)} ({named})")


@functools.cache
def _say(line: str) -> None:
    _log.warning(line)


def no_images(where: str | Path, others: Sequence[str], want: str) -> DataError:
    """What is wrong with a source that has no images.

    want: the form that it should have.
    """
    found = f"; found {', '.join(map(plain_name, others[:NAMED]))}" if others else ""
    return DataError(f"no images in {where}: want {want} as {' '.join(sorted(image_suffixes()))}{found}")
