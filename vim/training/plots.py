"""Plots of a training run as PNG files. matplotlib is optional and imported inside the functions."""

from itertools import product
from pathlib import Path

from torch import Tensor

from vim.figures import plain_text, save_figure

MAX_NAMED_CLASSES = 40  # more names do not fit at the axes of a confusion matrix
MAX_PRINTED_COUNTS = 12


def write_plots(history: list[dict], confusion: Tensor, classes: list[str], folder: Path) -> str:
    """Write learning_curve.png and confusion_matrix.png of an image classification run.

    Returns: a line with the paths, or with the reason why there are no plots.
    """
    curve, matrix = folder / "learning_curve.png", folder / "confusion_matrix.png"
    try:
        plot_learning_curve(history, curve)
        plot_confusion(confusion, classes, matrix)
    except ModuleNotFoundError as error:
        return f"no plots: {error}; pip install matplotlib"
    return f"plots: {curve} {matrix}"


def plot_learning_curve(history: list[dict], path: Path) -> None:
    """Losses and accuracies by epoch. `history`: the lines of log.jsonl."""
    from matplotlib.figure import Figure

    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    losses.plot(epochs, [record["train_loss"] for record in history], label="training")
    losses.plot(epochs, [record["loss"] for record in history], label="validation")
    losses.set(xlabel="epoch", ylabel="cross-entropy (training: with augmentation)")
    for name, label in {"top1": "top-1", "top5": "top-5", "ema_top1": "EMA top-1"}.items():
        if name in history[0]:
            accuracies.plot(epochs, [record[name] for record in history], label=label)
    accuracies.set(xlabel="epoch", ylabel="validation accuracy (%)")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    save_figure(figure, path, 120)


def plot_confusion(confusion: Tensor, classes: list[str], path: Path) -> None:
    """Number of images by (true, predicted) class, coloured by the fraction of the true class."""
    from matplotlib.figure import Figure

    fractions = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(fractions.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="fraction of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= MAX_NAMED_CLASSES:
        names = [plain_text(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90)
        axes.set_yticks(range(len(classes)), names)
    if len(classes) <= MAX_PRINTED_COUNTS:
        for row, column in product(range(len(classes)), repeat=2):
            colour = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column].item()), ha="center", va="center", color=colour)
    save_figure(figure, path, 120)
