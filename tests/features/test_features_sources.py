"""Features of images in Parquet shards: those of the same images in a folder tree."""

import numpy as np
import pytest
import timm
import torch
from image_shards import write_parquet
from image_tree import write_image_tree
from safetensors.torch import save_file

import vim.features
from vim.data import parquet_shards
from vim.features import FeaturesConfig, KnnConfig, export_features, knn

KWARGS = {"img_size": 12, "patch_size": 4, "in_chans": 1, "depth": 1, "num_classes": 3}


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """A folder with weights of a tiny Vim, and 11 images of three classes in a tree and in Parquet shards."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(parquet_shards, "shard_folder", lambda: tmp_path / "cache")
    write_image_tree(tmp_path / "images", {"val": 11}, classes=3, size=14)
    files = [
        (tmp_path / "images" / "val" / "abc"[i % 3] / f"{i}.png", i % 3) for i in (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8)
    ]
    write_parquet(files, list("abc"), tmp_path / "shards", {"val-0.parquet": 4, "val-1.parquet": 4, "val-2.parquet": 3})
    torch.manual_seed(0)
    save_file(timm.create_model("vim_nano", **KWARGS).state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


def export(setting, images, output, workers=0):
    return export_features(
        FeaturesConfig(
            "vim_nano",
            str(setting / "weights.safetensors"),
            KWARGS,
            images=str(setting / images),
            output=str(setting / output),
            format="npz",
            rows_per_shard=3,
            batch_size=2,
            num_workers=workers,
        )
    )


def test_an_export_from_parquet_is_that_of_the_tree_and_goes_on(setting, monkeypatch):
    opened, open_shard = [], parquet_shards.ShardCache.open
    monkeypatch.setattr(
        parquet_shards.ShardCache, "open", lambda *args: opened.append(args[1][:5]) or open_shard(*args)
    )
    assert export(setting, "shards", "out")["made_now"] == 4
    assert opened == ["val-0", "val-1", "val-2"]
    export(setting, "images/val", "tree")
    got, want = (vim.features.load(setting / name) for name in ("out", "tree"))
    assert np.array_equal(got["token"], want["token"])
    assert got.labels.tolist() == want.labels.tolist()
    assert got.classes == want.classes == ["a", "b", "c"]
    assert got.paths == [f"val-{shard}.parquet/{row}" for shard, rows in enumerate((4, 4, 3)) for row in range(rows)]

    before = {file.name: file.read_bytes() for file in (setting / "out").iterdir()}
    (setting / "out" / "features-00001.npz").unlink()
    assert export(setting, "shards", "out", workers=2)["made_now"] == 1
    assert {file.name: file.read_bytes() for file in (setting / "out").iterdir()} == before


def test_an_export_of_a_pattern_has_a_plain_name():
    assert FeaturesConfig(images="hf://datasets/org/name/data/train-*.parquet").output == "runs/features_train"
    assert FeaturesConfig(images="images/val-1").output == "runs/features_val-1"


def test_neighbours_are_shown_from_parquet(setting):
    export(setting, "shards", "out")
    out = str(setting / "out")
    knn(KnnConfig(out, out, k=[1], sheet=1, projection=0, output=str(setting / "knn")))
    assert (setting / "knn" / "neighbours.png").exists()
