"""Image files as Pillow images of one or three channels, whatever kind they are."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from .errors import DataError

IMAGE_MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow says of broken files


def decode_image(file: str | Path | BinaryIO, in_chans: int, name: str | Path) -> Image.Image:
    """Read an image with so many channels, 1 (grey) or 3.

    CMYK becomes RGB, 16 bits become 8, transparency is dropped, and of an animation the first frame counts. As with
    timm and torchvision, an orientation noted in EXIF data is not applied: published results come without it.

    Args:
        name: of the file, for messages.

    Raises: DataError with the name of an image that cannot be read, or has more than 179 million pixels.
    """
    try:
        with Image.open(file) as image:
            return _convert(image, IMAGE_MODES[in_chans])
    except UNREADABLE as error:
        raise DataError(f"cannot read image {name}: {error}; repair or remove it") from error


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255: nearly all white
        grey = np.asarray(image).astype(np.float64) * (255 / 65535)
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert it to 8 or 16 bits")
    elif image.mode == "P":  # by way of RGBA, for Pillow warns of palettes with transparency
        image = image.convert("RGBA")
    return image.convert(mode)
