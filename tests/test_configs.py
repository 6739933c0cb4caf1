"""Every training configuration in configs/ parses, says what a reader needs, and holds the recipe it claims."""

from dataclasses import dataclass, replace
from itertools import pairwise
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


@dataclass
class Recipe:
    """A recipe for 8 GPUs, from the authors' scripts and the defaults of their main.py.

    batch: of a GPU and an update. lr, min_lr: after scaling by the total batch. evaluation: size in pixels and crop;
    None: the model's size. augment: policy, colour jitter, repeats. fill: erasing, label smoothing.
    """

    model: str
    batch: int
    lr: float
    weight_decay: float
    drop_path: float
    epochs: int
    evaluation: tuple[int | None, float] = (None, 0.875)
    augment: tuple[str, float, int] = ("rand-m9-mstd0.5-inc1", 0.0, 3)
    fill: tuple[float, float] = (0.25, 0.1)
    min_lr: float = 1e-5
    warmup: tuple[float, float] = (5, 1e-6)
    ema: float = 0.99996
    clip: float | None = None
    layer_decay: float | None = None


THREE = {"augment": ("3a", 0.3, 3), "fill": (0.0, 0.0)}
LAST = {"augment": ("rand-m9-mstd0.5-inc1", 0.0, 1), "fill": (0.0, 0.1)}
PLAIN = {"augment": ("v0", 0.0, 1), "ema": 0.0}
TUNED = {"augment": ("rand-m9-mstd0.5-inc1", 0.0, 1), "min_lr": 1e-6, "warmup": (5, 0.0), "ema": 0.99992}
LARGE, LARGEST = {"min_lr": 5e-6, "evaluation": (448, 0.875)}, {"min_lr": 5e-6, "evaluation": (576, 0.875)}
OFFICIAL = {
    "vim_tiny_in1k": Recipe("vim_tiny", 128, 1e-3, 0.1, 0.0, 300),
    "vim_small_in1k": Recipe("vim_small", 64, 1e-3, 0.05, 0.05, 300),
    "vim_tiny_stride8_ft": Recipe("vim_tiny_stride8", 128, 1e-5, 1e-8, 0.0, 30, warmup=(5, 1e-5)),
    "vim_small_stride8_ft": Recipe("vim_small_stride8", 128, 1e-5, 1e-8, 0.0, 30, warmup=(5, 1e-5)),
    "mambar_base_in1k_stage1": Recipe("mambar_base", 128, 1e-3, 0.05, 0.1, 300, (128, 0.875), **THREE),
    "mambar_base_in1k_stage2": Recipe("mambar_base", 128, 4e-4, 0.05, 0.4, 100, (224, 0.875), **THREE),
    "mambar_base_in1k_stage3": Recipe("mambar_base", 64, 1e-5, 0.1, 0.4, 20, (224, 1.0), **LAST),
    "adventurer_base_in1k_stage1": Recipe("adventurer_base", 128, 1e-3, 0.05, 0.1, 300, (128, 0.875), **THREE),
    "adventurer_base_in1k_stage2": Recipe("adventurer_base", 128, 1e-3, 0.05, 0.4, 100, (224, 0.875), **THREE),
    "adventurer_base_in1k_stage3": Recipe("adventurer_base", 64, 1e-5, 0.1, 0.6, 20, (224, 0.875), **LAST),
    "arm_base_in1k": Recipe("arm_base", 128, 2e-3, 0.05, 0.1, 100, layer_decay=0.65, **TUNED),
    "arm_large_in1k": Recipe("arm_large", 128, 2e-3, 0.05, 0.3, 100, layer_decay=0.75, **TUNED),
    "videomamba_tiny_in1k": Recipe("videomamba_tiny", 512, 4e-3, 0.1, 0.0, 300, clip=5.0, **PLAIN),
    "videomamba_tiny_448_ft": Recipe("videomamba_tiny", 256, 2e-5, 1e-8, 0.0, 30, **PLAIN, **LARGE),
    "videomamba_tiny_576_ft": Recipe("videomamba_tiny", 128, 1e-5, 1e-8, 0.0, 10, warmup=(2, 1e-6), **PLAIN, **LARGEST),
    "videomamba_small_in1k": Recipe("videomamba_small", 512, 4e-3, 0.05, 0.15, 300, ema=0.0),
    "videomamba_small_448_ft": Recipe("videomamba_small", 64, 5e-6, 1e-8, 0.15, 30, ema=0.0, **LARGE),
    "videomamba_small_576_ft": Recipe(
        "videomamba_small", 64, 5e-6, 1e-8, 0.15, 10, warmup=(2, 1e-6), ema=0.0, **LARGEST
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_recipes(name):
    config = load(FOLDER / f"{name}.yaml")
    data, augment, optim, schedule = config.data, config.augment, config.optim, config.schedule
    total = 8 * data.batch_size * config.accumulate
    assert Recipe(
        config.model.name,
        data.batch_size * config.accumulate,
        pytest.approx(optim.lr * (total / optim.lr_batch if optim.lr_batch else 1)),
        optim.weight_decay,
        config.model.kwargs.get("drop_path_rate", 0.0),
        schedule.epochs,
        (data.img_size, data.crop_pct),
        (augment.auto_augment, augment.color_jitter, augment.repeats),
        (augment.erasing, augment.smoothing),
        schedule.min_lr,
        (schedule.warmup_epochs, schedule.warmup_lr),
        config.ema.decay,
        optim.clip_grad,
        optim.layer_decay,
    ) == OFFICIAL[name]  # fmt: skip
    assert (augment.mixup, augment.cutmix, augment.mix_switch_prob, augment.hflip) == (0.8, 1.0, 0.5, 0.5)
    assert (augment.scale, augment.vflip, augment.erasing_mode) == ((0.08, 1.0), 0.0, "pixel")
    assert (optim.name, optim.kwargs) == ("adamw", {"betas": [0.9, 0.999], "eps": 1e-8})
    assert (config.precision, data.interpolation, schedule.steps, config.ema.warmup) == ("bf16", "bicubic", None, False)


STAGES = [
    *([f"{model}_in1k_stage{number}" for number in (1, 2, 3)] for model in ("mambar_base", "mambar_small")),
    [f"adventurer_base_in1k_stage{number}" for number in (1, 2, 3)],
    *([f"{model}_in1k", f"{model}_448_ft", f"{model}_576_ft"] for model in ("videomamba_tiny", "videomamba_small")),
]


@pytest.mark.parametrize("names", STAGES, ids=lambda names: names[0])
def test_a_stage_starts_from_the_weights_of_the_one_before(names):
    stages = [load(FOLDER / f"{name}.yaml") for name in names]
    assert stages[0].model.checkpoint is None
    for before, after in pairwise(stages):
        assert after.model.checkpoint == f"{before.run_dir}/model.safetensors"
        assert after.model.name == before.model.name


# Each of these alone is the recipe of another file, with another model.
VARIANTS = {
    "vim_tiny_cross_in1k": "vim_tiny_in1k",
    "vim_tiny_none_in1k": "vim_tiny_in1k",
    "vim_tiny_bimamba2_in1k": "vim_tiny_in1k",
    "s4nd_tiny_in1k": "vim_tiny_in1k",
    "vim_base_in1k": "vim_small_in1k",
    "mambar_small_in1k_stage1": "mambar_base_in1k_stage1",
    "mambar_small_in1k_stage2": "mambar_base_in1k_stage2",
    "mambar_small_in1k_stage3": "mambar_base_in1k_stage3",
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


def test_every_imagenet_recipe_is_checked():
    recipes = {path.stem for pattern in ("*_in1k*.yaml", "*_ft.yaml") for path in FOLDER.glob(pattern)}
    assert recipes <= {*OFFICIAL, *VARIANTS}


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
