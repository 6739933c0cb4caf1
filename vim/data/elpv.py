"""ELPV: 2,624 real photographs of solar cells by their electroluminescence, as an image folder tree."""

import importlib.util
from pathlib import Path

from PIL import Image

from vim.files import whole_folder

from .errors import DataError

EDGE = 300  # pixels of the originals, which are square


def write_elpv(root: str | Path, size: int = EDGE, source: Path | None = None) -> None:
    """Write root/all/defective and root/all/functional, 8-bit grey PNG.

    Experts gave each cell a probability of a defect, 0, 1/3, 2/3 or 1; from 1/2 on it counts as defective.

    Args:
        size: edge of the images, in pixels.
        source: folder of labels.csv and the images; None for that of the installed elpv-dataset package.

    Raises: DataError if root exists, size is out of range, or the package is missing.
    Source: Deitsch et al. 2019, Solar Energy 185. The photographs are CC BY-NC-SA 4.0.
    """
    root = Path(root)
    if root.exists():
        raise DataError(f"{root} exists; remove it or choose another folder")
    if not 1 <= size <= EDGE:
        raise DataError(f"size must be 1 .. {EDGE} pixels, got {size}")
    if source is None:
        package = importlib.util.find_spec("elpv_dataset")
        if package is None or package.origin is None:
            raise DataError("the photographs come with the package elpv-dataset; pip install elpv-dataset")
        source = Path(package.origin).parent / "data"
    with whole_folder(root) as unfinished:
        for line in (source / "labels.csv").read_text().splitlines():
            name, probability, _ = line.split()
            folder = unfinished / "all" / ("defective" if float(probability) >= 0.5 else "functional")
            folder.mkdir(parents=True, exist_ok=True)
            with Image.open(source / name) as image:
                grey = image.convert("L")
            if size != EDGE:
                grey = grey.resize((size, size), Image.Resampling.LANCZOS)
            grey.save(folder / Path(name).name)
