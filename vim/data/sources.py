"""Images from wherever they lie: a folder tree, a list of paths, or tar shards; each with a name and maybe a label."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets

from .errors import DataError
from .tar_shards import ImageEntry, load_entry, tar_entries

LIST_SUFFIXES = (".txt", ".tsv")


class ImageSource:
    """Images in a fixed order.

    Args:
        where: a folder of images at any depth, in natural order of their paths; if all of them are
            <where>/<class>/<image>, classes are labels. Or a list (.txt, .tsv): a path a line, relative to the list's
            folder, and after a tab its label. Or tar shards: a .tar file or a folder of them, in order of their names;
            a member <name>.cls beside <name>.jpg holds its label, as WebDataset has it.

    Raises: DataError for a source that is missing, empty or of another kind.
    """

    def __init__(self, where: str | Path):
        where = Path(where)
        shards = sorted(where.glob("*.tar")) if where.is_dir() else [where] if where.suffix == ".tar" else []
        if not where.exists():
            raise DataError(f"no images at {where}: it does not exist; give a folder, a list (.txt, .tsv) or a .tar")
        self.entries: Sequence[ImageEntry]
        if shards:
            self.entries = [entry for shard in shards for entry in tar_entries(shard)]
        elif where.is_dir():
            self.entries = _tree_entries(where)
        elif where.suffix in LIST_SUFFIXES:
            self.entries = _list_entries(where)
        else:
            raise DataError(f"{where} is neither a folder, a list ({', '.join(LIST_SUFFIXES)}) nor a .tar file")
        if not self.entries:
            raise DataError(f"no images in {where}: want files as {' '.join(get_img_extensions())}")
        self.where = where

    def __len__(self) -> int:
        return len(self.entries)

    def spread(self, count: int) -> list[int]:
        """Positions of so many images, see `spread`."""
        return spread(len(self), count)

    def load(self, index: int, in_chans: int = 3) -> Image.Image:
        """Image with so many channels, 1 (grey) or 3.

        Raises: DataError with the path of an image that cannot be read.
        """
        return load_entry(self.entries[index], in_chans)


def spread(length: int, count: int) -> list[int]:
    """So many positions, evenly spread from the first of `length` to the last; some twice if there are fewer."""
    return np.linspace(0, length - 1, count).round().astype(int).tolist()


def _tree_entries(folder: Path) -> list[ImageEntry]:
    found, _ = find_images_and_targets(str(folder))  # in natural order
    paths = [Path(path).relative_to(folder) for path, _ in found]
    in_classes = all(len(path.parts) == 2 for path in paths)
    classes = {name: i for i, name in enumerate(sorted({path.parts[0] for path in paths}))} if in_classes else {}
    return [ImageEntry(path.as_posix(), classes.get(path.parts[0]), str(folder / path)) for path in paths]


def _list_entries(file: Path) -> list[ImageEntry]:
    entries = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        path, tab, label = line.partition("\t")
        if tab and not label.strip().isdecimal():
            raise DataError(f"{file}, line {number}: a label is a number from 0 up, got {label!r}")
        entries.append(ImageEntry(path, int(label) if tab else None, str(file.parent / path)))
    return entries
