"""Images from wherever they lie: a folder tree, a list of paths, or tar shards; each with a name and maybe a label."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import DataError
from .image_files import find_images, no_images, report_left_out
from .names import class_positions, parse_label, plain_name, read_lines
from .tar_shards import CLASS_NAMES, ImageEntry, classes_of_numbers, load_entry, tar_entries

LIST_SUFFIXES = (".txt", ".tsv")


class ImageSource:
    """Images in a fixed order.

    Args:
        where: a folder of images at any depth, in natural order of their paths; if all of them are
            <where>/<class>/<image>, classes are labels. Or a list (.txt, .tsv): a path a line, relative to the list's
            folder, and after a tab its label. Or tar shards: a .tar file or a folder of them, in order of their names;
            a member <key>.cls beside <key>.jpg holds its label, as WebDataset has it, and classnames.txt beside the
            shards, or beside their folder, the names.

    classes: in label order, those of `where` alone; the numbers where classes have no names; empty without labels.

    Raises: DataError for a source that is missing, empty or of another kind.
    """

    def __init__(self, where: str | Path):
        self.where = where = Path(where).expanduser()
        if not where.exists():
            raise DataError(f"no images at {where}: it does not exist; give a folder, a list (.txt, .tsv) or a .tar")
        shards = [where] if where.suffix == ".tar" else []
        if where.is_dir():
            shards = sorted(path for path in where.glob("*.tar") if not path.name.startswith("."))
        self.entries: Sequence[ImageEntry]
        self.classes: list[str] = []
        others: list[str] = []
        if shards:
            self.entries, others = tar_entries(shards)
            if where.is_dir():
                read = {*shards, where / CLASS_NAMES}
                others += sorted(path.name for path in where.iterdir() if path not in read)
        elif where.is_dir():
            self.entries, self.classes, others = _tree_entries(where)
        elif where.suffix in LIST_SUFFIXES:
            self.entries = _list_entries(where)
        else:
            raise DataError(f"{where} is neither a folder, a list ({', '.join(LIST_SUFFIXES)}) nor a .tar file")
        if not self.entries:
            raise no_images(where, others, "files")
        if not self.classes and any(entry.label is not None for entry in self.entries):
            names = _names_beside(shards) if shards else None
            self.classes = classes_of_numbers(self.entries, names, str(where))
        report_left_out(where, others)

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


def _names_beside(shards: Sequence[Path]) -> Path | None:
    """The file with names of classes in the shards' folder, or in that above it."""
    folder = shards[0].absolute().parent
    return next((path for path in (folder / CLASS_NAMES, folder.parent / CLASS_NAMES) if path.is_file()), None)


def _tree_entries(folder: Path) -> tuple[list[ImageEntry], list[str], list[str]]:
    """Images, classes, and the paths of other files."""
    paths, others = find_images(folder)
    classes: list[str] = []
    labels: dict[str, int] = {}
    if all(path.count("/") == 1 for path in paths):
        classes, labels = class_positions((path.split("/")[0] for path in paths), folder)
    entries = [ImageEntry(plain_name(path), labels.get(path.split("/")[0]), f"{folder}/{path}") for path in paths]
    return entries, classes, others


def _list_entries(file: Path) -> list[ImageEntry]:
    entries = []
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        path, tab, label = line.removesuffix("\r").partition("\t")
        number_of_class = parse_label(label, f"{file}, line {number}") if tab else None
        entries.append(ImageEntry(plain_name(path), number_of_class, str(file.parent / path)))
    return entries
