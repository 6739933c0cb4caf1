"""Plots of kNN, linear probes, neighbours and t-SNE. matplotlib and scikit-learn are optional: imported only here."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vim.data import ImageSource
from vim.figures import plain_text, save_figure

from .store import Features


def plot_knn(results: list[dict[str, Any]], path: Path) -> None:
    """top-1 by k: a line per number of shots, with the range over its draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for shots in dict.fromkeys(row["shots"] for row in results):
        rows = [row for row in results if row["shots"] == shots]
        ks = sorted({row["k"] for row in rows})
        tops = [[row["top1"] for row in rows if row["k"] == k] for k in ks]
        label = "all images" if shots is None else f"{shots} per class"
        (line,) = axes.plot(ks, [np.mean(top) for top in tops], marker="o", label=label)
        axes.fill_between(ks, [min(t) for t in tops], [max(t) for t in tops], color=line.get_color(), alpha=0.2, lw=0)
    axes.set(xlabel="neighbours", ylabel="top-1 (%)", xscale="log")
    every = sorted({row["k"] for row in results})
    axes.set_xticks(every, [str(k) for k in every])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, 120)


def plot_linear_probe(result: dict[str, Any], path: Path) -> None:
    """Held-out top-1 by learning rate: a line per input, a ring around the winner. Omits diverged classifiers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    grid = [cell for cell in result["grid"] if cell["top1"] is not None]
    for inputs in dict.fromkeys(cell["inputs"] for cell in grid):
        cells = [cell for cell in grid if cell["inputs"] == inputs]
        axes.plot(
            [cell["lr"] for cell in cells], [cell["top1"] for cell in cells], marker="o", ms=4, label=plain_text(inputs)
        )
    best = next(c for c in grid if (c["inputs"], c["lr"]) == (result["inputs"], result["lr"]))
    axes.plot(best["lr"], best["top1"], "o", ms=12, mfc="none", mec="black")
    axes.set(xlabel="learning rate for a batch of 256", ylabel="top-1 on held-out training images (%)")
    axes.set_xscale("log")
    chosen = plain_text(result["inputs"])
    axes.set_title(f"chosen: {chosen}, learning rate {result['lr']:g}; {result['top1']:.1f} % on val", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path, 120)


def plot_neighbours(
    train: Features,
    val: Features,
    sources: tuple[ImageSource, ImageSource],
    queries: np.ndarray,
    found: Tensor,
    similarities: Tensor,
    path: Path,
) -> None:
    """A row per query: the image, then its neighbours, framed green if they have its class, else red.

    Raises: DataError for an image that can no longer be read.
    """
    from matplotlib.figure import Figure

    columns = 1 + found.shape[1]
    figure = Figure(figsize=(1.1 * columns, 1.3 * len(queries)), layout="constrained")
    grid = figure.subplots(len(queries), columns, squeeze=False)
    for row, query in enumerate(queries):
        label = val.labels[query]
        shown = [(sources[1].load(int(val.index[query])), f"class {label}", "black")]
        for near, similarity in zip(found[row].tolist(), similarities[row].tolist(), strict=True):
            colour = "tab:green" if train.labels[near] == label else "tab:red"
            shown.append((sources[0].load(int(train.index[near])), f"{train.labels[near]}: {similarity:.2f}", colour))
        for axes, (image, text, colour) in zip(grid[row], shown, strict=True):
            axes.imshow(image)
            axes.set_title(plain_text(text), fontsize=8, color=colour)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=2)
    save_figure(figure, path, 100)


def plot_projection(features: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """t-SNE by cosine distance, coloured by class."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(1.0, (len(features) - 1) / 3))
    layout = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0).fit_transform(features)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    classes = np.unique(labels)
    colours = colormaps["tab10" if len(classes) <= 10 else "tab20" if len(classes) <= 20 else "nipy_spectral"]
    for place, label in enumerate(classes):
        points = layout[labels == label]
        colour = colours(place if len(classes) <= 20 else place / len(classes))
        axes.scatter(points[:, 0], points[:, 1], s=8, color=colour, label=plain_text(label), lw=0)
    if len(classes) <= 20:
        axes.legend(title="class", markerscale=2, fontsize=8)
    axes.set(xticks=[], yticks=[], title="t-SNE of the features")
    save_figure(figure, path, 120)
