"""Splits of an image folder tree into parts, for data that come without one to choose on or to test on."""

import os
import random
from pathlib import Path

from vim.files import link_or_copy, whole_folder

from .errors import DataError
from .folder import ImageFolder


def split_folder(root: str | Path, split: str, parts: dict[str, float], seed: int = 0) -> dict[str, int]:
    """Deal the images of root/<split> out to new splits root/<part>, the same share of each class to each part.

    The files are hard links where the file system has them, else copies; root/<split> stays as it is.

    Args:
        parts: name -> share of the images; together 1.
        seed: of the random choice, which depends on it, the class and the file names alone.

    Returns: images in each part.
    Raises: DataError for shares that do not add up, a part that exists, or one that a class has no image for.
    """
    root = Path(root).expanduser()
    if not all(share > 0 for share in parts.values()) or abs(sum(parts.values()) - 1) > 1e-6:
        raise DataError(f"shares must be above 0 and add up to 1, got {parts}")
    for part in parts:
        if (root / part).exists():
            raise DataError(f"{root / part} exists; remove it or choose another name")
    folder = ImageFolder(root, split)
    of_part: dict[str, list[Path]] = {part: [] for part in parts}
    for label, name in enumerate(folder.classes):
        paths = sorted(Path(path) for path, target in folder.samples if target == label)
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
