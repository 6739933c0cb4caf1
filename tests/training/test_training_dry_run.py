"""Dry runs: a few updates that leave nothing on disk, and the speed of the dataloader."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from image_tree import write_image_tree
from PIL import Image
from whole_runs import one_thread  # noqa: F401  (the fixture)

from vim.console import ConfigError
from vim.data import AugmentConfig, DataConfig, DataError, ImageFolder, TrainImages
from vim.data.synthetic import write_jpegs
from vim.experiments import loader_speed as loader_speed_module
from vim.experiments.loader_speed import loader_speed
from vim.timm_models.config import ModelConfig
from vim.training import Classification, TrainConfig, trainer
from vim.training import dry_run as dry_run_module
from vim.training.dry_run import dry_run, find_batch_size

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
    report = dry_run(config, 12)  # and one warm-up update; an epoch has five
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


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("of memory"), DataError("an update takes 16 images")])
def test_the_largest_batch_is_the_last_that_fits(config, monkeypatch, error):
    """Without a GPU: the dry run is replaced by one that only runs out of memory."""
    tried, most = [], [8]

    def trial(config, steps, task):
        tried.append(config.data.batch_size)
        if tried[-1] > most[0]:
            raise error

    module = dry_run_module
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    monkeypatch.setattr(module, "Accelerator", lambda: gpu)
    monkeypatch.setattr(module, "dry_run", trial)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    assert find_batch_size(config) == 8
    assert (tried, config.data.batch_size) == ([2, 4, 8, 16], 4)
    most[0] = 1
    with pytest.raises(ConfigError, match=r"not even data\.batch_size 2 fits"):
        find_batch_size(config)


@pytest.fixture
def clock(monkeypatch):
    """A fake clock: loading a batch takes 1 s, the first one 10 s, a training step 2 s."""
    clock = SimpleNamespace(now=0.0, batches=0)
    collate, batch_loss = TrainImages.collate, Classification.batch_loss

    def slow_batch(self, samples):
        clock.now += 1 if clock.batches else 10
        clock.batches += 1
        return collate(self, samples)

    def slow_step(self, batch):
        clock.now += 2
        return batch_loss(self, batch)

    monkeypatch.setattr(TrainImages, "collate", slow_batch)
    monkeypatch.setattr(Classification, "batch_loss", slow_step)
    for module in (dry_run_module, loader_speed_module, trainer):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_a_dry_run_times_what_comes_after_its_first_update(config, clock):
    """Twelve updates of two steps: two epochs and part of a third."""
    report = dry_run(replace(config, accumulate=2), 12)
    assert report["images_per_second"] == pytest.approx(12 * 8 / (12 * 2 * (1 + 2)))
    assert report["data_wait"] == pytest.approx(1 / 3)
    assert report["first_update_seconds"] == 10 + 1 + 1 + 2 * 2  # the dataloader loads one batch ahead


@pytest.mark.parametrize("seconds", [20, 80])
def test_loader_speed_counts_images_after_the_first_batch(config, clock, seconds):
    assert loader_speed(config, 0, seconds) == pytest.approx(4, rel=5 / seconds)
    assert seconds <= clock.batches <= seconds + 10


def test_loader_speed_uses_the_given_workers_and_the_full_size(config, monkeypatch):
    loaders, set_up = [], Classification.__init__
    config.data.progressive = [(8, 1)]

    def noted(self, *args):
        set_up(self, *args)
        loaders.append((self.train_batches.num_workers, self.config.data.early_sizes))

    monkeypatch.setattr(Classification, "__init__", noted)
    for workers in (0, 2):
        assert loader_speed(config, workers, 1e-9) > 0
    assert loaders == [(0, []), (2, [])]
    assert (config.data.num_workers, config.data.progressive) == (0, [(8, 1)])


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
