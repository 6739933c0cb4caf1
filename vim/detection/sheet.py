"""A picture of what a detector found, beside the truth."""

from pathlib import Path
from typing import Any

from vim.data.sources import spread

from .coco import CocoData
from .plots import plot_detections

LEAST_SCORE = 0.5


def write_sheet(data: CocoData, predictions: list[dict[str, Any]], count: int, path: Path) -> None:
    """Draw so many images, evenly spread over the data, as a PNG file.

    Args:
        predictions: in COCO's result format, of all images.
    """
    places = sorted(set(spread(len(data), count)))
    found: dict[int, list] = {data.image_ids[place]: [] for place in places}
    for row in predictions:
        if row["image_id"] in found:
            found[row["image_id"]].append(row)
    images, truth = [data.load(place)[0] for place in places], [data.objects(place) for place in places]
    plot_detections(images, truth, list(found.values()), data.categories, LEAST_SCORE, path)
