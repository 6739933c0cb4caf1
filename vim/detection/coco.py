"""Data sets in COCO's format: a JSON file of annotations, checked when it is read, and a folder of images."""

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

MAX_PIXELS = 2**31  # bound of image edges and of box coordinates
POLYGON_REACH = 16  # bound of polygon coordinates, in longer edges of the image; decoding takes memory for each pixel


class CocoData:
    """Images with boxes, labels and, on request, masks.

    - Boxes are x, y, width, height in pixels. They are clipped to the image. A box without area inside the image is
      dropped and counted.
    - An object whose area is missing, null or 0 gets the area of its box.
    - Crowds (iscrowd is 1 or true) are part of `truth`, so that the metrics excuse detections in them. Training does
      not see them.
    - Images without boxes stay, as examples of background. Classes without boxes stay, so that labels do not shift.
    - Segmentations are polygons or run-length codes. Polygons of fewer than three points are dropped.
    - EXIF orientation is not applied, as in COCO's own tools.

    Args:
        annotations: the JSON file.
        images: folder to which its file names are relative.
        masks: also read the segmentations.

    Attributes:
        classes: names in the order of their ids; label k + 1 is classes[k], label 0 the background.
        category_ids: ids of the classes, in the same order.
        image_ids: in the order of the file.
        boxes, dropped: number of boxes kept, and of boxes dropped.

    Raises: DataError for a file that is missing, damaged or inconsistent, and for missing images.
    """

    def __init__(self, annotations: str | Path, images: str | Path, *, masks: bool = False):
        self.annotations, self.folder, self.masks = Path(annotations), Path(images), masks
        if masks:
            _mask_coding()  # fails now rather than at the first image if the package is missing
        content = self._read_file()
        categories = self._rows(content, "categories", {"id": int, "name": str})
        self._unique("category", "id", categories)
        self._unique("category", "name", categories)  # results are listed by name
        categories = sorted(categories, key=lambda category: category["id"])
        self.classes = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self._labels = {category: place + 1 for place, category in enumerate(self.category_ids)}
        types = {"id": int, "file_name": str, "width": int, "height": int}
        self._images = self._rows(content, "images", types)
        self._unique("image", "id", self._images)
        if not self._images or not categories:
            found = f"{len(self._images)} images and {len(categories)} categories"
            raise DataError(f"{self.annotations} has {found}; want at least one of each")
        self.image_ids = [image["id"] for image in self._images]
        self._check_files()
        self.dropped = 0
        types = {"id": int, "image_id": int, "category_id": int, "bbox": list}
        objects = self._read_objects(self._rows(content, "annotations", types))
        self.boxes = sum(map(len, objects.values()))
        # One buffer of text rather than a million small objects: reference counting would make every worker copy the
        # memory pages of those objects.
        texts = [json.dumps(objects[image]).encode() for image in self.image_ids]
        self._text = np.frombuffer(b"".join(texts), np.uint8)
        self._ends = np.cumsum([0, *map(len, texts)])

    def __len__(self) -> int:
        return len(self._images)

    @property
    def categories(self) -> dict[int, str]:
        """Class names by category id, in label order."""
        return dict(zip(self.category_ids, self.classes, strict=True))

    def describe(self) -> str:
        dropped = f"; dropped {self.dropped:,} boxes without area" if self.dropped else ""
        return f"{len(self):,} images, {len(self.classes)} classes, {self.boxes:,} boxes{dropped}"

    def digest(self) -> str:
        """A hash of all annotations."""
        return hashlib.blake2b(self._text.tobytes(), digest_size=16).hexdigest()

    def name(self, index: int) -> str:
        """Path of an image, as `plain_name` writes it."""
        return plain_name(str(self.folder / self._images[index]["file_name"]))

    def load(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        """An RGB image and its target.

        Returns: the image; and image_id, boxes (n, 4) as x1, y1, x2, y2 in pixels, labels (n,) from 1 and, on request,
            masks (n, H, W) of 0 and 1.
        Raises: DataError for an unreadable image, one whose size differs from the annotations, and a damaged run-length
            code.
        """
        entry = self._images[index]
        path = self.folder / entry["file_name"]
        image = decode_image(path, 3, path)
        if image.size != (entry["width"], entry["height"]):
            want = f"{entry['width']} x {entry['height']}"
            raise DataError(f"image {path} has {image.width} x {image.height} pixels, {self.annotations} says {want}")
        rows = self.objects(index)
        objects = [row for row in rows if not row["iscrowd"]]
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [self._labels[o["category_id"]] for o in objects]
        target = {"image_id": entry["id"], "boxes": boxes.float(), "labels": torch.tensor(labels, dtype=torch.int64)}
        if self.masks:
            masks, place = np.zeros((len(objects), entry["height"], entry["width"]), np.uint8), 0
            for row in rows:
                mask = self._mask(row, entry)  # also checks those of crowds, which the metrics decode
                if not row["iscrowd"]:
                    masks[place] = mask
                    place += 1
            target["masks"] = torch.from_numpy(masks)
        return image, target

    def _mask(self, row: dict[str, Any], image: dict[str, Any]) -> np.ndarray:
        try:
            return decode_mask(row["segmentation"], image["height"], image["width"])
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise self._segmentation_error(row, image, f"a segmentation that cannot be decoded ({error})") from error

    def truth(self) -> dict[str, Any]:
        """The ground truth in COCO's format: with crowds, boxes clipped, annotations numbered from 1."""
        objects = (row for index in range(len(self)) for row in self.objects(index))
        return {
            "images": [{key: image[key] for key in ("id", "file_name", "width", "height")} for image in self._images],
            "categories": [{"id": i, "name": name} for i, name in self.categories.items()],
            # Many files number annotations from 0. The metrics use 0 for "no match", so they would count a correct
            # detection of object 0 as a false positive.
            "annotations": [row | {"id": number} for number, row in enumerate(objects, 1)],
        }

    def objects(self, index: int) -> list[dict[str, Any]]:
        """The annotations of an image with their original ids: with crowds, boxes clipped."""
        return json.loads(self._text[self._ends[index] : self._ends[index + 1]].tobytes())

    def _read_file(self) -> dict[str, Any]:
        if not self.annotations.is_file():
            raise DataError(f"no annotation file {self.annotations}; give a JSON file in COCO's format")
        try:
            content = json.loads(self.annotations.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {self.annotations}: {error.strerror}") from error
        except RecursionError as error:
            raise DataError(f"{self.annotations} is not in COCO's format: it is nested too deeply") from error
        except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
            raise DataError(f"{self.annotations} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{self.annotations} is not in COCO's format: want images, annotations and categories")
        return content

    def _rows(self, content: dict[str, Any], name: str, types: dict[str, type]) -> list[dict[str, Any]]:
        """One of the lists in the file, after a check of its required keys and their types."""
        rows = content.get(name)
        if not isinstance(rows, list):
            raise DataError(f"{self.annotations} is not in COCO's format: it has no list of {name}")
        for row in rows:
            for key, type_ in types.items():
                if not isinstance(row, dict) or key not in row:
                    raise DataError(f"{self.annotations}: an entry of {name} has no {key}: {str(row)[:80]}")
                if fault := _type_fault(key, row[key], type_):
                    entry = f"id {_short(row['id'])}" if "id" in row else str(row)[:80]
                    raise DataError(f"{self.annotations}: an entry of {name} has {fault}: {entry}")
        return rows

    def _unique(self, kind: str, key: str, rows: list[dict[str, Any]]) -> None:
        seen = set()
        for row in rows:
            if row[key] in seen:
                raise DataError(f"{self.annotations}: {kind} {key} {row[key]} occurs twice; want each once")
            seen.add(row[key])

    def _check_files(self) -> None:
        for image in self._images:
            if leaves_folder(image["file_name"]):
                name = _short(image["file_name"])
                raise DataError(f"{self.annotations}: file name {name} leaves the folder of images")
        # Path.is_file raises an error for a name that is too long.
        missing = [i["file_name"] for i in self._images if not os.path.isfile(self.folder / i["file_name"])]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self)} images of {self.annotations} are not in {self.folder}, "
                f"the first is {visible(missing[0])[:200]}"
            )

    def _read_objects(self, rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
        """The annotations by image id, reduced to the keys that are used."""
        self._unique("annotation", "id", rows)
        images = {image["id"]: image for image in self._images}
        objects: dict[int, list[dict[str, Any]]] = {image: [] for image in images}
        for row in rows:
            image = images.get(row["image_id"])
            if image is None:
                raise DataError(
                    f"{self.annotations}: annotation {row['id']} has image_id {row['image_id']}, "
                    f"which is not in the list of images"
                )
            if row["category_id"] not in self._labels:
                raise DataError(
                    f"{self.annotations}: annotation {row['id']} has category_id {row['category_id']}, "
                    f"which is not in the list of categories"
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
        """The part of a box inside its image; None if that is empty."""
        box = row["bbox"]
        if len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
            raise self._error(row, image, f"the box {_short(box)}; want x, y, width, height in pixels")
        x, y, width, height = box
        left, top = max(0.0, x), max(0.0, y)
        right, bottom = min(float(image["width"]), x + width), min(float(image["height"]), y + height)
        return [left, top, right - left, bottom - top] if right > left and bottom > top else None

    def _is_crowd(self, row: dict[str, Any], image: dict[str, Any]) -> int:
        value = row.get("iscrowd")
        if not isinstance(value, int | None) or value not in (None, 0, 1):  # bool("0") is true
            raise self._error(row, image, f"iscrowd {_short(value)}; want 0 or 1")
        return int(value or 0)

    def _area(self, row: dict[str, Any], image: dict[str, Any]) -> float:
        """In pixels; 0 if missing."""
        value = row.get("area")
        if value is None:
            return 0
        if not _is_number(value) or value < 0:
            raise self._error(row, image, f"area {_short(value)}; want pixels, or null for the area of the box")
        return value

    def _segmentation(self, row: dict[str, Any], image: dict[str, Any]) -> list[list[float]] | dict[str, Any]:
        """Polygons of at least three points, or a run-length code of the size of the image."""
        shape = row.get("segmentation")
        if isinstance(shape, list):
            # Decoders read a list of four numbers as a box, and ignore the last of an odd number of coordinates.
            polygons = [p for p in shape if not (isinstance(p, list) and len(p) < 6)]
            reach = POLYGON_REACH * max(image["width"], image["height"])
            if polygons and all(_is_polygon(p, reach) for p in polygons):
                return polygons
        elif isinstance(shape, dict) and _is_run_length(shape.get("counts")):
            if shape.get("size") == [image["height"], image["width"]]:
                return {"size": [image["height"], image["width"]], "counts": shape["counts"]}
            size = f"{_short(shape.get('size'))}, want [{image['height']}, {image['width']}]"
            raise self._segmentation_error(row, image, f"a segmentation of size {size}")
        raise self._segmentation_error(row, image, "no usable segmentation, want polygons or a run-length code")

    def _segmentation_error(self, row: dict[str, Any], image: dict[str, Any], found: str) -> DataError:
        return self._error(row, image, f"{found}; repair it or train a detector without masks")

    def _error(self, row: dict[str, Any], image: dict[str, Any], found: str) -> DataError:
        return DataError(f"{self.annotations}: annotation {row['id']} of {visible(image['file_name'])} has {found}")


def annotation(number: int, image_id: int, category_id: int, box: tuple[float, float, float, float]) -> dict[str, Any]:
    """An annotation in COCO's format, for the box x, y, width, height."""
    ids = {"id": number, "image_id": image_id, "category_id": category_id}
    return ids | {"bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}


def leaves_folder(file_name: str) -> bool:
    """Does a path point outside the folder that it is relative to?"""
    name = PurePosixPath(file_name)
    return name.is_absolute() or ".." in name.parts


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Decode COCO's polygons or run-length code to a mask (height, width), uint8."""
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


def _type_fault(key: str, value: Any, type_: type) -> str:
    """Why a value cannot be used: its type, or a number too large for files and metrics; "" if it can."""
    if not isinstance(value, type_) or isinstance(value, bool):
        return f"{_short(value)} for {key}, want {type_.__name__}"
    if not isinstance(value, int):
        return ""
    if key in ("width", "height"):
        return "" if 0 < value < MAX_PIXELS else f"{_short(value)} for {key}, want pixels"
    return "" if -(2**63) <= value < 2**63 else f"{_short(value)} for {key}, want a 64-bit integer"


def _short(value: Any) -> str:
    """An untrusted value for an error message of one line. (Python refuses to print integers of 4,300 digits.)"""
    if isinstance(value, int) and abs(value) >= 10**100:
        return "an integer of more than 100 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_number(value: Any) -> bool:
    """Is it a valid pixel coordinate? NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_PIXELS < value < MAX_PIXELS


def _is_run_length(counts: Any) -> bool:
    """Is it a run-length code: a compressed string or a list of lengths?"""
    return isinstance(counts, str) or (isinstance(counts, list) and all(isinstance(count, int) for count in counts))


def _is_polygon(points: Any, reach: float) -> bool:
    """Is it a list x, y, x, y ... with all coordinates within -reach..reach?"""
    if not isinstance(points, list) or len(points) % 2:
        return False
    try:  # built-in functions are fast: COCO has 50 million of these numbers
        return math.isfinite(sum(points)) and -reach <= min(points) and max(points) <= reach
    except (TypeError, OverflowError):
        return False
