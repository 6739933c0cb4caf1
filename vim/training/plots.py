"""Plots of a run, as PNG files. matplotlib is optional, and imported only here."""

from itertools import product
from pathlib import Path

from torch import Tensor

MAX_NAMED_CLASSES = 40  # more names than this do not fit beside a confusion matrix
MAX_PRINTED_COUNTS = 12


def plot_learning_curve(history: list[dict], path: Path) -> None:
    """Losses and accuracies by epoch; `history` holds the lines of log.jsonl."""
    from matplotlib.figure import Figure

    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    losses.plot(epochs, [record["train_loss"] for record in history], label="training")
    losses.plot(epochs, [record["loss"] for record in history], label="validation")
    losses.set(xlabel="epoch", ylabel="cross-entropy (training: as augmented)")
    for name, label in {"top1": "top-1", "top5": "top-5", "ema_top1": "top-1 of the averaged weights"}.items():
        if name in history[0]:
            accuracies.plot(epochs, [record[name] for record in history], label=label)
    accuracies.set(xlabel="epoch", ylabel="validation accuracy (%)")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.savefig(path, dpi=120)


def plot_confusion(confusion: Tensor, classes: list[str], path: Path) -> None:
    """Counts (true, predicted) of images, coloured by their part of the true class."""
    from matplotlib.figure import Figure

    parts = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(parts.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="part of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= MAX_PRINTED_COUNTS:
        for row, column in product(range(len(classes)), repeat=2):
            colour = "white" if parts[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column].item()), ha="center", va="center", color=colour)
    figure.savefig(path, dpi=120)
