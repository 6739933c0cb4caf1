"""Small image folders that a tiny model can learn: each class has a bright corner."""

from pathlib import Path

import numpy as np
from PIL import Image

CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def write_image_tree(root: Path, counts: dict[str, int], classes: int = 2, size: int = 12, mode: str = "L") -> Path:
    """Write counts[split] images, in turn to the classes a, b, c, d. The pixels are deterministic."""
    rng = np.random.RandomState(0)
    for split, count in counts.items():
        for index in range(count):
            label = index % classes
            pixels = rng.randint(0, 100, (size, size, len(mode)))
            half = size // 2
            row, column = (c * half for c in CORNERS[label])
            pixels[row : row + half, column : column + half] += 120
            folder = root / split / "abcd"[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = pixels.astype(np.uint8).squeeze()
            Image.fromarray(pixels, mode).save(folder / f"{index}.png")
    return root
