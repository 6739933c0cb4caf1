"""Plots of detections and learning curves as PNG files. matplotlib is optional; only these functions import it."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vim.figures import plain_text, save_figure

from .coco import decode_mask

MAX_NAMES = 40  # with more boxes in an image, their names would cover it


def plot_learning_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Plot loss and average precision by epoch; `history` holds the lines of log.jsonl."""
    from matplotlib.figure import Figure

    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(9, 4), layout="constrained")
    loss, precision = figure.subplots(1, 2)
    loss.plot(epochs, [record["train_loss"] for record in history])
    loss.set(xlabel="epoch", ylabel="training loss")
    for name in ("AP", "AP50", "mask_AP", "ema_AP", "ema_AP50", "ema_mask_AP"):
        if name in history[0]:
            precision.plot(epochs, [record[name] for record in history], label=name)
    precision.set(xlabel="epoch", ylabel="average precision", ylim=(0, 1))
    precision.legend()
    for axes in (loss, precision):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path, 120)


def plot_detections(
    images: list[Image.Image],
    truths: list[list[dict[str, Any]]],
    predictions: list[list[dict[str, Any]]],
    names: dict[int, str],
    path: Path,
) -> None:
    """Draw one row per image: ground truth on the left, predictions on the right.

    Args:
        truths, predictions: for each image, its annotations and results in COCO's format.
        names: of the categories, by id.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 2, squeeze=False)
    for (left, right), image, truth, found in zip(grid, images, truths, predictions, strict=True):
        _draw(left, image, truth, names, f"ground truth: {len(truth)}")
        _draw(right, image, found, names, f"predictions at the threshold of the best F1: {len(found)}")
    save_figure(figure, path, 80)


def _draw(axes, image: Image.Image, rows: list[dict[str, Any]], names: dict[int, str], title: str) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    palette = colormaps["tab10"]
    colours = {category: palette(place % 10) for place, category in enumerate(names)}
    axes.imshow(image)
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    for row in rows:
        x, y, width, height = row["bbox"]
        colour = colours[row["category_id"]]
        if row.get("segmentation"):
            mask = decode_mask(row["segmentation"], image.height, image.width).astype(bool)
            axes.imshow(np.where(mask[..., None], (*colour[:3], 0.4), 0.0))
        axes.add_patch(Rectangle((x, y), width, height, fill=False, color=colour, linewidth=1.5))
        if len(rows) <= MAX_NAMES:
            score = f" {row['score']:.2f}" if "score" in row else ""
            box = {"facecolor": "white", "alpha": 0.7, "pad": 0.5, "linewidth": 0}
            name = plain_text(names[row["category_id"]]) + score
            axes.text(x, y, name, fontsize=6, va="bottom", bbox=box, clip_on=True)
