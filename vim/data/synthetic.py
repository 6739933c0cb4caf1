"""Made-up photographs as JPEG files, with as many pixels as ImageNet's, for measurements of loading."""

from pathlib import Path

import numpy as np
from PIL import Image

from vim.files import whole_folder

from .errors import DataError

SIZES = ((500, 375), (500, 375), (375, 500), (500, 333), (640, 480), (400, 300))  # ImageNet's average is 469 x 387
QUALITY = 90


def write_jpegs(root: str | Path, classes: int, images: int, seed: int = 0) -> None:
    """Write root/train and root/val, each with so many images in all, dealt out to so many classes in turn.

    Smooth colours with edges and grain, of about 77 kB a file (ImageNet's average is 110 kB).

    Raises: DataError if root exists, or images are fewer than classes.
    """
    root = Path(root)
    if root.exists():
        raise DataError(f"{root} exists; remove it or choose another folder")
    if images < classes:
        raise DataError(f"{images} images are too few for {classes} classes")
    random = np.random.default_rng(seed)
    with whole_folder(root) as unfinished:
        for split in ("train", "val"):
            for index in range(images):
                folder = unfinished / split / f"class{index % classes:04}"
                folder.mkdir(parents=True, exist_ok=True)
                image = _photograph(random, SIZES[index % len(SIZES)])
                image.save(folder / f"{index}.jpg", quality=QUALITY)


def _photograph(random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    width, height = size
    scene = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((3, 90.0), (12, 50.0), (60, 30.0)):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        method = Image.Resampling.NEAREST if cells == 12 else Image.Resampling.BICUBIC  # the middle one has edges
        scene += strength / 128 * (np.asarray(coarse.resize(size, method), np.float32) - 128)
    grain = random.normal(0, 7, (height, width, 1)).astype(np.float32)
    return Image.fromarray((scene + grain + 128).clip(0, 255).astype(np.uint8))
