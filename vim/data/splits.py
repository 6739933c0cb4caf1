"""Splits of an image folder tree into parts, for data sets without a validation or test split."""

import os
import random
from pathlib import Path

from vim.files import link_or_copy, whole_folder

from .errors import DataError
from .places import class_tree


def split_folder(root: str | Path, split: str, parts: dict[str, float], seed: int = 0) -> dict[str, int]:
    """Divide the images of the tree root/<split> among new splits root/<part>, each class in the same shares.

    The files are hard links if the file system has them, else copies; root/<split> stays as it is.

    Args:
        parts: name -> share of the images; together 1.
        seed: of the random choice, which depends on the seed, the class and the file names alone.

    Returns: images in each part.
    Raises: DataError for shares that do not add up, a part that exists, and a class with too few images for a share.
    """
    root = Path(root).expanduser()
    if not all(share > 0 for share in parts.values()) or abs(sum(parts.values()) - 1) > 1e-6:
        raise DataError(f"shares must be above 0 and add up to 1, got {parts}")
    for part in parts:
        if (root / part).exists():
            raise DataError(f"{root / part} exists; remove it or choose another name")
    tree = class_tree(root, split)
    of_part: dict[str, list[Path]] = {part: [] for part in parts}
    for label, name in enumerate(tree.classes):
        paths = sorted(Path(tree.file(index)) for index in range(len(tree)) if tree.label(index) == label)
        random.Random(os.fsencode(f"{seed} {paths[0].parent.name}")).shuffle(paths)  # a name may be no UTF-8
        first, passed = 0, 0.0
        for part, share in parts.items():
            passed += share
            end = round(passed * len(paths))
            if end == first:
                raise DataError(f"class {name!r} has {len(paths)} images, too few for a share of {share} in {part!r}")
            of_part[part] += paths[first:end]
            first = end
    for part, paths in of_part.items():
        with whole_folder(root / part) as unfinished:
            for path in paths:
                (unfinished / path.parent.name).mkdir(exist_ok=True)
                link_or_copy(path, unfinished / path.parent.name / path.name)
    return {part: len(paths) for part, paths in of_part.items()}
