"""Nearest neighbours and linear probe against scikit-learn, and their runs on exports."""

import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tree import write_image_tree
from safetensors.torch import save_file

import vim  # (registers the models)
import vim.features
import vim.features.judge as judge
import vim.features.unfinished as unfinished
from vim.checkpoint import load_checkpoint, save_checkpoint
from vim.console import ConfigError, InterruptedRunError, RunError
from vim.data import DataError
from vim.features import FeaturesConfig, KnnConfig, LinearProbeConfig, export_features, knn, probe

pytest.importorskip("pyarrow")
sklearn = pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits():
    """Handwritten digits of 64 pixels: 1,200 to train on, 597 to classify."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x), torch.from_numpy(y).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]]


@pytest.mark.parametrize("k", [1, 10, 200])
def test_equal_votes_are_those_of_scikit_learn(digits, monkeypatch, k):
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(judge, "CHUNK", 100)
    x, y, queries, _ = digits
    similarities, found = judge.nearest(x, queries, 200)
    scores = judge.knn_scores(similarities, y[found], 10, k, None)
    want = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(x.numpy(), y.numpy())
    assert np.array_equal(scores.argmax(1).numpy(), want.predict(queries.numpy()))
    assert np.allclose(scores.numpy() / k, want.predict_proba(queries.numpy()))


def test_weighted_votes_by_hand():
    similarities = torch.tensor([[0.9, 0.8, 0.7, 0.1]], dtype=torch.float64)
    scores = judge.knn_scores(similarities, torch.tensor([[2, 0, 0, 1]]), 4, 3, 0.07)
    weights = np.exp(np.array([0.9, 0.8, 0.7]) / 0.07)
    want = np.array([weights[1] + weights[2], 0, weights[0], 0])
    assert np.allclose(scores[0] / scores.sum(), want / want.sum())
    assert judge.accuracy(scores, torch.tensor([2])) == {"top1": 100.0, "top5": 100.0}


def test_of_equal_scores_the_first_class_is_the_higher():
    scores = torch.zeros(4, 9)
    scores[3, 8] = 1
    found = judge.accuracy(scores, torch.tensor([0, 4, 5, 8]))
    assert found == {"top1": 50.0, "top5": 75.0}


def test_few_shots_are_of_each_class_and_repeatable():
    labels = np.array([0, 1, 1, 0, 3, 1, 0, 0])
    rows = judge.few_shot(labels, 2, seed=3)
    assert sorted(labels[rows]) == [0, 0, 1, 1, 3]
    assert np.array_equal(rows, judge.few_shot(labels, 2, seed=3))
    assert not np.array_equal(rows, judge.few_shot(labels, 2, seed=4))


def test_the_probe_is_as_good_as_logistic_regression(digits):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y, queries, labels = digits
    scaler = StandardScaler().fit(x.numpy())
    want = LogisticRegression(max_iter=1000).fit(scaler.transform(x.numpy()), y.numpy())
    want = 100 * want.score(scaler.transform(queries.numpy()), labels.numpy())
    found = judge.linear_probe(
        {"pixels": x.float()},
        y,
        {"pixels": queries.float()},
        10,
        learning_rates=[0.1, 1.0],
        epochs=100,
        batch_size=256,
        seed=0,
    )
    tops = {p.lr: judge.accuracy(logits, labels)["top1"] for p, logits in found.items()}
    assert abs(tops[1.0] - want) <= 0.5, (tops, want)


def test_where_training_ends_is_the_optimum_of_logistic_regression(digits):
    """Only the training images standardise: held-out images have another distribution. One feature is constant up to
    rounding."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, queries, _ = (part[:150] for part in digits)
    x, queries = x[:, 20:25], 0.5 * queries[:, 20:25] + 1
    want = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=10_000)).fit(x.numpy(), y.numpy())
    rounded = torch.where(torch.arange(150) == 7, torch.tensor(0.1), torch.tensor(0.1).nextafter(torch.tensor(1.0)))
    x, queries = (torch.column_stack((part, more)).float() for part, more in ((x, rounded), (queries, 2 * rounded)))
    options = {"learning_rates": [3.0], "epochs": 300, "batch_size": 256, "seed": 0}
    (logits,) = judge.linear_probe({"": x}, y, {"": queries}, 10, **options).values()
    assert np.abs(logits.softmax(1).numpy() - want.predict_proba(queries[:, :5].numpy())).max() < 1e-4


def test_the_learning_rate_is_for_256_images_and_falls_to_zero_by_a_cosine(digits):
    x, y = digits[0][:50].float(), digits[1][:50]
    rates = []
    judge.linear_probe(
        *({"": x}, y, {"": x}, 10),
        learning_rates=[0.5],
        epochs=2,
        batch_size=20,
        seed=0,
        after_update=lambda state: rates.append(state()["optimizer"]["param_groups"][0]["lr"]),
    )
    assert np.allclose(rates, 0.5 * 20 / 256 * (1 + np.cos(np.pi * np.arange(1, 7) / 6)) / 2)


def test_each_epoch_and_each_seed_has_an_order_and_weights_of_its_own(digits, monkeypatch):
    x, y = digits[0][:50].float(), digits[1][:50]
    orders, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kw: orders.append(randperm(*args, **kw)) or orders[-1])
    options = {"learning_rates": [1e-9], "epochs": 2, "batch_size": 20}  # so small that the first weights stay
    logits = [
        judge.linear_probe({"": x}, y, {"": x}, 10, seed=seed, **options)[judge.Probe("", 1e-9)] for seed in (0, 1, 0)
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(logits[0], logits[2])
    assert (logits[0] - logits[1]).abs().max() > 0.01


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("update", [1, 7, 8, 15])
def test_a_training_goes_on_to_the_same_bits_from_any_update(digits, tmp_path, update):
    x, y, queries, _ = digits
    train, held_out = ({"all": x.float(), "half": x[:, ::2].float()} for x in (x, queries))
    options = {"learning_rates": [0.01, 1.0], "epochs": 2, "batch_size": 160, "seed": 3}  # 8 updates an epoch
    whole = judge.linear_probe(train, y, held_out, 10, **options)
    seen = 0

    def stop(state):
        nonlocal seen
        seen += 1
        if seen == update:
            save_checkpoint(state(), tmp_path / "state.pt")
            raise Killed

    with pytest.raises(Killed):
        judge.linear_probe(train, y, held_out, 10, after_update=stop, **options)
    torch.manual_seed(99)  # earlier random numbers of the process must not matter
    rest = judge.linear_probe(train, y, held_out, 10, saved=load_checkpoint(tmp_path / "state.pt"), **options)
    assert whole.keys() == rest.keys()
    for which in whole:
        assert torch.equal(whole[which], rest[which]), which


def test_a_classifier_that_diverges_leaves_the_others_alone(digits):
    x, y, queries, _ = digits
    train, held_out = {"pixels": x.float()}, {"pixels": queries.float()}
    options = {"epochs": 3, "batch_size": 256, "seed": 0}
    alone = judge.linear_probe(train, y, held_out, 10, learning_rates=[0.1], **options)
    beside = judge.linear_probe(train, y, held_out, 10, learning_rates=[0.1, 1e38], **options)
    assert not beside[judge.Probe("pixels", 1e38)].isfinite().all()
    assert torch.equal(alone[judge.Probe("pixels", 0.1)], beside[judge.Probe("pixels", 0.1)])


KWARGS = {"img_size": 12, "patch_size": 4, "in_chans": 1, "depth": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Folder with the exports train and val of both blocks, and plain of the final features."""
    import timm

    path = tmp_path_factory.mktemp("judge")
    write_image_tree(path / "images", {"train": 48, "val": 15}, classes=3)
    torch.manual_seed(0)
    save_file(timm.create_model("vim_nano", **KWARGS).state_dict(), path / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for name, blocks in {"train": [0, 1], "val": [0, 1], "plain": None}.items():
            export_features(
                FeaturesConfig(
                    "vim_nano",
                    str(path / "weights.safetensors"),
                    KWARGS,
                    images=str(path / "images" / name.replace("plain", "val")),
                    output=str(path / name),
                    pools=["token", "avg"],
                    blocks=blocks,
                    num_workers=0,
                )
            )
    return path


def test_knn_over_exports(exports, tmp_path):
    pytest.importorskip("matplotlib")
    config = KnnConfig(str(exports / "train"), str(exports / "val"), k=[20, 3], shots=[2], output=str(tmp_path / "out"))
    report = knn(config)
    assert report["column"] == "block0.token"
    rows = [(row["shots"], row["draw"], row["k"]) for row in report["results"]]
    assert rows == [(None, 0, 20), (None, 0, 3), (2, 0, 3), (2, 1, 3), (2, 2, 3)]  # 6 images have no 20 neighbours
    assert report["results"][1]["top1"] > 90  # the classes differ in the corner that is bright
    assert json.loads((tmp_path / "out" / "knn.json").read_text()) == report
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"knn.json", "knn.png", "neighbours.png", "projection.png"}


def test_the_probe_chooses_without_the_images_it_reports_on(exports, tmp_path):
    pytest.importorskip("matplotlib")
    settings = {"learning_rates": [1e-5, 0.1], "epochs": 20, "batch_size": 16, "select": 0.25, "last_blocks": [1, 9]}
    given = LinearProbeConfig(str(exports / "train"), str(exports / "val"), output=str(tmp_path / "out"), **settings)
    report = probe(given)
    (result,) = report["results"]
    assert list(report["inputs"]) == [
        "1 block, token",
        "2 blocks, token",
        "1 block, token+avg",
        "2 blocks, token+avg",
    ]
    assert report["inputs"]["2 blocks, token+avg"] == ["block0.token", "block0.avg", "block1.token", "block1.avg"]
    assert len(result["grid"]) == 8
    assert result["lr"] == 0.1
    assert result["top1"] > 90
    assert (tmp_path / "out" / "linear_probe.png").is_file()
    # val does not influence the choice: with the training images in its place, the choice is the same.
    swapped = LinearProbeConfig(str(exports / "train"), str(exports / "train"), output=str(tmp_path / "b"), **settings)
    again = probe(swapped)["results"][0]
    assert (again["inputs"], again["lr"], again["grid"]) == (result["inputs"], result["lr"], result["grid"])


SHORT = {"learning_rates": [1e-3, 0.1], "epochs": 4, "batch_size": 16, "select": 0.25, "shots": [2], "draws": 1}


def short(exports, output, **changes):
    """A probe of 32 updates: 3 x 4 for the grid, 3 x 4 for the winner, and 1 x 4 for each with 2 images per class."""
    return LinearProbeConfig(str(exports / "train"), str(exports / "val"), output=str(output), **SHORT | changes)


@pytest.fixture(scope="module")
def whole(exports, tmp_path_factory):
    """Results of an uninterrupted probe."""
    return probe(short(exports, tmp_path_factory.mktemp("whole")))["results"]


@pytest.fixture
def before_update(monkeypatch):
    """before_update(n, act): call act after update n (from 1, over all trainings), before it is saved."""

    def before_update(n, act):
        count, after_update = 0, unfinished.UnfinishedProbe._after_update

        def counted(self, state):
            nonlocal count
            count += state() is not None  # None: the end of a training
            if count == n:
                act()
            after_update(self, state)

        monkeypatch.setattr(unfinished.UnfinishedProbe, "_after_update", counted)

    return before_update


@pytest.mark.parametrize(
    ("update", "number"), [(1, signal.SIGTERM), (5, signal.SIGINT), *((n, signal.SIGTERM) for n in (12, 13, 26, 32))]
)
def test_a_stopped_probe_ends_with_the_results_of_one_left_alone(
    exports, whole, tmp_path, before_update, monkeypatch, update, number
):
    before_update(update, lambda: os.kill(os.getpid(), number))
    with pytest.raises(InterruptedRunError, match=f"^stopped by {number.name}; run it again to continue$") as stopped:
        probe(short(exports, tmp_path))
    assert stopped.value.exit_code == 128 + number
    assert [file.name for file in tmp_path.iterdir()] == ["unfinished.pt"]
    monkeypatch.undo()
    made = []
    linear_probe = unfinished.linear_probe
    monkeypatch.setattr(unfinished, "linear_probe", lambda *args, **kw: made.append(0) or linear_probe(*args, **kw))
    assert probe(short(exports, tmp_path))["results"] == whole
    assert len(made) == sum(update <= last for last in (12, 24, 28, 32))  # no training is done twice
    assert {file.name for file in tmp_path.iterdir()} == {"linear_probe.json", "linear_probe.png"}


@pytest.mark.parametrize("update", [2, 9, 14, 30])
def test_a_killed_probe_goes_on_from_what_it_saved_last(exports, whole, tmp_path, before_update, monkeypatch, update):
    def kill():
        raise Killed

    monkeypatch.setattr(unfinished, "SECONDS_BETWEEN_SAVES", 0)
    before_update(update, kill)
    with pytest.raises(Killed):
        probe(short(exports, tmp_path))
    monkeypatch.undo()
    assert (tmp_path / "unfinished.pt").is_file()
    assert probe(short(exports, tmp_path))["results"] == whole


def test_the_tool_ends_with_143_after_sigterm(exports, tmp_path, before_update, monkeypatch, capsys):
    before_update(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    tool = Path(__file__).parents[2] / "tools" / "linear_probe.py"
    args = ["--train", str(exports / "train"), "--val", str(exports / "val"), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [tool.name, *args])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(tool), run_name="__main__")
    assert exit_.value.code == 143
    assert capsys.readouterr().err == "error: stopped by SIGTERM; run it again to continue\n"


def test_a_damaged_file_begins_the_probe_anew_and_that_of_another_probe_is_refused(
    exports, whole, tmp_path, before_update, monkeypatch, capsys
):
    before_update(20, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedRunError):
        probe(short(exports, tmp_path))
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"unfinished probe with another epochs, another seed; choose another --output"):
        probe(short(exports, tmp_path, epochs=5, seed=1))
    with pytest.raises(RunError, match="with another val;"):
        probe(LinearProbeConfig(str(exports / "train"), str(exports / "train"), output=str(tmp_path), **SHORT))
    file = tmp_path / "unfinished.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    assert probe(short(exports, tmp_path))["results"] == whole
    out = capsys.readouterr().out
    assert f"warning: cannot load checkpoint {file}" in out
    assert "starting over" in out


def test_classifiers_that_diverge_are_named_and_never_chosen(exports, tmp_path, monkeypatch, capsys):
    report = probe(short(exports, tmp_path, learning_rates=[1e38, 0.1], pools=["avg"], last_blocks=[1]))
    for result in report["results"]:
        assert [cell["top1"] is None for cell in result["grid"]] == [True, False]
        assert result["lr"] == 0.1
    warning = "warning: 1 block, avg with learning rate 1e+38 diverged; excluded from the selection\n"
    assert capsys.readouterr().out.count(warning) == 2
    with pytest.raises(RunError, match=r"1 block, avg with .* 1e\+38 diverged, and no other is left; give smaller"):
        probe(short(exports, tmp_path, learning_rates=[1e38], pools=["avg"], last_blocks=[1]))

    def diverging_choice(*args, learning_rates, **options):
        found = judge.linear_probe(*args, learning_rates=learning_rates, **options)
        return {p: logits + torch.nan if len(learning_rates) == 1 else logits for p, logits in found.items()}

    monkeypatch.setattr(unfinished, "linear_probe", diverging_choice)
    with pytest.raises(RunError, match="diverged on all training images; leave that learning rate out"):
        probe(short(exports, tmp_path))


def test_clear_errors(exports, tmp_path):
    train, val, plain = (str(exports / name) for name in ("train", "val", "plain"))
    with pytest.raises(ConfigError, match=r"no column 'block1.tokn'; did you mean 'block1.token'"):
        knn(KnnConfig(train, val, column="block1.tokn"))
    with pytest.raises(DataError, match="cannot be compared: columns is"):
        knn(KnnConfig(train, plain))
    with pytest.raises(ConfigError, match=r"k must name a number up to 48, the images in .*, got \[100\]"):
        knn(KnnConfig(train, val, k=[100], output=str(tmp_path)))
    with pytest.raises(ConfigError, match="'map' was not exported, only token, avg"):
        probe(LinearProbeConfig(train, val, pools=["map"]))
    for config, wrong, message in [
        (KnnConfig, {"k": []}, "k must name"),
        (KnnConfig, {"temperature": 0.0}, "temperature must be positive"),
        (KnnConfig, {"shots": [0]}, "shots must be"),
        (LinearProbeConfig, {"select": 1.0}, "select must be"),
        (LinearProbeConfig, {"pools": []}, "pools must name"),
        (LinearProbeConfig, {"epochs": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(**wrong)


def export(exports, images, output, **changes):
    """An export with the fixture's model."""
    given = {"checkpoint": str(exports / "weights.safetensors"), "kwargs": KWARGS, "num_workers": 0, **changes}
    export_features(FeaturesConfig("vim_nano", images=str(images), output=output and str(output), **given))


@pytest.fixture
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.usefixtures("_on_the_cpu")
def test_classes_are_matched_by_name(exports, tmp_path):
    """val has no image of the first class, and other positions of the others in its list of classes."""
    for name in "bc":
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / name).symlink_to(exports / "images" / "val" / name)
    pools = {"pools": ["token", "avg"], "blocks": [0, 1]}
    export(exports, tmp_path / "val", tmp_path / "some", **pools)
    train, some = str(exports / "train"), str(tmp_path / "some")
    report = knn(KnnConfig(train, some, k=[3], sheet=0, projection=0, output=str(tmp_path / "knn")))
    assert report["results"][0]["top1"] > 90
    assert report["classes"] == 3
    assert vim.features.load(some).classes == ["b", "c"]
    short = {"learning_rates": [0.1], "epochs": 20, "batch_size": 16, "output": str(tmp_path / "probe")}
    assert probe(LinearProbeConfig(train, some, **short))["results"][0]["top1"] > 90
    with pytest.raises(DataError, match=r"train has classes that .*some lacks: 1 of 3 \(a\); export splits of the s"):
        knn(KnnConfig(some, train))


@pytest.mark.usefixtures("_on_the_cpu")
def test_numbers_are_the_names_of_classes_that_have_none(exports, tmp_path):
    for split in ("train", "val"):
        paths = sorted((exports / "images" / split).glob("*/*.png"))
        kept = [path for path in paths if split == "train" or path.parent.name != "a"]
        lines = "".join(f"{path}\t{'abc'.index(path.parent.name)}\n" for path in kept)
        (tmp_path / f"{split}.txt").write_text(lines)
        export(exports, tmp_path / f"{split}.txt", tmp_path / split, pools=["token"])
    train, val = str(tmp_path / "train"), str(tmp_path / "val")
    assert vim.features.load(val).classes == ["0", "1", "2"]
    report = knn(KnnConfig(train, val, k=[3], sheet=0, projection=0, output=str(tmp_path / "out")))
    assert report["results"][0]["top1"] > 90
    export(exports, exports / "images" / "val", tmp_path / "named", pools=["token"])
    with pytest.raises(DataError, match=r"named has classes that .*train lacks: 3 of 3 \(a, b, c\)"):
        knn(KnnConfig(train, str(tmp_path / "named")))


@pytest.mark.usefixtures("_on_the_cpu")
def test_the_defaults_of_export_knn_and_probe_fit_one_another(exports, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        export(exports, exports / "images" / split, None)
    assert [row["k"] for row in knn(KnnConfig())["results"]] == [10, 20]
    assert list(probe(LinearProbeConfig())["inputs"]) == ["last, token"]
    assert (tmp_path / "runs" / "knn" / "neighbours.png").is_file()
    with pytest.raises(ConfigError, match=r"--pools: 'avg' was not exported, only token; export it with --pools of"):
        probe(LinearProbeConfig(pools=["token+avg"], output="other"))


def test_images_that_are_others_now_are_not_shown(exports, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shutil.copytree(exports / "images" / "val", tmp_path / "val")
    for name in ("train", "val"):
        shutil.copytree(exports / name, tmp_path / f"of-{name}")
    manifest = json.loads((exports / "val" / "manifest.json").read_text()) | {"images": str(tmp_path / "val")}
    (tmp_path / "of-val" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "val" / "a" / "0.png").rename(tmp_path / "val" / "a" / "new.png")
    knn(KnnConfig(str(tmp_path / "of-train"), str(tmp_path / "of-val"), projection=0, output=str(tmp_path / "out")))
    assert f"no sheet of neighbours: {tmp_path}/val no longer holds the images that were exp" in capsys.readouterr().out
    assert not (tmp_path / "out" / "neighbours.png").exists()


def test_an_export_without_names_of_classes_is_read_but_not_judged(exports, tmp_path):
    shutil.copytree(exports / "val", tmp_path / "old")
    file = tmp_path / "old" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["classes"]
    file.write_text(json.dumps(manifest))
    assert len(vim.features.load(tmp_path / "old")) == 15
    with pytest.raises(DataError, match=r"val are by an earlier version and have no class names; export them again"):
        knn(KnnConfig(str(exports / "train"), str(tmp_path / "old")))


@pytest.mark.parametrize("tool", ["knn", "linear_probe"])
def test_paths_are_no_markup(exports, tmp_path, monkeypatch, capsys, tool):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[b]:x:").symlink_to(exports / "val")
    options = {"knn": ["--sheet", "0", "--projection", "0"], "linear_probe": ["--epochs", "1", "--pools", "[avg]"]}
    path = Path(__file__).parents[2] / "tools" / f"{tool}.py"
    monkeypatch.setattr(sys, "argv", [tool, "--train", str(exports / "train"), "--val", "[b]:x:", *options[tool]])
    runpy.run_path(str(path), run_name="__main__")
    assert "[b]:x:" in capsys.readouterr().out
