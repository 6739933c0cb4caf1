"""A picture of a detector's predictions beside the ground truth."""

from pathlib import Path

from vim.data.sources import spread

from .coco import CocoData
from .evaluation import Evaluation
from .plots import plot_detections

DEFAULT_THRESHOLD = 0.5  # for classes without any correct detection


def write_sheet(data: CocoData, evaluation: Evaluation, count: int, path: Path) -> None:
    """Draw `count` images, evenly spread over the data, as a PNG file.

    Of each class it shows the boxes whose score reaches the threshold of the best F1.
    """
    thresholds = {
        category: scored["threshold"] if (scored := evaluation.per_class[name])["F1"] > 0 else DEFAULT_THRESHOLD
        for category, name in data.categories.items()
    }
    places = sorted(set(spread(len(data), count)))
    found: dict[int, list] = {data.image_ids[place]: [] for place in places}
    for row in evaluation.predictions:
        if row["image_id"] in found and row["score"] >= thresholds[row["category_id"]]:
            found[row["image_id"]].append(row)
    images, truth = [data.load(place)[0] for place in places], [data.objects(place) for place in places]
    plot_detections(images, truth, list(found.values()), data.categories, path)
