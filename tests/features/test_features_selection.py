"""Nearest neighbours and linear probe on hand-made exports: the effect of each option, and no leak in the selection."""

import math
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import vim.features.judge as judge
import vim.features.plots as plots
import vim.features.report as report
import vim.features.unfinished as unfinished
from vim.console import RunError
from vim.console.interruption import Interruption
from vim.data import DataError
from vim.features import KnnConfig, LinearProbeConfig, knn, probe
from vim.features.store import Features, shard_file, write_manifest, write_shard
from vim.features.unfinished import UnfinishedProbe

sklearn = pytest.importorskip("sklearn")


def write_export(folder, labels, columns, classes="abc", **about):
    """Write an export of these columns (name -> rows of numbers). Returns its folder."""
    arrays = {name: np.asarray(values, np.float32) for name, values in columns.items()}
    arrays = {name: values[:, None] if values.ndim == 1 else values for name, values in arrays.items()}
    rows = Features(arrays, np.arange(len(labels)), np.asarray(labels), [f"{i}.png" for i in range(len(labels))], {})
    manifest = {
        "images": str(folder),
        "model": "none",
        "weights_sha256": "0",
        "preprocessing": {"mean": [0.5]},
        "pools": list(columns),
        "blocks": None,
        "l2": False,
        "columns": {name: list(values.shape[1:]) for name, values in arrays.items()},
        "classes": list(classes),
        "rows": len(labels),
        "rows_per_shard": len(labels),
        "shards": 1,
        "format": "npz",
    }
    folder.mkdir()
    write_manifest(folder, manifest | about)
    write_shard(shard_file(folder, 0, "npz"), rows, "npz")
    return str(folder)


def at(*degrees):
    """Points on the circle of radius 3."""
    return [(3 * math.cos(math.radians(d)), 3 * math.sin(math.radians(d))) for d in degrees]


@pytest.fixture
def classify(tmp_path, monkeypatch):
    """classify(**options): top1 of each result of knn. classify.drawn: arguments of the last plots.

    token: four of five images have a neighbour of class a at 10 degrees and two of b at 30 and 32. The last has one of
    c at 0 degrees, then those two. avg: the nearest neighbour of all is of class b.
    """
    columns = {"token": at(10, 30, 32, 80), "avg": at(90, 1, 89, 88)}
    write_export(tmp_path / "train", [0, 1, 1, 2], columns)
    write_export(tmp_path / "turned", [1, 0, 0, 2], columns)
    columns = {"token": at(0, 0, 0, 0, 80), "avg": at(0, 0, 0, 0, 0)}
    write_export(tmp_path / "val", [1, 1, 1, 1, 2], columns)
    write_export(tmp_path / "of-a", [0, 0, 0, 0, 0], columns)
    monkeypatch.chdir(tmp_path)

    def classify(**options):
        given = {"train": "train", "val": "val", "k": [3], "sheet": 0, "projection": 0, "output": "out"}
        return [row["top1"] for row in knn(KnnConfig(**given | options))["results"]]

    classify.drawn = {}  # type: ignore[attr-defined]
    monkeypatch.setattr(report, "_images", lambda features: None)
    monkeypatch.setattr(report, "plot_knn", lambda results, path: None)
    for name in ("neighbours", "projection"):
        monkeypatch.setattr(report, f"plot_{name}", lambda *args, name=name: classify.drawn.update({name: args}))  # type: ignore[attr-defined]
    return classify


def sheet_of(classify, **options):
    """Images in the sheet, and the nearest neighbour of each."""
    classify(**options)
    _, _, _, queries, found, similarities, _ = classify.drawn["neighbours"]
    assert (similarities.diff() <= 0).all()
    return queries.tolist(), found[:, 0].tolist()


def projection_of(classify, **options):
    """Class and feature of each point in the projection."""
    classify(**options)
    features, labels, _ = classify.drawn["projection"]
    return labels.tolist(), [round(float(y), 2) for y in features[:, 1]]


EFFECTS_OF_KNN = {
    "train": lambda of: (of(train="train"), of(train="turned")) == ([20], [100]),
    "val": lambda of: (of(val="val"), of(val="of-a")) == ([20], [80]),
    "column": lambda of: (of(k=[1]), of(k=[1], column="avg")) == ([20], [80]),
    "k": lambda of: of(k=[1, 3], temperature=None) == [20, 80],
    "temperature": lambda of: (of(), of(temperature=0.25), of(temperature=None)) == ([20], [100], [80]),
    "shots": lambda of: of(k=[1], shots=[1], draws=1) == [20, 20],
    "draws": lambda of: len(of(k=[1], shots=[1], draws=4)) == 5,
    "sheet": lambda of: (sheet_of(of, sheet=2), set(of.drawn)) == (([0, 4], [0, 3]), {"neighbours"}),
    "projection": lambda of: (
        (projection_of(of, projection=3), set(of.drawn)) == (([1, 1, 2], [0, 0, 2.95]), {"projection"})
    ),
    "output": lambda of: of(output="there") and Path("there/knn.json").is_file(),
}


@pytest.mark.parametrize("option", [field.name for field in fields(KnnConfig)])
def test_each_option_of_knn_has_its_effect(classify, option):
    assert EFFECTS_OF_KNN[option](classify)


def test_maps_are_compared_place_by_place(tmp_path, classify):
    """Two images have the same vectors at swapped places."""
    maps = [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]
    write_export(tmp_path / "maps", [0, 1], {"map": maps})
    assert classify(train="maps", val="maps", k=[1]) == [100]


def test_the_plot_of_nearest_neighbours_shows_the_mean_and_the_span_of_draws(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, dpi: figures.append(figure))
    tops = {(None, 0, 20): 9.0, (None, 0, 1): 8.0, (2, 0, 1): 1.0, (2, 1, 1): 3.0, (2, 2, 1): 8.0}
    rows = [{"shots": shots, "draw": draw, "k": k, "top1": top} for (shots, draw, k), top in tops.items()]
    plots.plot_knn(rows, tmp_path / "x.png")
    (axes,) = figures[0].axes
    shown = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert shown == {"all images": [[1, 8], [20, 9]], "2 per class": [[1, 4]]}
    assert [np.ptp(span.get_paths()[0].vertices[:, 1]) for span in axes.collections] == [1, 7]


def test_a_projection_shows_the_points_of_each_class_under_its_number(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, dpi: figures.append(figure))
    as_it_is = SimpleNamespace(TSNE=lambda **options: SimpleNamespace(fit_transform=lambda features: features))
    monkeypatch.setitem(sys.modules, "sklearn.manifold", as_it_is)
    layout = np.arange(10.0).reshape(5, 2)
    plots.plot_projection(layout, np.array([7, 3, 7, 3, 3]), tmp_path / "x.png")
    shown = [(points.get_label(), points.get_offsets().tolist()) for points in figures[0].axes[0].collections]
    assert shown == [("3", layout[[1, 3, 4]].tolist()), ("7", layout[[0, 2]].tolist())]


def test_the_plot_of_a_probe_has_a_ring_around_the_choice(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, dpi: figures.append(figure))
    cells = {("a", 0.1): 50.0, ("a", 1.0): 60.0, ("b", 0.1): 70.0, ("b", 1.0): None}
    grid = [{"inputs": inputs, "lr": lr, "top1": top} for (inputs, lr), top in cells.items()]
    plots.plot_linear_probe({"grid": grid, "inputs": "b", "lr": 0.1, "top1": 66.6}, tmp_path / "x.png")
    (axes,) = figures[0].axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0.1, 50], [1, 60]], [[0.1, 70]], [[0.1, 70]]]
    assert axes.get_title() == "chosen: b, learning rate 0.1; 66.6 % on val"


def test_each_draw_is_another(tmp_path, monkeypatch):
    """The features are noise, so only equal draws have equal accuracies."""
    monkeypatch.setattr(report, "plot_knn", lambda results, path: None)
    rng = np.random.RandomState(0)
    for name, count in (("train", 60), ("val", 90)):
        write_export(tmp_path / name, rng.randint(0, 3, count), {"token": rng.randn(count, 8)})
    given = {"shots": [2], "draws": 8, "k": [1], "sheet": 0, "projection": 0, "output": str(tmp_path / "out")}
    results = [knn(KnnConfig(str(tmp_path / "train"), str(tmp_path / "val"), **given))["results"] for _ in range(2)]
    assert results[0] == results[1]
    assert len({row["top1"] for row in results[0][1:]}) >= 5


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """chosen(**options): the report of a probe, and the arguments of each training. No training is run.

    The token feature of an image is its number, plus 500 in others and 1000 in val; avg is 0.25 more. Each class has
    20 images.
    """
    for name, first in (("train", 0), ("others", 500), ("val", 1000), ("val2", 2000)):
        numbers = first + np.arange(60)
        columns = {f"block{b}.{pool}": numbers + n for b in (3, 5, 7) for pool, n in (("token", 0), ("avg", 0.25))}
        write_export(tmp_path / name, np.arange(60) // 20, columns, blocks=[3, 5, 7], pools=["token", "avg"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot_linear_probe", lambda result, path: plotted.append(result["shots"]))

    def linear_probe(
        train, train_labels, held_out, classes, *, learning_rates, advance, after_update, saved, **options
    ):
        name = next(iter(train))
        fit, held = (features[name][:, 0].long().tolist() for features in (train, held_out))
        assert train_labels.tolist() == [row % 500 // 20 for row in fit]
        calls.append(SimpleNamespace(fit=fit, held=held, rates=learning_rates, inputs=train, options=options))
        return {judge.Probe(name, lr): torch.zeros(len(held), classes) for name in train for lr in learning_rates}

    calls, plotted = [], []
    monkeypatch.setattr(unfinished, "linear_probe", linear_probe)

    def chosen(**options):
        calls.clear()
        given = {"train": "train", "val": "val", "learning_rates": [1.0, 0.5], "select": 0.25, "output": "out"}
        found = probe(LinearProbeConfig(**given | options))
        assert plotted.pop() is None  # the plot is of all images
        return found, list(calls)

    return chosen


def inputs(columns):
    """Blocks and pools of a report's columns."""
    return [name.removeprefix("block").replace(".", " ") for name in columns]


EFFECTS_OF_PROBE = {
    "train": lambda of: sorted(of(train="others")[1][1].fit) == list(range(500, 560)),
    "val": lambda of: [of(val=name)[1][1].held[0] for name in ("val", "val2")] == [1000, 2000],
    "last_blocks": lambda of: (
        {name: inputs(columns) for name, columns in of(last_blocks=[1, 2, 9], pools=["avg"])[0]["inputs"].items()}
        == {
            "1 block, avg": ["7 avg"],
            "2 blocks, avg": ["5 avg", "7 avg"],
            "3 blocks, avg": ["3 avg", "5 avg", "7 avg"],
        }
    ),
    "pools": lambda of: (
        of(pools=["token+avg"], last_blocks=[1], train="others")[1][1].inputs["1 block, token+avg"][3].tolist()
        == [503, 503.25]
    ),
    "learning_rates": lambda of: [one.rates for one in of(learning_rates=[3.0, 0.1])[1]] == [[3.0, 0.1], [0.1]],
    "epochs": lambda of: [one.options["epochs"] for one in of(epochs=7)[1]] == [7, 7],
    "batch_size": lambda of: [one.options["batch_size"] for one in of(batch_size=7)[1]] == [7, 7],
    "seed": lambda of: [one.options["seed"] for one in of(seed=7)[1]] == [7, 7],
    "select": lambda of: [len(of(select=part)[1][0].held) for part in (0.001, 0.1, 0.5)] == [1, 6, 30],
    "shots": lambda of: [row["shots"] for row in of(shots=[2, 5], draws=1)[0]["results"]] == [None, 2, 5],
    "draws": lambda of: [row["draw"] for row in of(shots=[2], draws=3)[0]["results"]] == [0, 0, 1, 2],
    "output": lambda of: of(output="there") and Path("there/linear_probe.json").is_file(),
}


@pytest.mark.parametrize("option", [field.name for field in fields(LinearProbeConfig)])
def test_each_option_of_the_probe_has_its_effect(chosen, option):
    assert EFFECTS_OF_PROBE[option](chosen)


def test_a_probe_is_chosen_on_images_that_no_classifier_trained_on(chosen):
    """The seed draws them, others each time. The winner is retrained on all and evaluated on val."""
    seen = {}
    for seed in (0, 1):
        _, calls = chosen(shots=[4], draws=3, seed=seed)
        choices, finals = calls[::2], calls[1::2]
        for choice, final in zip(choices, finals, strict=True):
            assert sorted(choice.fit + choice.held) == sorted(final.fit)
            assert len(choice.held) == len(final.fit) // 4
            assert final.held == list(range(1000, 1060))
        assert sorted(finals[0].fit) == list(range(60))
        for draw in finals[1:]:
            assert np.bincount(np.array(draw.fit) // 20).tolist() == [4, 4, 4]
        drawn = [frozenset(draw.fit) for draw in finals[1:]]
        assert len(set(drawn)) == 3
        seen[seed] = frozenset(choices[0].held), drawn[0]
        assert len(set(np.array(choices[0].held) // 20)) == 3
    assert all(a != b for a, b in zip(seen[0], seen[1], strict=True))


def test_of_equal_classifiers_the_smallest_learning_rate_is_chosen_and_the_first_input(chosen):
    (result,) = chosen(learning_rates=[1.0, 0.1, 3.0], pools=["avg", "token"], last_blocks=[2, 1])[0]["results"]
    assert (result["inputs"], result["lr"]) == ("2 blocks, avg", 0.1)
    cells = [("a", 1.0, 50.0), ("b", 1.0, 60.0), ("b", 0.1, 60.0), ("c", 0.1, 60.0), ("d", 0.1, None)]
    assert report._choice([{"inputs": i, "lr": lr, "top1": top} for i, lr, top in cells]) == judge.Probe("b", 0.1)


class Killed(BaseException):
    """Stands for the end of the process."""


OTHERS = {"train": "others", "val": "val2", "last_blocks": [1], "pools": ["avg"], "learning_rates": [1.0], "epochs": 7}
OTHERS |= {"batch_size": 7, "select": 0.5, "shots": [2], "draws": 1, "seed": 1}


def test_a_probe_does_not_go_on_where_one_of_other_options_was(chosen, monkeypatch):
    def killed(*args, after_update, **options):
        after_update(lambda: {"epoch": 0})
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "SECONDS_BETWEEN_SAVES", 0)
        patch.setattr(unfinished, "linear_probe", killed)
        with pytest.raises(Killed):
            chosen()
    assert set(OTHERS) == {field.name for field in fields(LinearProbeConfig)} - {"output"}
    for option, other in OTHERS.items():
        with pytest.raises(RunError, match=rf"with another {option}; choose another --output, or remove it"):
            chosen(**{option: other})
    assert chosen()


def test_a_probe_is_saved_once_a_minute(monkeypatch, tmp_path):
    """Updates take 25 seconds."""
    now, saved = [1000.0], []

    def linear_probe(*args, after_update, **options):
        for update in range(1, 11):
            now[0] += 25
            after_update(lambda update=update: {"update": update})
        return {}

    monkeypatch.setattr(unfinished, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(unfinished, "save_checkpoint", lambda state, path: saved.append(state["at_hand"]["update"]))
    monkeypatch.setattr(unfinished, "linear_probe", linear_probe)
    with Interruption() as interruption:
        trainings = UnfinishedProbe(tmp_path / "unfinished.pt", {"epochs": 1}, interruption, print)
        trainings.train({}, torch.zeros(0), {}, torch.zeros(0), 1)
    assert saved == [3, 6, 9]
    assert trainings.epochs_done == 1


def test_neighbours_are_framed_by_whether_they_have_the_class_of_the_query(tmp_path, monkeypatch):
    """An export's rows are in another order than its images. An image's grey value is its number."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, dpi: figures.append(figure))
    train, val = (
        Features({}, np.array(index), np.array(labels), [], {})
        for index, labels in (([5, 6, 7], [2, 0, 2]), ([1, 2], [0, 2]))
    )
    sources = [SimpleNamespace(load=lambda i, first=first: Image.new("L", (2, 2), first + i)) for first in (100, 200)]
    found, similarities = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0.99, 0.5], [0.25, 0.125]])
    plots.plot_neighbours(train, val, sources, np.array([1, 0]), found, similarities, tmp_path / "x.png")
    shown = [(axes.get_title(), axes.title.get_color(), axes.images[0].get_array()[0, 0]) for axes in figures[0].axes]
    green, red = "tab:green", "tab:red"
    assert shown[:3] == [("class 2", "black", 202), ("2: 0.99", green, 105), ("0: 0.50", red, 106)]
    assert shown[3:] == [("class 0", "black", 201), ("2: 0.25", red, 107), ("0: 0.12", green, 106)]


def test_labels_of_noise_are_not_learned(tmp_path, monkeypatch):
    """Held-out accuracy stays at chance. The winner, retrained on all images, has memorised them."""
    monkeypatch.setattr(report, "plot_linear_probe", lambda result, path: None)
    rng = np.random.RandomState(0)
    train = write_export(tmp_path / "train", rng.randint(0, 3, 200), {"token": rng.randn(200, 256)})
    settings = {"learning_rates": [0.1, 1.0], "epochs": 40, "select": 0.25, "output": str(tmp_path / "out")}
    (result,) = probe(LinearProbeConfig(train, train, **settings))["results"]
    assert result["top1"] == 100
    assert max(cell["top1"] for cell in result["grid"]) < 50


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"weights_sha256": "1"}, "cannot be compared: weights_sha256 is 0 in one, 1 in the other"),
        ({"preprocessing": {"mean": [0.4]}}, "cannot be compared: preprocessing is"),
        ({"l2": True}, "cannot be compared: l2 is False in one, True in the other"),
        ({}, "val has images without a label, first 1.png; export folders"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "judged", [lambda *paths: knn(KnnConfig(*paths)), lambda *paths: probe(LinearProbeConfig(*paths))]
)
def test_exports_that_do_not_belong_together_are_refused(tmp_path, about, message, judged):
    train = write_export(tmp_path / "train", [0, 1, 2], {"token": [1, 2, 3]})
    val = write_export(tmp_path / "val", [0, 1 if about else -1, 2], {"token": [1, 2, 3]}, **about)
    with pytest.raises(DataError, match=message):
        judged(train, val)


def test_classes_that_no_image_has_need_no_match_and_names_of_several_have_none(tmp_path, classify):
    columns = {"token": at(10, 30, 32), "avg": at(10, 30, 32)}
    write_export(tmp_path / "more", [0, 1, 1], columns, classes="abcx")
    assert classify(val="more", k=[1]) == [100]
    write_export(tmp_path / "twice", [0, 1, 2], columns, classes="aba")
    assert classify(train="twice", val="twice", k=[1]) == [100]
    with pytest.raises(
        DataError, match="val has classes that twice lacks, and names shared by several classes cannot be"
    ):
        classify(train="twice")
