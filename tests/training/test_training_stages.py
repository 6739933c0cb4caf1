"""Recipes in stages: each configuration starts from the folder that the one before it has written."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from image_tree import write_image_tree
from safetensors.torch import load_file
from whole_runs import log, one_thread  # noqa: F401  (the fixture)

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigError, ConfigParser
from vim.console.progress import Progress
from vim.timm_models.accelerator import create_accelerator
from vim.training import TrainConfig, train
from vim.training.classification import Classification

os.environ["ACCELERATE_USE_CPU"] = "true"
CONFIGS = Path(__file__).parents[2] / "configs"
PATCH = 4
# For each recipe: its configurations with smaller images, and arguments that make its model tiny.
RECIPES = {
    "mambar_base": (
        {"mambar_base_in1k_stage1": 16, "mambar_base_in1k_stage2": 28, "mambar_base_in1k_stage3": 28},
        {"num_registers": 3, "register_dim": 4},
    ),
    "adventurer_base": (
        {"adventurer_base_in1k_stage1": 16, "adventurer_base_in1k_stage2": 28},
        {"d_state": 8, "head_dim": 8},
    ),
    "videomamba_tiny": ({"videomamba_tiny_in1k": 16, "videomamba_tiny_448_ft": 32}, {}),
}
CLASS_ENTRIES = {"mambar_base": 0, "adventurer_base": 1, "videomamba_tiny": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    counts = {"train": 48, "val": 6}
    return write_image_tree(tmp_path_factory.mktemp("run") / "images", counts, classes=3, size=32, mode="RGB")


def stage(tree, name, size, kwargs):
    """The configuration of the file, with a tiny model and small images for one epoch."""
    changes = {
        "data.root": tree,
        "data.img_size": size,
        "data.batch_size": 8,
        "data.num_workers": 0,
        "schedule.epochs": 1,
        "schedule.warmup_epochs": 0,
        **{f"model.kwargs.{key}": value for key, value in kwargs.items()},
    }
    options = [str(word) for key, value in changes.items() for word in (f"--{key}", value)]
    return ConfigParser(TrainConfig, "").parse_config(["--config", str(CONFIGS / f"{name}.yaml"), *options])[0]


def initial_model(config):
    return Classification(config, create_accelerator(config.precision), Progress(False)).state.model


def resampled(table, edge, entries):
    """A position table for edge x edge patches, by torch alone."""
    own = round((table.shape[1] - entries) ** 0.5)
    patches = table[:, entries:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
    larger = F.interpolate(patches, (edge, edge), mode="bicubic", antialias=True)
    return torch.cat([table[:, :entries], larger.flatten(2).mT], 1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_stages_run_one_after_the_other(tree, tmp_path, monkeypatch, recipe):
    stages, kwargs = RECIPES[recipe]
    kwargs = {"patch_size": PATCH, "embed_dim": 16, "depth": 2} | kwargs
    monkeypatch.chdir(tmp_path)  # the files name their run folders relative to it
    before = None
    for name, size in stages.items():
        config = stage(tree, name, size, kwargs)
        if before is not None:
            weights = initial_model(config).state_dict()
            trained = load_file(before / "model.safetensors")
            table = resampled(trained.pop("pos_embed"), size // PATCH, CLASS_ENTRIES[recipe])
            torch.testing.assert_close(weights.pop("pos_embed"), table, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(weights, trained, atol=0, rtol=0)
            if config.ema.decay:
                average = load_file(before / "ema" / "model.safetensors")
                assert not torch.equal(weights["head.weight"], average["head.weight"])
        train(config)
        before = tmp_path / config.run_dir
        assert [record["epoch"] for record in log(before)] == [1]
        assert json.loads((before / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, size, size]
    assert timm.create_model(f"local-dir:{before}", pretrained=True).num_classes == 3


def test_registers_move_with_the_size(tree, tmp_path, monkeypatch):
    """16 patches: 4 before each of three registers. 49 patches: 12 before each, and 13 after the last."""
    monkeypatch.chdir(tmp_path)
    kwargs = {"patch_size": PATCH, "embed_dim": 16, "depth": 1, "num_registers": 3, "register_dim": 4}
    for size, places in ((16, [4, 9, 14]), (28, [12, 25, 38])):
        model = initial_model(stage(tree, "mambar_base_in1k_stage1", size, kwargs)).eval()
        sequences = []
        model.blocks[0].register_forward_pre_hook(lambda _, inputs, kept=sequences: kept.append(inputs[0]))
        model(torch.zeros(1, 3, size, size))
        registers = (model.cls_token + model.pos_embed_cls)[0]
        same = (sequences[0][0][:, None] == registers).all(2)
        assert same.nonzero().tolist() == [[place, number] for number, place in enumerate(places)]


def test_a_stage_without_the_one_before_it_says_what_is_missing(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = stage(tree, "mambar_base_in1k_stage2", 28, {"embed_dim": 16, "depth": 1})
    with pytest.raises(ConfigError, match=r"no file runs/mambar_base_in1k_stage1/model\.safetensors to load weights"):
        train(config)
    assert not Path(config.run_dir).exists()
