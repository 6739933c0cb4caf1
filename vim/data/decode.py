"""Image files of any supported format as Pillow images with one or three channels."""

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
# Pillow reads more formats. One of them is EPS, which it runs in Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
# Exceptions of Pillow's readers for broken files.
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

# Pillow warns for every file above 89 million pixels, and refuses files above 179 million.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@functools.cache
def image_formats() -> tuple[str, ...]:
    """The FORMATS that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_image(file: str | Path | BinaryIO, in_chans: int, name: str | Path) -> Image.Image:
    """Read an image with 1 (grey) or 3 channels.

    The contents of the file decide about its format, which must be one of FORMATS; its name does not matter. CMYK
    becomes RGB, 16 bits become 8, transparency is dropped, and an animation gives its first frame. The orientation in
    EXIF data is ignored, as in timm and torchvision and in published results.

    Args:
        name: name of the file, for messages.

    Raises: DataError with the name of an image that cannot be read, or has more than 179 million pixels (twice Pillow's
        MAX_IMAGE_PIXELS).
    """
    with _opened(file, name) as image:
        return _convert(image, IMAGE_MODES[in_chans])


def image_size(file: str | Path | BinaryIO, name: str | Path) -> tuple[int, int]:
    """Width and height of an image, from the header of its file alone.

    Raises: DataError as `decode_image`, if the header shows the damage.
    """
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
    if isinstance(error, Image.UnidentifiedImageError):  # its own message contains the address of a buffer
        return f"it has none of the formats {', '.join(image_formats())}"
    return reason(error)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255, which gives a nearly white image
        return _from_16_bits(image, mode)
    if image.mode == "P" and "transparency" in image.info:  # through RGBA: otherwise Pillow warns
        image = image.convert("RGBA")
    return image.convert(mode)


def _from_16_bits(image: Image.Image, mode: str) -> Image.Image:
    """Convert in strips: the intermediate arrays of a whole image would need a multiple of its memory."""
    width, height = image.size
    converted, rows = Image.new(mode, image.size), max(1, STRIP // width)
    for top in range(0, height, rows):
        strip = np.asarray(image.crop((0, top, width, min(top + rows, height))))
        converted.paste(Image.fromarray(EIGHT_BITS[strip.clip(0, 65535)]), (0, top))
    return converted
