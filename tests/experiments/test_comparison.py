"""Comparisons: the learning rate is chosen on one split, the result is measured on another."""

import json
import os
import threading
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from image_tree import write_image_tree
from option_effects import Seen
from whole_runs import one_thread  # noqa: F401  (the fixture)

from vim.console import ConfigError, RunError
from vim.experiments import comparison
from vim.experiments.comparison import CompareConfig, compare
from vim.experiments.plots import plot_comparison
from vim.training import Classification

os.environ["ACCELERATE_USE_CPU"] = "true"
pytestmark = pytest.mark.usefixtures("one_thread")
sees = Seen()

SIZE = {"img_size": 12, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1}
BASE = {
    "model": {"name": "vit_tiny_patch16_224", "kwargs": SIZE | {"num_heads": 2}},
    "data": {"val_split": "choose", "batch_size": 16, "num_workers": 0, "crop_pct": 1.0, "mean": [0.3], "std": [0.2]},
    "augment": {"scale": [1, 1], "ratio": [1, 1], "hflip": 0.0},
    "schedule": {"epochs": 6, "warmup_epochs": 0, "min_lr": 0.0},
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A comparison of two models in this process; lists of the functions called and of their log names."""
    write_image_tree(tmp_path / "images", {"train": 66, "choose": 15, "test": 9}, classes=3)
    base = BASE | {"data": BASE["data"] | {"root": str(tmp_path / "images")}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "derived.yaml").write_text("base: recipe.yaml\n")
    calls, logs = [], set()

    def here(function, argument, log):
        calls.append(function.__name__)
        logs.add(log.name)
        function(argument)

    monkeypatch.setattr(comparison, "_in_a_process", here)
    contenders = {"vit": {}, "vim": {"model.name": "vim_nano", "model.kwargs": SIZE}}
    return (
        CompareConfig(
            train=str(tmp_path / "derived.yaml"),
            contenders=contenders,
            lrs=[1e-9, 1e-2],
            seeds=[0, 1],
            output=str(tmp_path / "out"),
        ),
        calls,
        logs,
    )


def test_every_field_has_a_test_that_sees_its_effect():
    assert {(CompareConfig, f.name) for f in fields(CompareConfig)} == sees


@sees(CompareConfig, "train", "contenders", "test_split", "output")
def test_the_rate_is_chosen_on_validation_and_the_result_is_on_test(config, tmp_path):
    config, calls, logs = config
    report = compare(config)
    assert (calls.count("_train"), calls.count("validate")) == (2 * (2 + 1), 2 * 2)  # one of seed 0 exists
    assert logs == {"lr1e-09-seed0.txt", "lr0.01-seed0.txt", "lr0.01-seed1.txt"}
    for name, result in report["contenders"].items():
        assert result["lr"] == 1e-2  # the other one changes nothing
        assert result["choosing"]["0.01"] > result["choosing"]["1e-09"]
        for seed, top1 in zip(config.seeds, result["test"], strict=True):
            folder = tmp_path / "out" / name / f"lr0.01-seed{seed}"
            run = yaml.safe_load((folder / "config.yaml").read_text())
            assert (run["seed"], run["optim"]["lr"]) == (seed, 1e-2)
            tested = json.loads((folder / "test.json").read_text())
            assert (tested["images"], tested["top1"]) == (9, top1)
            assert tested["split"].endswith("test")
        assert result["mean"] == pytest.approx(sum(result["test"]) / 2)
    assert report["contenders"]["vim"]["parameters"] != report["contenders"]["vit"]["parameters"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == report
    assert (tmp_path / "out" / "comparison.png").exists()

    calls.clear()
    assert compare(config) == report
    assert not calls  # nothing is repeated


REACHED = {"a": {0.1: 50.0, 0.2: 70.0, 0.4: 60.0}, "b": {0.1: 9.0, 0.2: 5.0, 0.4: 8.0}}
TESTED = {"a": {3: 10.0, 5: 14.0, 7: 15.0}, "b": {3: 90.0, 5: 90.0, 7: 60.0}}


@sees(CompareConfig, "lrs", "seeds", "jobs")
@pytest.mark.parametrize("jobs", [1, 2])
def test_the_first_seed_chooses_and_jobs_run_in_parallel(tmp_path, monkeypatch, jobs):
    """With fake runs that only report a result."""
    trained, running, at_once, lock = [], set(), [], threading.Lock()
    together = threading.Barrier(jobs)

    def told(function, argument, log):
        if function.__name__ == "validate":
            folder = Path(argument.model)
            top1 = TESTED[folder.parent.name][int(folder.name.rpartition("-seed")[2])]
            Path(argument.output).write_text(json.dumps({"top1": top1}))
            return
        given = dict(zip(argument[::2], argument[1::2], strict=True))
        folder, lr, seed = Path(given["--run_dir"]), float(given["--optim.lr"]), int(given["--seed"])
        with lock:
            trained.append((folder.parent.name, lr, seed))
            running.add(folder)
            at_once.append(len(running))
        together.wait(20)
        with lock:
            running.remove(folder)
        folder.mkdir(parents=True)
        loading = {"batch_size": 1, "num_workers": 0, "bad_images": "raise", "cache_gib": 1.0}
        (folder / "config.yaml").write_text(yaml.safe_dump({"data": loading | {"root": "images"}}))
        summary = {"top1": REACHED[folder.parent.name][lr], "parameters": 7, "train_seconds": 2.0}
        (folder / "summary.json").write_text(json.dumps(summary | {"device": "cpu", "versions": {}}))

    monkeypatch.setattr(comparison, "_in_a_process", told)
    monkeypatch.setattr(comparison, "plot_comparison", lambda *_: "no plot")
    (tmp_path / "base.yaml").write_text("data: {val_split: choose}")
    about = {"train": str(tmp_path / "base.yaml"), "output": str(tmp_path / "out"), "contenders": {"a": {}, "b": {}}}
    report = compare(CompareConfig(**about, lrs=[0.1, 0.2, 0.4], seeds=[3, 5, 7], jobs=jobs))["contenders"]
    grid = [(name, lr, 3) for name in "ab" for lr in (0.1, 0.2, 0.4)]
    assert sorted(trained) == sorted([*grid, ("a", 0.2, 5), ("a", 0.2, 7), ("b", 0.1, 5), ("b", 0.1, 7)])
    assert max(at_once) == jobs
    for name, lr, mean, variance in (("a", 0.2, 13, 7), ("b", 0.1, 80, 300)):
        result = report[name]
        assert result["choosing"] == {f"{rate:g}": top1 for rate, top1 in REACHED[name].items()}
        assert (result["lr"], result["test"], result["mean"]) == (lr, list(TESTED[name].values()), mean)
        assert result["deviation"] ** 2 == pytest.approx(variance)


def test_the_plot_shows_rates_seeds_and_means(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot, hlines = [], Axes.plot, Axes.hlines
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **o: drawn.append(a[:2]) or plot(self, *a, **o))
    monkeypatch.setattr(Axes, "hlines", lambda self, y, *a, **o: drawn.append(y) or hlines(self, y, *a, **o))
    choosing = {name: {f"{rate:g}": top1 for rate, top1 in REACHED[name].items()} for name in "ab"}
    tests = {name: list(TESTED[name].values()) for name in "ab"}
    contenders = {
        name: {"choosing": choosing[name], "test": tests[name], "mean": mean} for name, mean in (("a", 13), ("b", 80))
    }
    assert plot_comparison({"contenders": contenders}, tmp_path / "c.png") == f"plot: {tmp_path / 'c.png'}"
    of_a, of_b = (([0.1, 0.2, 0.4], list(choosing[name].values())) for name in "ab")
    assert drawn == [of_a, ([0] * 3, tests["a"]), 13, of_b, ([1] * 3, tests["b"]), 80]
    assert (tmp_path / "c.png").exists()


def test_a_stopped_comparison_resumes_within_a_run(config, tmp_path, monkeypatch):
    config = config[0]
    config.contenders, config.lrs, config.seeds = {"vit": {}}, [1e-2], [1]
    batch_loss = Classification.batch_loss

    def cut(self, batch):
        if self.state.update == 5:
            raise RunError("cut")
        return batch_loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "batch_loss", cut)
        with pytest.raises(RunError, match="cut"):
            compare(config)
    result = compare(config)["contenders"]["vit"]
    assert len((tmp_path / "out" / "vit" / "lr0.01-seed1" / "starts.jsonl").read_text().splitlines()) == 2
    assert (result["mean"], result["deviation"]) == (result["test"][0], None)


def test_a_run_that_fails_says_where_to_look(tmp_path):
    log = tmp_path / "logs" / "run.txt"
    with pytest.raises(RunError, match=f"a run failed with exit code 1; see {log}"):
        comparison._in_a_process(comparison._train, ["--data.root", str(tmp_path / "nowhere")], log)
    assert "no data set folder" in log.read_text()


@pytest.mark.parametrize("change", [{"data.val_split": "test"}, {"data.train_split": "test"}])
def test_the_test_split_is_not_used_for_choosing(config, change):
    config, calls, _ = config
    config.contenders["vit"] = change
    with pytest.raises(ConfigError, match=rf"test_split 'test' is {next(iter(change))} of vit; a test split must not"):
        compare(config)
    assert not calls


def test_what_a_comparison_refuses():
    with pytest.raises(ConfigError, match="contenders, lrs and seeds must name at least one each"):
        CompareConfig()
    with pytest.raises(ConfigError, match=r"contenders.vit sets optim.lr, which the comparison sets itself"):
        CompareConfig(contenders={"vit": {"optim.lr": 1}})
