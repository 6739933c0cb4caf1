"""Plots of a run, as PNG files. matplotlib is optional, and imported only here."""

from itertools import product
from pathlib import Path

from torch import Tensor

from vim.figures import plain_text, save_figure

MAX_NAMED_CLASSES = 40  # more names than this do not fit beside a confusion matrix
MAX_PRINTED_COUNTS = 12


def write_plots(history: list[dict], confusion: Tensor, classes: list[str], folder: Path) -> str:
    """Write learning_curve.png and confusion_matrix.png of an image classifier's run.

    Returns: a line that says where they are, or why there are none.
    """
    curve, matrix = folder / "learning_curve.png", folder / "confusion_matrix.png"
    try:
        plot_learning_curve(history, curve)
        plot_confusion(confusion, classes, matrix)
    except ModuleNotFoundError as error:
        return f"no plots: {error}; pip install matplotlib"
    return f"plots: {curve} {matrix}"


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
    save_figure(figure, path, 120)


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
        names = [plain_text(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90)
        axes.set_yticks(range(len(classes)), names)
    if len(classes) <= MAX_PRINTED_COUNTS:
        for row, column in product(range(len(classes)), repeat=2):
            colour = "white" if parts[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column].item()), ha="center", va="center", color=colour)
    save_figure(figure, path, 120)
