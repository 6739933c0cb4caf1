"""Nearest neighbours and linear probe against scikit-learn, and their runs over exports."""

import json

import numpy as np
import pytest
import torch
from image_tree import write_image_tree
from safetensors.torch import save_file

import vim  # noqa: F401 (registers the vim_* models)
import vim.features.judge as judge
from vim.data import DataError
from vim.features import FeaturesConfig, KnnConfig, LinearProbeConfig, export_features, knn, probe
from vim.training import ConfigError

pytest.importorskip("pyarrow")
sklearn = pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits():
    """Real handwritten digits: 1,200 to learn from, 597 to classify, 64 pixels each."""
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


def test_few_shots_are_of_each_class_and_repeatable():
    labels = np.array([0, 1, 1, 0, 2, 1, 0, 0])
    rows = judge.few_shot(labels, 2, seed=3)
    assert sorted(labels[rows]) == [0, 0, 1, 1, 2]
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


KWARGS = {"img_size": 12, "patch_size": 4, "in_chans": 1, "depth": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Folder with the exports train and val, of both blocks, and plain, of the last features."""
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
    config = KnnConfig(str(exports / "train"), str(exports / "val"), k=[3, 20], shots=[2], output=str(tmp_path / "out"))
    report = knn(config)
    assert report["column"] == "block0.token"
    rows = [(row["shots"], row["draw"], row["k"]) for row in report["results"]]
    assert rows == [(None, 0, 3), (None, 0, 20), (2, 0, 3), (2, 1, 3), (2, 2, 3)]  # 6 images have no 20 neighbours
    assert report["results"][0]["top1"] > 90  # the classes differ in the corner that is bright
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
    # Without a look at val: the training images in its place leave the choice as it is.
    swapped = LinearProbeConfig(str(exports / "train"), str(exports / "train"), output=str(tmp_path / "b"), **settings)
    again = probe(swapped)["results"][0]
    assert (again["inputs"], again["lr"], again["grid"]) == (result["inputs"], result["lr"], result["grid"])


def test_clear_errors(exports, tmp_path):
    train, val, plain = (str(exports / name) for name in ("train", "val", "plain"))
    with pytest.raises(ConfigError, match=r"no column 'block1.tokn'; did you mean 'block1.token'"):
        knn(KnnConfig(train, val, column="block1.tokn"))
    with pytest.raises(DataError, match="cannot be compared: columns is"):
        knn(KnnConfig(train, plain))
    with pytest.raises(ConfigError, match=r"k \[100\] are more than the 48 images"):
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
