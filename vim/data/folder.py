"""Image folder trees: root/<split>/<class>/<image>."""

from pathlib import Path

from PIL import Image
from timm.data import create_reader, get_img_extensions

from .decode import decode_image
from .errors import DataError


class ImageFolder:
    """The images of one split, and the names of their classes in label order.

    Args:
        root: folder of the data set.
        split: folder below it, with one folder of images for each class.

    Raises:
        DataError: for a folder that is missing, holds no images, or does not have this form.
    """

    shards = None

    def __init__(self, root: str | Path, split: str):
        self.path = _split_folder(Path(root), split)
        folders = {p.name for p in self.path.iterdir() if p.is_dir() and not p.name.startswith(".")}
        try:
            reader = create_reader("", root=str(self.path))
        except RuntimeError as error:
            kinds = " ".join(get_img_extensions())
            raise DataError(f"no images in {self.path}: want {self.path}/<class>/<image>, as {kinds}") from error
        self.samples: list[tuple[str, int]] = reader.samples
        self.classes: list[str] = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
        if empty := sorted(folders - set(self.classes)):
            raise DataError(f"no image in class folder {self.path / empty[0]}{_and_others(empty)}; fill or remove it")
        if misplaced := set(self.classes) - folders:
            label = reader.class_to_idx[min(misplaced)]
            path = next(path for path, target in self.samples if target == label)
            raise DataError(f"image {path} is not directly in a class folder: want {self.path}/<class>/<image>")

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Path of an image."""
        return self.samples[index][0]

    def load(self, index: int, in_chans: int = 3) -> tuple[Image.Image, int]:
        """Image with so many channels, 1 (grey) or 3, and its label.

        Raises: DataError with the path of an image that cannot be read. (timm's own data set would go on with the
            next image.)
        """
        path, label = self.samples[index]
        return decode_image(path, in_chans, path), label


def _split_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise DataError(f"no data set folder {root}; set data.root to a folder with {split}/<class>/<image> in it")
    if not (root / split).is_dir():
        found = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
        raise DataError(
            f"no split {split!r} in {root}: want the folder {root / split}, found {found}; "
            f"nor are there shards {split}-*.tar or {split}-*.parquet"
        )
    return root / split


def _and_others(names: list[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""
