"""Image files as Pillow images of one or three channels, whatever kind they are."""

import functools
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from .errors import DataError, reason

IMAGE_MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
# Pillow knows more, and among them EPS, which it hands to Ghostscript to run.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
# What Pillow's readers raise for broken files.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
STRIP = 1 << 20  # pixels
EIGHT_BITS = np.round(np.arange(1 << 16) / 257).astype(np.uint8)  # 257 = 65535 / 255

# Above 89 million pixels Pillow warns, of each file; the limit is 179 million, where it refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow has, as it calls them."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_image(file: str | Path | BinaryIO, in_chans: int, name: str | Path) -> Image.Image:
    """Read an image with so many channels, 1 (grey) or 3.

    What the file holds decides, whatever its name: only FORMATS are opened. CMYK becomes RGB, 16 bits become 8,
    transparency is dropped, and of an animation the first frame counts. As with timm and torchvision, an orientation
    noted in EXIF data is not applied: published results come without it.

    Args:
        name: of the file, for messages.

    Raises: DataError with the name of an image that cannot be read, or has more than 179 million pixels, twice what
        Pillow's MAX_IMAGE_PIXELS says.
    """
    with _opened(file, name) as image:
        return _convert(image, IMAGE_MODES[in_chans])


def image_size(file: str | Path | BinaryIO, name: str | Path) -> tuple[int, int]:
    """Width and height of what `decode_image` would give, from the file's header alone; its errors, as far as that
    shows them."""
    with _opened(file, name) as image:
        return image.size


@contextmanager
def _opened(file: str | Path | BinaryIO, name: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=image_formats()) as image:
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range; convert it to 8 or 16 bits")
            yield image
    except UNREADABLE as error:
        raise DataError(f"cannot read image {name}: {_reason(error)}; repair or remove it") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):  # whose own message has the address of a buffer
        return f"it holds none of the formats {', '.join(image_formats())}"
    return reason(error)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255: nearly all white
        return _from_16_bits(image, mode)
    if image.mode == "P" and "transparency" in image.info:  # by way of RGBA, for Pillow warns of it
        image = image.convert("RGBA")
    return image.convert(mode)


def _from_16_bits(image: Image.Image, mode: str) -> Image.Image:
    """In strips: the whole image in wider numbers would take many times its memory."""
    width, height = image.size
    converted, rows = Image.new(mode, image.size), max(1, STRIP // width)
    for top in range(0, height, rows):
        strip = np.asarray(image.crop((0, top, width, min(top + rows, height))))
        converted.paste(Image.fromarray(EIGHT_BITS[strip.clip(0, 65535)]), (0, top))
    return converted
