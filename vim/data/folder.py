"""Image folder trees."""

from pathlib import Path

from .errors import DataError
from .image_files import find_images, no_images, report_left_out
from .local_images import LocalImages
from .names import class_positions, plain_name


def read_tree(folder: Path) -> LocalImages:
    """Images at any depth below a folder. If every path is <folder>/<class>/<image>, the classes are labels.

    Raises: DataError for a folder without images.
    """
    paths, others = find_images(folder)
    if not paths:
        raise no_images(folder, others, "files")
    report_left_out(folder, others)
    return _tree(folder, paths)


def read_class_tree(folder: Path) -> LocalImages:
    """Images of a tree <folder>/<class>/<image>. Their names begin with the folder.

    Raises: DataError for a folder without images, an empty class folder, and an image that is not directly in one.
    """
    folders = {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    paths, others = find_images(folder)
    if not paths:
        raise no_images(folder, others, f"{folder}/<class>/<image>")
    if empty := sorted(folders - {path.split("/")[0] for path in paths}):
        where = plain_name(str(folder / empty[0]))
        raise DataError(f"no image in class folder {where}{_and_others(empty)}; fill or remove it")
    if misplaced := [path for path in paths if path.count("/") != 1]:
        where = plain_name(f"{folder}/{misplaced[0]}")
        raise DataError(f"image {where} is not directly in a class folder: want {folder}/<class>/<image>")
    source = _tree(folder, paths, prefix=f"{folder}/")
    report_left_out(folder, others)
    return source


def _tree(folder: Path, paths: list[str], prefix: str = "") -> LocalImages:
    if not all(path.count("/") == 1 for path in paths):
        return LocalImages(folder, paths, [None] * len(paths), [], folder, prefix)
    folders = [path.split("/")[0] for path in paths]
    classes, positions = class_positions(folders, folder)
    return LocalImages(folder, paths, [positions[name] for name in folders], classes, folder, prefix)


def _and_others(names: list[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""
