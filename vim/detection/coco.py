"""Data sets in COCO's format: a JSON file of annotations and a folder of images, read and checked once."""

import hashlib
import json
import math
import os
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from vim.console.escapes import visible
from vim.data import DataError
from vim.data.decode import decode_image
from vim.data.names import plain_name

LIMIT = 2**31  # of the edges and coordinates of images and boxes, in pixels
FARTHEST = 16  # times the longer edge of its image; a decoder takes memory for every pixel along a polygon


class CocoData:
    """Images with boxes, labels and maybe masks.

    Boxes are x, y, width, height in pixels. One that reaches beyond its image is clipped; one without area inside the
    image is left out and counted. An object without an area (none, 0) has its box's. Crowds (iscrowd 1 or true; 0,
    false, null or nothing for none) count in `truth`, where the metrics excuse detections in them, and are not given to
    training. Images without a box stay: they teach the background. Classes without a box stay, so that labels do. EXIF
    orientation is not applied, as COCO's own tools do not.

    Shapes are polygons, of which those with fewer than three points are left out, or run-length codes.

    Args:
        annotations: the JSON file. images: folder that its file names are relative to.
        masks: also read the objects' shapes.

    Attributes:
        classes: names in the order of their ids; label k + 1 is classes[k], 0 the background. category_ids: the ids.
        image_ids: in the file's order. boxes, dropped: numbers of boxes kept and left out.

    Raises: DataError for a file that is missing, damaged or contradicts itself, and for images that are not there.
    """

    def __init__(self, annotations: str | Path, images: str | Path, *, masks: bool = False):
        self.annotations, self.folder, self.masks = Path(annotations), Path(images), masks
        if masks:
            _mask_coding()  # if it is missing, better now than at the first image
        content = self._content()
        categories = self._rows(content, "categories", {"id": int, "name": str})
        self._unique("category", "id", categories)
        self._unique("category", "name", categories)  # results are by name
        categories = sorted(categories, key=lambda category: category["id"])
        self.classes = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self._labels = {category: place + 1 for place, category in enumerate(self.category_ids)}
        kinds = {"id": int, "file_name": str, "width": int, "height": int}
        self._images = self._rows(content, "images", kinds)
        self._unique("image", "id", self._images)
        if not self._images or not categories:
            found = f"{len(self._images)} images and {len(categories)} categories"
            raise DataError(f"{self.annotations} has {found}; want at least one of each")
        self.image_ids = [image["id"] for image in self._images]
        self._check_files()
        self.dropped = 0
        kinds = {"id": int, "image_id": int, "category_id": int, "bbox": list}
        objects = self._read_objects(self._rows(content, "annotations", kinds))
        self.boxes = sum(map(len, objects.values()))
        # One buffer of text, not a million small objects: loading processes would copy those, page by page, as they
        # count references to them.
        texts = [json.dumps(objects[image]).encode() for image in self.image_ids]
        self._text = np.frombuffer(b"".join(texts), np.uint8)
        self._ends = np.cumsum([0, *map(len, texts)])

    def __len__(self) -> int:
        return len(self._images)

    @property
    def categories(self) -> dict[int, str]:
        """Names of the classes by their ids, in label order."""
        return dict(zip(self.category_ids, self.classes, strict=True))

    def describe(self) -> str:
        left_out = f"; {self.dropped:,} boxes without area left out" if self.dropped else ""
        return f"{len(self):,} images, {len(self.classes)} classes, {self.boxes:,} boxes{left_out}"

    def digest(self) -> str:
        """A hash of all objects, which tells whether they are the same."""
        return hashlib.blake2b(self._text.tobytes(), digest_size=16).hexdigest()

    def name(self, index: int) -> str:
        """Path of an image, as `plain_name` writes it."""
        return plain_name(str(self.folder / self._images[index]["file_name"]))

    def load(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        """RGB image and its target: image_id, boxes (n, 4) as x1, y1, x2, y2 in pixels, labels (n,) from 1, and masks
        (n, H, W) of 0 and 1 if wanted.

        Raises: DataError for an image that cannot be read or has another size than the annotations say, and for a
            run-length code that is damaged.
        """
        entry = self._images[index]
        path = self.folder / entry["file_name"]
        image = decode_image(path, 3, path)
        if image.size != (entry["width"], entry["height"]):
            said = f"{entry['width']} x {entry['height']}"
            raise DataError(f"image {path} has {image.width} x {image.height} pixels, {self.annotations} says {said}")
        rows = self.objects(index)
        objects = [row for row in rows if not row["iscrowd"]]
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [self._labels[o["category_id"]] for o in objects]
        target = {"image_id": entry["id"], "boxes": boxes.float(), "labels": torch.tensor(labels, dtype=torch.int64)}
        if self.masks:
            masks, place = np.zeros((len(objects), entry["height"], entry["width"]), np.uint8), 0
            for row in rows:
                mask = self._mask(row, entry)  # of a crowd too: the metrics will decode it
                if not row["iscrowd"]:
                    masks[place] = mask
                    place += 1
            target["masks"] = torch.from_numpy(masks)
        return image, target

    def _mask(self, row: dict[str, Any], image: dict[str, Any]) -> np.ndarray:
        try:
            return decode_mask(row["segmentation"], image["height"], image["width"])
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise self._no_shape(row, image, f"a segmentation that cannot be decoded ({error})") from error

    def truth(self) -> dict[str, Any]:
        """What is to be found, in COCO's format, crowds included, boxes clipped; annotations numbered from 1."""
        objects = (row for index in range(len(self)) for row in self.objects(index))
        return {
            "images": [{key: image[key] for key in ("id", "file_name", "width", "height")} for image in self._images],
            "categories": [{"id": i, "name": name} for i, name in self.categories.items()],
            # The metrics note the id of the object that a detection found, and 0 for none: they would count a detection
            # of an object with the id 0, which many files begin with, as a false one.
            "annotations": [row | {"id": number} for number, row in enumerate(objects, 1)],
        }

    def objects(self, index: int) -> list[dict[str, Any]]:
        """Annotations of an image, crowds included, boxes clipped, under the file's ids."""
        return json.loads(self._text[self._ends[index] : self._ends[index + 1]].tobytes())

    def _content(self) -> dict[str, Any]:
        if not self.annotations.is_file():
            raise DataError(f"no annotations {self.annotations}; give a JSON file in COCO's format")
        try:
            content = json.loads(self.annotations.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {self.annotations}: {error.strerror}") from error
        except RecursionError as error:
            raise DataError(f"{self.annotations} is not in COCO's format: it is nested too deeply") from error
        except ValueError as error:  # no UTF-8, no JSON, or a number of thousands of digits
            raise DataError(f"{self.annotations} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{self.annotations} is not in COCO's format: want images, annotations and categories")
        return content

    def _rows(self, content: dict[str, Any], name: str, kinds: dict[str, type]) -> list[dict[str, Any]]:
        """A list of the file, after a look at the keys that it must have and the kinds of their values."""
        rows = content.get(name)
        if not isinstance(rows, list):
            raise DataError(f"{self.annotations} is not in COCO's format: it has no list of {name}")
        for row in rows:
            for key, kind in kinds.items():
                if not isinstance(row, dict) or key not in row:
                    raise DataError(f"{self.annotations}: one of {name} has no {key}: {str(row)[:80]}")
                if wrong := _wrong_kind(key, row[key], kind):
                    whose = f"id {_short(row['id'])}" if "id" in row else str(row)[:80]
                    raise DataError(f"{self.annotations}: one of {name} has {wrong}: {whose}")
        return rows

    def _unique(self, kind: str, key: str, rows: list[dict[str, Any]]) -> None:
        seen = set()
        for row in rows:
            if row[key] in seen:
                raise DataError(f"{self.annotations}: the {kind} {key} {row[key]} stands there twice")
            seen.add(row[key])

    def _check_files(self) -> None:
        for image in self._images:
            if leads_out(image["file_name"]):
                name = _short(image["file_name"])
                raise DataError(f"{self.annotations}: file name {name} leads out of the folder of images")
        # (Path.is_file would raise an error for a name that is too long.)
        missing = [i["file_name"] for i in self._images if not os.path.isfile(self.folder / i["file_name"])]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self)} images of {self.annotations} are not in {self.folder}, "
                f"the first is {visible(missing[0])[:200]}"
            )

    def _read_objects(self, rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
        """By image; only what is needed of each."""
        self._unique("annotation", "id", rows)
        images = {image["id"]: image for image in self._images}
        objects: dict[int, list[dict[str, Any]]] = {image: [] for image in images}
        for row in rows:
            image = images.get(row["image_id"])
            if image is None:
                raise DataError(
                    f"{self.annotations}: annotation {row['id']} is of image {row['image_id']}, "
                    f"which is not among the images"
                )
            if row["category_id"] not in self._labels:
                raise DataError(
                    f"{self.annotations}: annotation {row['id']} is of category {row['category_id']}, "
                    f"which is not among the categories"
                )
            crowd, area, box = self._is_crowd(row, image), self._area(row, image), self._clipped(row, image)
            if box is None:
                self.dropped += 1
                continue
            kept = {key: row[key] for key in ("id", "image_id", "category_id")} | {"bbox": box}
            kept |= {"iscrowd": crowd, "area": area or box[2] * box[3]}
            if self.masks:
                kept["segmentation"] = self._segmentation(row, image)
            objects[row["image_id"]].append(kept)
        return objects

    def _clipped(self, row: dict[str, Any], image: dict[str, Any]) -> list[float] | None:
        """The part of a box inside its image; None if there is none."""
        box = row["bbox"]
        if len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
            raise self._wrong(row, image, f"the box {_short(box)}; want x, y, width, height in pixels")
        x, y, width, height = box
        left, top = max(0.0, x), max(0.0, y)
        right, bottom = min(float(image["width"]), x + width), min(float(image["height"]), y + height)
        return [left, top, right - left, bottom - top] if right > left and bottom > top else None

    def _is_crowd(self, row: dict[str, Any], image: dict[str, Any]) -> int:
        value = row.get("iscrowd")
        if not isinstance(value, int | None) or value not in (None, 0, 1):  # "0" would be true
            raise self._wrong(row, image, f"iscrowd {_short(value)}; want 0 or 1")
        return int(value or 0)

    def _area(self, row: dict[str, Any], image: dict[str, Any]) -> float:
        """In pixels; 0 where none is given."""
        value = row.get("area")
        if value is None:
            return 0
        if not _is_number(value) or value < 0:
            raise self._wrong(row, image, f"area {_short(value)}; want pixels, or none for its box's")
        return value

    def _segmentation(self, row: dict[str, Any], image: dict[str, Any]) -> list[list[float]] | dict[str, Any]:
        """Polygons of at least three points, or a run-length code of the image's size."""
        shape = row.get("segmentation")
        if isinstance(shape, list):
            # Decoders take a list of four numbers for a box, and forget the last of an odd number.
            polygons = [p for p in shape if not (isinstance(p, list) and len(p) < 6)]
            farthest = FARTHEST * max(image["width"], image["height"])
            if polygons and all(_is_polygon(p, farthest) for p in polygons):
                return polygons
        elif isinstance(shape, dict) and _is_code(shape.get("counts")):
            if shape.get("size") == [image["height"], image["width"]]:
                return {"size": [image["height"], image["width"]], "counts": shape["counts"]}
            size = f"{image['height']}, {image['width']}"
            raise self._no_shape(row, image, f"a segmentation of size {_short(shape.get('size'))}, want [{size}]")
        raise self._no_shape(row, image, "no usable segmentation, as polygons or a run-length code")

    def _no_shape(self, row: dict[str, Any], image: dict[str, Any], found: str) -> DataError:
        return self._wrong(row, image, f"{found}; repair it or train a detector without masks")

    def _wrong(self, row: dict[str, Any], image: dict[str, Any], found: str) -> DataError:
        return DataError(f"{self.annotations}: annotation {row['id']} of {visible(image['file_name'])} has {found}")


def annotation(number: int, image_id: int, category_id: int, box: tuple[float, float, float, float]) -> dict[str, Any]:
    """An object with the box x, y, width, height in COCO's format."""
    kind = {"id": number, "image_id": image_id, "category_id": category_id}
    return kind | {"bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}


def leads_out(file_name: str) -> bool:
    """Does a path not stay in the folder that it is relative to?"""
    name = PurePosixPath(file_name)
    return name.is_absolute() or ".." in name.parts


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO's polygons or run-length code as (height, width), uint8."""
    coding = _mask_coding()
    if isinstance(segmentation, list):
        segmentation = coding.merge(coding.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = coding.frPyObjects(segmentation, height, width)
    return coding.decode(segmentation)


def _mask_coding() -> ModuleType:
    try:
        from faster_coco_eval.core import mask
    except ModuleNotFoundError as error:
        raise DataError(f"masks need faster-coco-eval: pip install 'vim-mamba[detection]' ({error})") from error
    return mask


def _wrong_kind(key: str, value: Any, kind: type) -> str:
    """What is wrong with a value, its kind or that no file or metric can hold it; "" if nothing is."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return f"{_short(value)} for {key}, want {kind.__name__}"
    if not isinstance(value, int):
        return ""
    if key in ("width", "height"):
        return "" if 0 < value < LIMIT else f"{_short(value)} for {key}, want pixels"
    return "" if -(2**63) <= value < 2**63 else f"{_short(value)} for {key}, want an integer of 64 bits"


def _short(value: Any) -> str:
    """A value as JSON from a stranger, in a message of one line. (Python refuses to write integers of 4,300 digits.)"""
    if isinstance(value, int) and abs(value) >= 10**100:
        return "an integer of more than 100 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_number(value: Any) -> bool:
    """Is it a number that a coordinate in pixels can be? (NaN is not.)"""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LIMIT < value < LIMIT


def _is_code(counts: Any) -> bool:
    """Is it what a run-length code has, a text or lengths?"""
    return isinstance(counts, str) or (isinstance(counts, list) and all(isinstance(count, int) for count in counts))


def _is_polygon(points: Any, farthest: float) -> bool:
    """Is it x, y, x, y ..., none of them farther out?"""
    if not isinstance(points, list) or len(points) % 2:
        return False
    try:  # three calls: COCO has 50 million of these numbers
        return math.isfinite(sum(points)) and -farthest <= min(points) and max(points) <= farthest
    except (TypeError, OverflowError):
        return False
