"""A picture of what a detector found, beside the truth."""

from pathlib import Path
from typing import Any

import numpy as np

from .coco import CocoData
from .plots import plot_detections

LEAST_SCORE = 0.5


def write_sheet(data: CocoData, predictions: list[dict[str, Any]], count: int, path: Path) -> None:
    """Draw so many images, evenly spread over the data, as a PNG file.

    Args:
        predictions: in COCO's result format, of all images.
    """
    places = sorted({round(p) for p in np.linspace(0, len(data) - 1, count)})
    drawn = {data.image_ids[place]: place for place in places}
    found: dict[int, list] = {image: [] for image in drawn}
    truth: dict[int, list] = {image: [] for image in drawn}
    for rows, of_image in ((predictions, found), (data.truth()["annotations"], truth)):
        for row in rows:
            if row["image_id"] in of_image:
                of_image[row["image_id"]].append(row)
    images = [data.load(place)[0] for place in drawn.values()]
    names = dict(zip(data.category_ids, data.classes, strict=True))
    plot_detections(images, list(truth.values()), list(found.values()), names, LEAST_SCORE, path)
