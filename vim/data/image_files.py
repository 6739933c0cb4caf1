"""Image files by their names; `decode` checks the contents."""

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .decode import image_formats
from .errors import DataError
from .names import natural_order, plain_name

NAMED = 5  # files named in a message

_log = logging.getLogger("vim.data")


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the supported formats in lower case, from Pillow's table: .jpg, .png, .webp, .tif and so on."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in image_formats())


def is_image(name: str) -> bool:
    """Whether a name has the suffix of an image, in any case, and is not hidden (begins with a dot)."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()


def find_images(folder: Path) -> tuple[list[str], list[str]]:
    """Images at any depth below a folder. Links are followed.

    Returns: paths of the images, and of all other files and hidden folders; relative to the folder, in natural order.
    Raises: DataError for a folder that cannot be read, and for a link to a folder that contains the link.
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
                        raise DataError(
                            f"folder {plain_name(entry.path)} is a link to a folder that contains it; remove it"
                        )
                    below.append(f"{path}/")
                # Not a pipe, for example. A broken link counts: reading it will report the error.
                elif is_image(entry.name) and (entry.is_file() or not os.path.exists(entry)):
                    images.append(path)
                else:
                    others.append(path)
        except OSError as error:
            where = plain_name(str(error.filename or folder / prefix))
            raise DataError(f"cannot read {where}: {error.strerror}") from error
    return sorted(images, key=natural_order), sorted(others, key=natural_order)


def report_left_out(where: str | Path, others: Sequence[str]) -> None:
    """Log once, in one line, the number and names of files that are not read as images."""
    if others and os.environ.get("RANK", "0") == "0":
        named = ", ".join(map(plain_name, others[:NAMED])) + ", ..." * (len(others) > NAMED)
        _say(f"{where}: files left out, hidden or not images: {len(others)} ({named})")


@functools.cache
def _say(line: str) -> None:
    _log.warning(line)


def no_images(where: str | Path, others: Sequence[str], want: str) -> DataError:
    """The error for a source without images.

    Args:
        want: the form that the source should have.
    """
    found = f"; found {', '.join(map(plain_name, others[:NAMED]))}" if others else ""
    return DataError(f"no images in {where}: want {want} as {' '.join(sorted(image_suffixes()))}{found}")
