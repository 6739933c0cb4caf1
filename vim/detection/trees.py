"""A data set of trees in aerial photographs, from the deepforest package, in COCO's format.

Two photographs are for training; one, taken 13 km away, is for evaluation. All are cut into tiles because COCO's metric
counts at most 100 boxes per image.
"""

import importlib.util
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from PIL import Image

from vim.data import DataError
from vim.data.decode import decode_image
from vim.files import whole_folder, write_json

from .coco import annotation

TILE = 400  # pixels
LEAST_VISIBLE = 0.5  # a tile keeps the boxes of which it shows at least this share
PICTURES = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2", "OSBS_029"),
    "val": ("2019_YELL_2_541000_4977000_image_crop",),
}
STEPS = {"train": TILE // 2, "val": TILE}  # maximum distance between tiles, in pixels
CORNERS = ("xmin", "ymin", "xmax", "ymax")
Box = tuple[float, float, float, float]


def write_trees(root: str | Path, source: Path | None = None) -> bool:
    """Write tiles as PNG to root/train and root/val, and their annotations to root/train.json and root/val.json.

    An existing data set stays as it is. A new one appears only when it is complete.

    Args:
        source: folder of the photographs and their boxes; None takes the installed deepforest package.

    Returns: True if it wrote the data set.
    Raises: DataError if root exists and holds something else, or if the photographs cannot be found or read.
    """
    root = Path(root)
    if root.exists():
        for split in PICTURES:
            if not _has_split(root, split):
                want = f"want {split}.json and its tiles in {split}/"
                raise DataError(f"{root} exists and is not this data set: {want}; remove it or choose another folder")
        return False
    source = _package_data() if source is None else source
    with whole_folder(root) as unfinished:
        for split, names in PICTURES.items():
            _write_split(unfinished, split, [source / name for name in names])
    return True


def _has_split(root: Path, split: str) -> bool:
    """Does the folder hold exactly the tiles that the annotations name?"""
    try:
        names = {image["file_name"] for image in json.loads((root / f"{split}.json").read_bytes())["images"]}
        ours = bool(names) and all(name.startswith(PICTURES[split]) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no such file, or not in this format
        return False
    return ours and names == {path.name for path in (root / split).glob("*.png")}


def _package_data() -> Path:
    spec = importlib.util.find_spec("deepforest")  # finds it without importing its many dependencies
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the photographs come with the package deepforest: pip install --no-deps deepforest")
    return Path(spec.submodule_search_locations[0]) / "data"


def _write_split(root: Path, split: str, pictures: list[Path]) -> None:
    (root / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for picture in pictures:
        image, boxes = _read(picture)
        for left in tile_starts(image.width, STEPS[split]):
            for top in tile_starts(image.height, STEPS[split]):
                tile = (left, top, min(left + TILE, image.width), min(top + TILE, image.height))
                name = f"{picture.name}_{left}_{top}.png"
                image.crop(tile).save(root / split / name)
                size = {"width": tile[2] - left, "height": tile[3] - top}
                images.append({"id": len(images) + 1, "file_name": name, **size})
                for box in boxes_in_tile(boxes, tile):
                    annotations.append(annotation(len(annotations) + 1, images[-1]["id"], 1, box))
    categories = [{"id": 1, "name": "Tree"}]
    write_json({"images": images, "annotations": annotations, "categories": categories}, root / f"{split}.json")


def _read(picture: Path) -> tuple[Image.Image, list[Box]]:
    """A photograph and its boxes x1, y1, x2, y2, from the PNG and the XML (Pascal VOC) file of that name."""
    image_file, boxes_file = (picture.with_name(picture.name + suffix) for suffix in (".png", ".xml"))
    for file in (image_file, boxes_file):
        if not file.is_file():
            raise DataError(f"no {file}; want the data folder of deepforest 2.1")
    boxes = []
    try:
        for thing in ElementTree.parse(boxes_file).getroot().iter("object"):
            x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{name}", "nan")) for name in CORNERS)
            if not (x1 < x2 and y1 < y2 and all(map(math.isfinite, (x1, y1, x2, y2)))):
                raise ValueError(f"a box from {x1:g}, {y1:g} to {x2:g}, {y2:g}")
            boxes.append((x1, y1, x2, y2))
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"cannot read the boxes of {boxes_file}: {error}; reinstall deepforest") from error
    try:
        return decode_image(image_file, 3, image_file), boxes
    except DataError as error:
        raise DataError(f"{error}; or reinstall deepforest") from error


def tile_starts(length: int, step: int) -> list[int]:
    """Starts of tiles along an edge: evenly spread, at most `step` pixels apart, the last one ending at the end."""
    rest = max(0, length - TILE)
    count = -(-rest // step)
    return [round(i * rest / count) for i in range(count + 1)] if count else [0]


def boxes_in_tile(boxes: list[Box], tile: tuple[int, int, int, int]) -> list[Box]:
    """The boxes of which a tile x1, y1, x2, y2 shows enough: their visible part as x, y, width, height in the tile."""
    found = []
    for x1, y1, x2, y2 in boxes:
        left, top, right, bottom = max(x1, tile[0]), max(y1, tile[1]), min(x2, tile[2]), min(y2, tile[3])
        inside = max(0.0, right - left) * max(0.0, bottom - top)
        if inside > 0 and inside >= LEAST_VISIBLE * (x2 - x1) * (y2 - y1):
            found.append((left - tile[0], top - tile[1], right - left, bottom - top))
    return found
