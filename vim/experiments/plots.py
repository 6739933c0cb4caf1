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
    """Plot benchmark.json: throughput in images/s, one panel per workload.

    Thin lines show the spread of the rounds; the peak memory is written next to each bar. This package's models are
    blue, others orange.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    models = results["config"]["models"]
    colours = {}
    for ours, colormap in ((True, "Blues"), (False, "Oranges")):
        members = [name for name in models if needs_vim(name) == ours]
        for place, name in enumerate(members):
            colours[name] = colormaps[colormap](0.8 - 0.45 * place / max(1, len(members) - 1))

    panels: dict[str, dict[str, dict]] = {}
    for row in results["rows"]:
        panels.setdefault(workload_name(row), {})[contender_name(row)] = row
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    # Height of a row of panels: a line per model, plus title and axis.
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
        axes.set_xlim(0, 1.4 * longest)  # room for the numbers
        axes.set_yticks(range(len(models)), [plain_text(name) for name in models], fontsize=8)
        axes.set_ylim(len(models) - 0.4, -0.6)  # the first model on top
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat[: len(panels)])[-columns:]:
        axes.set_xlabel("images/s")
    save_figure(figure, path, 120)
