"""A picture of what a detector found, beside the truth."""

from pathlib import Path

from vim.data.sources import spread

from .coco import CocoData
from .evaluation import Evaluation
from .plots import plot_detections

LEAST_SCORE = 0.5  # of classes that were never found


def write_sheet(data: CocoData, evaluation: Evaluation, count: int, path: Path) -> None:
    """Draw so many images, evenly spread over the data, as a PNG file: of each class the boxes at its best F1."""
    least = {
        category: scored["threshold"] if (scored := evaluation.per_class[name])["F1"] > 0 else LEAST_SCORE
        for category, name in data.categories.items()
    }
    places = sorted(set(spread(len(data), count)))
    found: dict[int, list] = {data.image_ids[place]: [] for place in places}
    for row in evaluation.predictions:
        if row["image_id"] in found and row["score"] >= least[row["category_id"]]:
            found[row["image_id"]].append(row)
    images, truth = [data.load(place)[0] for place in places], [data.objects(place) for place in places]
    plot_detections(images, truth, list(found.values()), data.categories, path)
