"""Every training configuration in configs/ parses, says what a reader needs, and holds the recipe it claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigParser
from vim.detection import DetectionTrainConfig
from vim.experiments.comparison import CompareConfig
from vim.training import TrainConfig

FOLDER = Path(__file__).parent.parent / "configs"
COMPARISONS = sorted(FOLDER.glob("compare_*.yaml"))
CONFIGS = sorted(set(FOLDER.glob("*.yaml")) - set(FOLDER.glob("benchmark*.yaml")) - set(COMPARISONS))


def load(path):
    kind = DetectionTrainConfig if path.stem.startswith("detection_") else TrainConfig
    return ConfigParser(kind, "").parse_config(["--config", str(path)])[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_parses_and_its_model_exists(path):
    config = load(path)
    assert timm.is_model(config.model.name)
    assert config.run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_header_says_command_cost_result_and_source(path):
    header = path.read_text().split("\n\n")[0]
    for word in ("# Command:", "# Cost:", "# Expected:", "# Source:"):
        assert word in header
    assert f"--config configs/{path.name}" in header


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_is_fair(path):
    """Contenders differ only in their model, and their parameter counts by less than one percent."""
    comparison, _ = ConfigParser(CompareConfig, "").parse_config(["--config", str(path)])
    base = load(FOLDER.parent / comparison.train)
    parameters = []
    for changes in comparison.contenders.values():
        assert changes.keys() <= {"model.name", "model.kwargs"}
        name = changes.get("model.name", base.model.name)
        model = timm.create_model(name, **changes.get("model.kwargs", base.model.kwargs))
        parameters.append(sum(p.numel() for p in model.parameters()))
    assert max(parameters) < 1.01 * min(parameters)
    assert comparison.test_split not in (base.data.train_split, base.data.val_split)


# GPUs, batch per GPU, peak learning rate, weight decay, drop path, epochs: from the authors' scripts.
OFFICIAL = {
    "vim_tiny_in1k": (8, 128, 1e-3, 0.1, 0.0, 300),
    "vim_small_in1k": (8, 64, 1e-3, 0.05, 0.05, 300),
    "vim_tiny_stride8_ft": (8, 128, 1e-5, 1e-8, 0.0, 30),
    "vim_small_stride8_ft": (8, 128, 1e-5, 1e-8, 0.0, 30),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_recipes(name):
    gpus, batch, peak, decay, drop_path, epochs = OFFICIAL[name]
    config = load(FOLDER / f"{name}.yaml")
    assert config.data.batch_size == batch
    assert config.optim.lr * gpus * batch * config.accumulate / config.optim.lr_batch == pytest.approx(peak)
    assert config.optim.weight_decay == decay
    assert config.model.kwargs.get("drop_path_rate", 0.0) == drop_path
    assert config.schedule.epochs == epochs
    assert config.augment.repeats == 3
    assert config.ema.decay == 0.99996


# Each of these alone is the recipe of another file, with another model.
VARIANTS = {
    "vim_tiny_cross_in1k": "vim_tiny_in1k",
    "vim_tiny_none_in1k": "vim_tiny_in1k",
    "vim_tiny_bimamba2_in1k": "vim_tiny_in1k",
    "s4nd_tiny_in1k": "vim_tiny_in1k",
    "vim_base_in1k": "vim_small_in1k",
    "vim_small_registers_in1k": "vim_small_in1k",
    "pixels_mnist5k_mamba2": "pixels_mnist5k_mamba",
    "pixels_mnist5k_s4": "pixels_mnist5k_mamba",
    "pixels_mnist5k_s4d": "pixels_mnist5k_mamba",
    "detection_coco_vim_tiny": "detection_coco_deit_tiny",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_its_model_alone(name):
    config, recipe = load(FOLDER / f"{name}.yaml"), load(FOLDER / f"{VARIANTS[name]}.yaml")
    assert config.model != recipe.model
    assert replace(config, model=recipe.model, run_dir=recipe.run_dir) == recipe
    rate = "drop_path_rate"
    assert config.model.kwargs.get(rate) == recipe.model.kwargs.get(rate)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*_in1k.yaml")), ids=lambda path: path.stem)
def test_imagenet_recipes_are_complete(path):
    """On their own, without a second --config."""
    config = load(path)
    assert (config.precision, config.augment.auto_augment) == ("bf16", "rand-m9-mstd0.5-inc1")
    assert (config.augment.mixup, config.augment.cutmix, config.augment.erasing) == (0.8, 1.0, 0.25)
    assert (config.optim.lr_batch, config.ema.decay, config.augment.repeats) == (512, 0.99996, 3)


@pytest.mark.parametrize("name", ["detection_coco_vim_tiny", "detection_coco_deit_tiny"])
def test_the_coco_recipe(name):
    """64 images per update, 184,375 updates, steps at 163,889 and 177,546."""
    config = load(FOLDER / f"{name}.yaml")
    updates = 118_287 // 64
    assert config.data.batch_size * 8 * config.accumulate == 64
    assert config.schedule.epochs * updates == pytest.approx(184_375, rel=0.01)
    assert [step * updates for step in config.schedule.steps] == pytest.approx([163_889, 177_546], rel=1e-3)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.layer_decay) == (1e-4, 0.1, 0.837)
    assert (config.model.detector, config.model.img_size) == ("cascade_mask_rcnn", 1024)
    assert config.augment.scale == (0.1, 2.0)
