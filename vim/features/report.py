"""kNN and linear probes on two exports: results as JSON, and plots."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vim.console.errors import ConfigError, RunError, did_you_mean
from vim.console.interruption import Interruption, interruptible
from vim.console.progress import Progress
from vim.data import DataError, ImageSource
from vim.files import whole_file, write_json

from .config import KnnConfig, LinearProbeConfig
from .judge import Probe, accuracy, few_shot, knn_scores, nearest
from .plots import plot_knn, plot_linear_probe, plot_neighbours, plot_projection
from .store import NO_LABEL, Features, load
from .unfinished import UnfinishedProbe


def knn(config: KnnConfig) -> dict[str, Any]:
    """Classify the images of one export by their nearest neighbours in another.

    Returns: content of knn.json: column, and results, a row with top1 and top5 in percent for each number of shots
        (null: all images), draw and k.
    Raises: DataError, ConfigError, with a message for the user.
    """
    train, val, classes = _exports(config.train, config.val)
    column = config.column or next(iter(train.columns))
    bank, queries = (_features(features, [column]) for features in (train, val))
    labels, val_labels = torch.from_numpy(train.labels.copy()), torch.from_numpy(val.labels.copy())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bank, queries, labels = bank.to(device), queries.to(device), labels.to(device)
    results = []
    for shots, draw, rows in _draws(train.labels, config.shots, config.draws, 0):
        subset = torch.from_numpy(rows).to(device)
        similarities, found = nearest(bank[subset], queries, min(max(config.k), len(rows)))
        neighbour_labels = labels[subset][found]
        for k in config.k:
            if k > len(rows):
                continue
            scores = knn_scores(similarities, neighbour_labels, classes, k, config.temperature).cpu()
            results.append({"shots": shots, "draw": draw, "k": k, **accuracy(scores, val_labels)})
    if not results:
        raise ConfigError(f"k must name a number up to {len(train)}, the images in {config.train}, got {config.k}")
    report = {"config": asdict(config), "column": column, "classes": classes, "results": results}
    folder = _write(config.output, "knn.json", report)
    progress = Progress()
    with whole_file(folder / "knn.png") as path:
        plot_knn(results, path)
    if config.sheet:
        chosen = np.linspace(0, len(val) - 1, min(config.sheet, len(val))).round().astype(int)
        similarities, found = nearest(bank, queries[torch.from_numpy(chosen).to(device)], min(8, len(train)))
        try:
            with whole_file(folder / "neighbours.png") as path:
                sources = _images(train), _images(val)
                plot_neighbours(train, val, sources, chosen, found.cpu(), similarities.cpu(), path)
        except DataError as error:
            progress.line(f"no sheet of neighbours: {error}")
    if config.projection:
        chosen = np.linspace(0, len(val) - 1, min(config.projection, len(val))).round().astype(int)
        with whole_file(folder / "projection.png") as path:
            plot_projection(queries.cpu().numpy()[chosen], val.labels[chosen], path)
    return report


def probe(config: LinearProbeConfig) -> dict[str, Any]:
    """Train linear classifiers on one export and evaluate the best on another.

    Input and learning rate are selected on held-out training images; the winner is retrained on all of them.
    A probe that was stopped continues from its last save when it is called again.

    Returns: content of linear_probe.json: for each number of shots and draw the winner, its top1 and top5 on val in
        percent, and those of the whole grid on the held-out images, null for classifiers that diverged.
    Raises: DataError, ConfigError or RunError, with a message for the user; InterruptedRunError after SIGTERM or
        Ctrl-C, when the state is saved.
    """
    with interruptible(lambda: "run it again to continue") as interruption:
        return _probe(config, interruption)


def _probe(config: LinearProbeConfig, interruption: Interruption) -> dict[str, Any]:
    train, val, classes = _exports(config.train, config.val)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = _inputs(train, config)
    x, y = ({name: _features(f, columns).to(device) for name, columns in inputs.items()} for f in (train, val))
    labels, val_labels = (torch.from_numpy(f.labels.copy()).to(device) for f in (train, val))
    common = {"epochs": config.epochs, "batch_size": config.batch_size, "seed": config.seed}
    plan = list(_draws(train.labels, config.shots, config.draws, config.seed))
    results, progress = [], Progress()
    identity = asdict(config) | {"train": train.manifest, "val": val.manifest}
    del identity["output"]
    trainings = UnfinishedProbe(
        Path(config.output).expanduser() / "unfinished.pt", identity, interruption, progress.line
    )
    with progress.bar("linear probe", 2 * config.epochs * len(plan), trainings.epochs_done) as advance:
        for shots, draw, rows in plan:
            order = torch.from_numpy(np.random.RandomState(config.seed).permutation(rows)).to(device)
            held = order[: max(1, round(config.select * len(rows)))]
            fit = order[len(held) :] if len(rows) > len(held) else order
            grid = trainings.train(
                {name: f[fit] for name, f in x.items()}, labels[fit], {name: f[held] for name, f in x.items()},
                labels[held], classes, learning_rates=config.learning_rates, advance=advance, **common,
            )  # fmt: skip
            best = _choice(grid)
            every = torch.from_numpy(rows).to(device)
            (found,) = trainings.train(
                {best.inputs: x[best.inputs][every]}, labels[every], {best.inputs: y[best.inputs]},
                val_labels, classes, learning_rates=[best.lr], advance=advance, **common,
            )  # fmt: skip
            if found["top1"] is None:
                raise RunError(f"{_diverged([found])} on all training images; leave that learning rate out")
            results.append({"shots": shots, "draw": draw, **found, "grid": grid})
    for result in results:
        if diverged := [cell for cell in result["grid"] if cell["top1"] is None]:
            progress.line(f"warning: {_diverged(diverged)}; excluded from the selection")
    report = {"config": asdict(config), "inputs": inputs, "classes": classes, "results": results}
    folder = _write(config.output, "linear_probe.json", report)
    with whole_file(folder / "linear_probe.png") as path:
        plot_linear_probe(results[0], path)
    trainings.remove()
    return report


def _choice(grid: list[dict[str, Any]]) -> Probe:
    """The classifier with the best top-1. Ties go to the smallest learning rate, then to the first input.

    Raises: RunError if all classifiers diverged.
    """
    finite = [cell for cell in grid if cell["top1"] is not None]
    if not finite:
        raise RunError(f"{_diverged(grid)}, and no other is left; give smaller learning_rates")
    best = max(finite, key=lambda cell: (cell["top1"], -cell["lr"]))
    return Probe(best["inputs"], best["lr"])


def _diverged(cells: list[dict[str, Any]]) -> str:
    return "; ".join(f"{cell['inputs']} with learning rate {cell['lr']:g}" for cell in cells) + " diverged"


def _exports(train: str, val: str) -> tuple[Features, Features, int]:
    """Both exports, and the number of classes in train. Labels of both are positions in the classes of train.

    Raises: DataError for images without labels, for classes that train does not have, and for exports that differ in
        more than their images.
    """
    both = load(train), load(val)
    for name, features in zip((train, val), both, strict=True):
        if (features.labels == NO_LABEL).any():
            path = features.paths[int(np.argmax(features.labels == NO_LABEL))]
            raise DataError(f"{name} has images without a label, first {path}; export folders <class>/<image>")
    for key in ("weights_sha256", "preprocessing", "columns", "l2"):
        a, b = (features.manifest[key] for features in both)
        if a != b:
            raise DataError(f"{train} and {val} cannot be compared: {key} is {a} in one, {b} in the other")
    both[1].labels = _same_labels(*both, f"{val} has classes that {train} lacks")
    return *both, len(both[0].classes)


def _same_labels(train: Features, val: Features, otherwise: str) -> np.ndarray:
    """Labels of val as positions in the classes of train, matched by name.

    Raises: DataError, which begins with `otherwise`, for names that train lacks or has twice.
    """
    if train.classes == val.classes:
        return val.labels
    used = sorted(set(val.labels.tolist()))
    known = {name: label for label, name in enumerate(train.classes)}
    if len(known) < len(train.classes):
        raise DataError(
            f"{otherwise}, and names shared by several classes cannot be matched; export both from one list"
        )
    if unknown := [val.classes[label] for label in used if val.classes[label] not in known]:
        some = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
        raise DataError(f"{otherwise}: {len(unknown)} of {len(used)} ({some}); export splits of the same classes")
    positions = np.array([known.get(name, NO_LABEL) for name in val.classes])
    return positions[val.labels]


def _images(features: Features) -> ImageSource:
    """Raises: DataError if the images that were exported are no longer there."""
    source = ImageSource(features.manifest["images"])
    if [entry.path for entry in source.entries] != features.paths:
        raise DataError(f"{source.where} no longer holds the images that were exported")
    return source


def _features(features: Features, columns: list[str]) -> Tensor:
    """(images, D) in fp32: flattened columns, concatenated."""
    for name in columns:
        if name not in features.columns:
            hint = did_you_mean(name, features.columns, f"there are {', '.join(features.columns)}")
            raise ConfigError(f"--column: the export has no column {name!r}{hint}")
    parts = [features[name].reshape(len(features), -1).astype(np.float32) for name in columns]
    return torch.from_numpy(np.concatenate(parts, 1))


def _draws(labels: np.ndarray, shots: list[int], draws: int, seed: int) -> Iterator[tuple[int | None, int, np.ndarray]]:
    """(shots, draw, rows to train on); the first is the run on all images."""
    yield None, 0, np.arange(len(labels))
    for count in shots:
        for draw in range(draws):
            yield count, draw, few_shot(labels, count, seed + draw)


def _inputs(features: Features, config: LinearProbeConfig) -> dict[str, list[str]]:
    """Name of an input -> its columns."""
    blocks, exported = features.manifest["blocks"], features.manifest["pools"]
    pools = config.pools
    if pools is None:
        vectors = [pool for pool in exported if pool != "map"] or exported
        pools = list(dict.fromkeys((vectors[0], "+".join(vectors))))
    inputs = {}
    for names in pools:
        wanted = names.split("+")
        if missing := [pool for pool in wanted if pool not in exported]:
            raise ConfigError(
                f"--pools: {missing[0]!r} was not exported, only {', '.join(exported)}; export it with --pools of "
                f"tools/export_features.py, or leave {names!r} out"
            )
        if blocks is None:
            inputs[f"last, {names}"] = wanted
            continue
        for count in config.last_blocks:
            taken = blocks[-min(count, len(blocks)) :]
            inputs[f"{len(taken)} block{'s' * (len(taken) > 1)}, {names}"] = [
                f"block{b}.{pool}" for b in taken for pool in wanted
            ]
    return inputs


def _write(output: str, name: str, report: dict[str, Any]) -> Path:
    folder = Path(output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(report, folder / name)
    return folder
