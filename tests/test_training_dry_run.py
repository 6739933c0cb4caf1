"""Trying a run out: a few updates that leave nothing behind, and the speed of its loader."""

import os

import pytest
from image_tree import write_image_tree
from PIL import Image
from whole_runs import one_thread  # noqa: F401  (the fixture)

from vim.data import AugmentConfig, DataConfig, DataError, ImageFolder
from vim.data.synthetic import write_jpegs
from vim.training import ConfigError, TrainConfig
from vim.training.config import ModelConfig
from vim.training.dry_run import dry_run, find_batch_size
from vim.training.loader_speed import loader_speed

os.environ["ACCELERATE_USE_CPU"] = "true"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path):
    write_image_tree(tmp_path / "images", {"train": 20, "val": 4})
    kwargs = {"img_size": 12, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig("vit_tiny_patch16_224", kwargs=kwargs),
        data=DataConfig(str(tmp_path / "images"), batch_size=4, num_workers=0),
        augment=AugmentConfig(mixup=0.2),
    )


def test_a_dry_run_crosses_epochs_and_leaves_nothing(config, tmp_path, capsys):
    report = dry_run(config, 12)  # and one to warm up, of five in an epoch
    assert report["images_per_second"] > 0
    assert 0 <= report["data_wait"] < 1
    assert report["loss"] == pytest.approx(0.7, abs=0.5)
    assert "12 updates: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    with pytest.raises(ConfigError, match="--steps must be at least 1, got 0"):
        dry_run(config, 0)


def test_the_largest_batch_needs_a_gpu(config):
    with pytest.raises(ConfigError, match="needs one process with a GPU"):
        find_batch_size(config)


def test_loader_speed_counts_images(config):
    assert loader_speed(config, 0, 0.1) > 100


def test_made_up_photographs(tmp_path):
    write_jpegs(tmp_path / "jpegs", classes=3, images=6)
    folder = ImageFolder(tmp_path / "jpegs", "train")
    assert (len(folder), folder.classes) == (6, ["class0000", "class0001", "class0002"])
    assert Image.open(folder.name(0)).size == (500, 375)
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        write_jpegs(tmp_path / name, 1, 1, seed)
    one, two, three = (
        [ImageFolder(tmp_path / name, split).load(0)[0].tobytes() for split in ("train", "val")]
        for name in ("one", "two", "three")
    )
    assert one == two
    assert len({*one, *three}) == 4
    with pytest.raises(DataError, match="exists; remove it"):
        write_jpegs(tmp_path / "jpegs", 3, 6)
    with pytest.raises(DataError, match="6 images are too few for 7 classes"):
        write_jpegs(tmp_path / "other", 7, 6)
