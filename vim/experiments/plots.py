"""Plots of a comparison and of a benchmark, as PNG files. matplotlib is optional."""

from pathlib import Path

from vim.figures import MAX_LINE, plain_text, save_figure
from vim.timm_models.name import needs_vim


def plot_comparison(report: dict, path: Path) -> str:
    """Plot comparison.json: accuracy by learning rate on the validation split, and by seed on the test split.

    Returns: a line with the path, or with the reason why there is no plot.
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
    choosing.set(xlabel="learning rate", ylabel="validation top-1 (%)", xscale="log")
    tried = sorted({float(rate) for result in contenders.values() for rate in result["choosing"]})
    choosing.set_xticks(tried, [f"{rate:g}" for rate in tried])
    choosing.set_xticks([], minor=True)
    choosing.legend()
    testing.set(ylabel="test top-1 (%): seeds and mean", xlim=(-0.5, len(contenders) - 0.5))
    testing.set_xticks(range(len(contenders)), [plain_text(name) for name in contenders])
    for axes in (choosing, testing):
        axes.grid(alpha=0.3)
    save_figure(figure, path, 120)
    return f"plot: {path}"


def workload_name(row: dict) -> str:
    """The workload of a row of benchmark.json."""
    return f"{row['mode']}, {row['img_size']} pixels, batch {row['batch_size']}"


def contender_name(row: dict) -> str:
    """The contender of a row of benchmark.json, written as in the configuration."""
    return "+".join((row["model"], *row["options"]))


def plot_benchmark(results: dict, path: Path) -> None:
    """Plot benchmark.json: images/s over pixels, a panel for inference and one for training, a line per model.

    A point is the model's fastest contender at that size. This package's models have solid lines and round markers,
    others dashed lines and squares. The legend gives the reported top-1, if known, the best first.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    speeds: dict[str, dict[str, dict[int, float]]] = {}  # of each mode, model and size
    for row in results["rows"]:
        sizes = speeds.setdefault(row["mode"], {}).setdefault(row["model"], {})
        if row["error"] is None:
            sizes[row["img_size"]] = max(row["images_per_second"], sizes.get(row["img_size"], 0.0))
    top1 = results["config"]["top1"]
    measured = dict.fromkeys(name for models in speeds.values() for name, sizes in models.items() if sizes)
    ranked = sorted(measured, key=lambda name: -top1.get(name, 0.0))

    figure = Figure(figsize=(3.5 + 4 * len(speeds), 5.5), layout="constrained")
    about = f"{results['device']}, {results['config']['precision']}, torch {results['versions']['torch']}"
    figure.suptitle(plain_text(about, MAX_LINE))
    for axes, (mode, models) in zip(figure.subplots(1, len(speeds), squeeze=False)[0], speeds.items(), strict=True):
        for name in ranked:
            reported = f", {top1[name]:.1f} %" if name in top1 else ""
            points = models.get(name, {})
            pixels = sorted(points)
            style = "o-" if needs_vim(name) else "s--"
            axes.plot(pixels, [points[size] for size in pixels], style, label=plain_text(name) + reported)
        axes.set(
            title={"train": "training"}.get(mode, mode),
            xlabel="pixels to the edge",
            ylabel="images/s",
            xscale="log",
            yscale="log",
        )
        ticks = sorted({row["img_size"] for row in results["rows"] if row["mode"] == mode})
        axes.set_xticks(ticks, [str(size) for size in ticks])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    if ranked:
        heading = "reported top-1" if top1 else None
        figure.legend(handles=figure.axes[0].get_lines(), loc="outside right center", title=heading)
    save_figure(figure, path, 120)
