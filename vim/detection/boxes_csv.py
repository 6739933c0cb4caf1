"""Conversion of a CSV file of boxes, as many labelling tools write it, to COCO's format."""

import csv
import math
import os
from pathlib import Path
from typing import Any

from vim.console.output import make_output
from vim.data import DataError
from vim.data.decode import image_size
from vim.files import write_json

from .coco import annotation, leaves_folder

COLUMNS = ("image_path", "xmin", "ymin", "xmax", "ymax", "label")
CORNERS = COLUMNS[1:5]


def boxes_to_coco(csv_file: str | Path, images: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the boxes of a CSV file as a JSON file in COCO's format.

    Args:
        csv_file: one row per box. The header names image_path, xmin, ymin, xmax, ymax (pixels) and label (class name);
            other columns are ignored. A row whose corners are all empty or all 0 is an image without a box.
        images: folder of the images, to which image_path is relative. Image sizes are read from the files.
        output: the file to write. Class ids are 1, 2 ... in alphabetical order of the names.

    Returns: the content of the file.
    Raises: DataError, with the line, for a file or a row that cannot be used.
    """
    csv_file, images, output = Path(csv_file), Path(images), Path(output)
    sizes: dict[str, tuple[int, int]] = {}
    found: dict[str, list[tuple[list[float], str]]] = {}
    rows = _rows(csv_file)
    make_output(output.parent)
    for line, row in rows:
        path = row["image_path"]
        try:
            if path not in sizes:
                sizes[path] = _size(images, path)
            boxes = found.setdefault(path, [])
            if corners := _corners(row):
                boxes.append((corners, row["label"]))
        except DataError as error:
            raise DataError(f"{csv_file}, line {line}: {error}") from error
    names = sorted({label for boxes in found.values() for _, label in boxes})
    if not names:
        raise DataError(f"{csv_file} has no box, only images without boxes; want at least one box")
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": place, "name": name} for place, name in enumerate(names, 1)],
    }
    for path, boxes in found.items():
        width, height = sizes[path]
        image_id = len(content["images"]) + 1
        content["images"].append({"id": image_id, "file_name": path, "width": width, "height": height})
        for (x1, y1, x2, y2), label in boxes:
            number, box = len(content["annotations"]) + 1, (x1, y1, x2 - x1, y2 - y1)
            content["annotations"].append(annotation(number, image_id, names.index(label) + 1, box))
    write_json(content, output)
    return content


def _rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """Rows with their line numbers."""
    if not file.is_file():
        raise DataError(f"no file {file}; give a CSV file of boxes")
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:  # spreadsheets write a byte order mark
            reader = csv.DictReader(stream)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise DataError(f"{file} has no column {missing[0]!r}; want a header with {', '.join(COLUMNS)}")
            if twice := [name for name in COLUMNS if (reader.fieldnames or ()).count(name) > 1]:
                raise DataError(f"{file} has the column {twice[0]!r} twice; want each once")
            rows = []
            for row in reader:
                if any(row.get(None) or ()):  # an unquoted comma in a name would cut it short
                    raise DataError(f"{file}, line {reader.line_num}: more values than the header has columns")
                rows.append((reader.line_num, {name: (row[name] or "").strip() for name in COLUMNS}))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {file}: {error}; want comma-separated text in UTF-8") from error
    if not rows:
        raise DataError(f"{file} has no rows")
    return rows


def _corners(row: dict[str, str]) -> list[float] | None:
    """x1, y1, x2, y2, or None for an image without a box."""
    texts = [row[name] for name in CORNERS]
    if not any(texts):
        return None
    try:
        corners = [float(text if text.isascii() and "_" not in text else "nan") for text in texts]
    except ValueError:
        corners = [math.nan]
    if corners == [0.0] * 4:
        return None
    if not all(map(math.isfinite, corners)) or not (corners[0] < corners[2] and corners[1] < corners[3]):
        raise DataError(f"want xmin < xmax and ymin < ymax in pixels, got {', '.join(texts)}")
    if not row["label"]:
        raise DataError("the box has no label; want the name of its class")
    return corners


def _size(images: Path, path: str) -> tuple[int, int]:
    """Width and height of an image."""
    if not path or leaves_folder(path):
        raise DataError(f"want an image_path inside {images}, got {path!r}")
    file = images / path
    if not os.path.isfile(file):  # opening a pipe would block
        raise DataError(f"cannot read image {file}: no such file")
    return image_size(file, file)
