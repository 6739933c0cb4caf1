"""Image folder trees: root/<split>/<class>/<image>."""

from pathlib import Path

from PIL import Image

from .decode import decode_image
from .errors import DataError
from .image_files import find_images, no_images, report_left_out
from .names import class_positions, plain_name


class ImageFolder:
    """The images of one split, and the names of their classes in label order; both in natural order.

    Args:
        root: folder of the data set.
        split: folder below it, with one folder of images for each class.

    Raises:
        DataError: for a folder that is missing, holds no images, or does not have this form.
    """

    shards = None

    def __init__(self, root: str | Path, split: str):
        self.path = _split_folder(Path(root).expanduser(), split)
        folders = {p.name for p in self.path.iterdir() if p.is_dir() and not p.name.startswith(".")}
        paths, others = find_images(self.path)
        if not paths:
            raise no_images(self.path, others, f"{self.path}/<class>/<image>")
        if empty := sorted(folders - {path.split("/")[0] for path in paths}):
            where = plain_name(str(self.path / empty[0]))
            raise DataError(f"no image in class folder {where}{_and_others(empty)}; fill or remove it")
        if misplaced := [path for path in paths if path.count("/") != 1]:
            where = plain_name(f"{self.path}/{misplaced[0]}")
            raise DataError(f"image {where} is not directly in a class folder: want {self.path}/<class>/<image>")
        self.classes, labels = class_positions(folders, self.path)
        self.samples: list[tuple[str, int]] = [(f"{self.path}/{path}", labels[path.split("/")[0]]) for path in paths]
        report_left_out(self.path, others)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Path of an image, as `plain_name` writes it."""
        return plain_name(self.samples[index][0])

    def load(self, index: int, in_chans: int = 3) -> tuple[Image.Image, int]:
        """Image with so many channels, 1 (grey) or 3, and its label.

        Raises: DataError with the path of an image that cannot be read. (timm's own data set would go on with the
            next image.)
        """
        path, label = self.samples[index]
        return decode_image(path, in_chans, plain_name(path)), label


def _split_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise DataError(f"no data set folder {root}; set data.root to a folder with {split}/<class>/<image> in it")
    if not (root / split).is_dir():
        found = ", ".join(sorted(plain_name(p.name) for p in root.iterdir() if p.is_dir())) or "no folders"
        raise DataError(
            f"no split {split!r} in {root}: want the folder {root / split}, found {found}; "
            f"nor are there shards {split}-*.tar or {split}-*.parquet"
        )
    return root / split


def _and_others(names: list[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""
