"""Plots of a run, as PNG files. matplotlib is optional, and imported only here."""

import warnings
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from vim.files import whole_file

from .progress import visible

MAX_NAME = 32  # characters of a name in a plot
MAX_LINE = 80  # of a title
MAX_NAMED_CLASSES = 40  # more names than this do not fit beside a confusion matrix
MAX_PRINTED_COUNTS = 12


def plain_text(text: object, most: int = MAX_NAME) -> str:
    """A name as matplotlib shows it and does not read it: no mathematics between $, one line, at most so many
    characters, and no underscore in front, with which matplotlib marks what a legend leaves out."""
    shown = visible(str(text))
    shown = shown if len(shown) <= most else f"{shown[: most - 1]}…"
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as a PNG file.

    Where matplotlib's own font lacks characters of the texts, an installed font that has most of them helps out; what
    no font has becomes a box, without a warning for each.
    """
    from matplotlib import rc_context, rcParams
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    families = [*rcParams["font.family"], *_fonts_for({c for text in texts for c in text.get_text()})]
    with whole_file(path) as unfinished, rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        for text in texts:
            text.set_fontfamily(families)
        figure.savefig(unfinished, dpi=dpi)


def _fonts_for(characters: set[str]) -> list[str]:
    """Name of the installed font with most of the characters that matplotlib's default font lacks; none if it has all,
    or no font has any."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

    default = get_font(findfont(FontProperties()))
    lacking = [c for c in characters if c.isprintable() and not default.get_char_index(ord(c))]
    if not lacking:
        return []
    found: tuple[int, str] = (0, "")
    for font in fontManager.ttflist:
        if font.name.startswith("Last Resort"):  # has a box for every character
            continue
        try:
            file = get_font(font.fname)
        except (OSError, RuntimeError):  # removed since matplotlib listed it, or damaged
            continue
        if file.scalable:  # matplotlib cannot draw bitmaps, which colour emoji are
            found = max(found, (sum(bool(file.get_char_index(ord(c))) for c in lacking), font.name))
    return [found[1]] if found[0] else []


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


def plot_comparison(report: dict, path: Path) -> str:
    """What comparison.json says: accuracy by learning rate where it was chosen, and of each seed on the test split.

    Returns: a line that says where the plot is, or why there is none.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        return f"no plot: {error}; pip install matplotlib"
    figure = Figure(figsize=(9, 4), layout="constrained")
    choosing, testing = figure.subplots(1, 2)
    contenders = report["contenders"]
    for place, (name, result) in enumerate(contenders.items()):
        rates = [float(rate) for rate in result["choosing"]]
        choosing.plot(rates, list(result["choosing"].values()), marker="o", color=f"C{place}", label=plain_text(name))
        testing.plot([place] * len(result["test"]), result["test"], "o", color=f"C{place}", alpha=0.6)
        testing.hlines(result["mean"], place - 0.2, place + 0.2, color=f"C{place}")
    choosing.set(xlabel="learning rate", ylabel="top-1 on the split to choose on (%)", xscale="log")
    tried = sorted({float(rate) for result in contenders.values() for rate in result["choosing"]})
    choosing.set_xticks(tried, [f"{rate:g}" for rate in tried])
    choosing.set_xticks([], minor=True)
    choosing.legend()
    testing.set(ylabel="top-1 on the test split (%): seeds and mean", xlim=(-0.5, len(contenders) - 0.5))
    testing.set_xticks(range(len(contenders)), [plain_text(name) for name in contenders])
    for axes in (choosing, testing):
        axes.grid(alpha=0.3)
    save_figure(figure, path, 120)
    return f"plot: {path}"


def workload_name(row: dict) -> str:
    """What a row of benchmark.json had to do."""
    return f"{row['mode']}, {row['img_size']} pixels, batch {row['batch_size']}"


def contender_name(row: dict) -> str:
    """Who did it, as the configuration has it."""
    return "+".join((row["model"], *row["options"]))


def plot_benchmark(results: dict, path: Path) -> None:
    """Images a second, a panel for each workload; `results` is the content of benchmark.json.

    Thin lines span the rounds, and behind each bar stands the peak memory. Vim's models are blue, others orange.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    models = results["config"]["models"]
    colours = {}
    for family, colormap in ((True, "Blues"), (False, "Oranges")):
        members = [name for name in models if name.startswith("vim_") == family]
        for place, name in enumerate(members):
            colours[name] = colormaps[colormap](0.8 - 0.45 * place / max(1, len(members) - 1))

    panels: dict[str, dict[str, dict]] = {}
    for row in results["rows"]:
        panels.setdefault(workload_name(row), {})[contender_name(row)] = row
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    # Each row of panels: a line for each model, and the title with the axis.
    figure = Figure(figsize=(3 + 5 * columns, 0.6 + lines * (0.8 + 0.28 * len(models))), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    about = f"{results['device']}, {results['config']['precision']}, torch {results['versions']['torch']}"
    figure.suptitle(plain_text(about, MAX_LINE))
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (title, rows) in zip(grid.flat, panels.items(), strict=False):
        longest = max((row["max"] or 0 for row in rows.values()), default=0) or 1
        for name, row in rows.items():
            place = models.index(name)
            if row["error"]:
                error = plain_text(row["error"], MAX_LINE)
                axes.text(0.01 * longest, place, error, va="center", fontsize=8, style="italic", color="dimgrey")
                continue
            speed = row["images_per_second"]
            spread = [[speed - row["min"]], [row["max"] - speed]]
            axes.barh(place, speed, color=colours[name], xerr=spread, error_kw={"linewidth": 0.8, "ecolor": "black"})
            figures = f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"
            peak = "" if row["peak_mib"] is None else f", {row['peak_mib']:,.0f} MiB"
            axes.text(row["max"] + 0.015 * longest, place, f"{figures}/s{peak}", va="center", fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.4 * longest)  # room for the figures
        axes.set_yticks(range(len(models)), [plain_text(name) for name in models], fontsize=8)
        axes.set_ylim(len(models) - 0.4, -0.6)  # the first on top
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat[: len(panels)])[-columns:]:
        axes.set_xlabel("images/s")
    save_figure(figure, path, 120)
