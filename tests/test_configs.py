"""Every configuration of a training in configs/ parses, says what a reader needs, and holds the recipe it claims."""

from pathlib import Path

import pytest
import timm

import vim  # noqa: F401  (registers the models)
from vim.training import ConfigParser, TrainConfig

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(set(FOLDER.glob("*.yaml")) - set(FOLDER.glob("benchmark*.yaml")))


def load(path):
    return ConfigParser(TrainConfig, "").parse_config(["--config", str(path)])[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_parses_and_its_model_exists(path):
    config = load(path)
    assert timm.is_model(config.model.name)
    assert config.run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_says_command_cost_result_and_source(path):
    header = path.read_text().split("\n\n")[0]
    for word in ("# Command:", "# Cost:", "# Expected:", "# Source:"):
        assert word in header
    assert f"--config configs/{path.name}" in header


# GPUs x batch, peak learning rate, weight decay, drop path, epochs: the table of the authors' scripts.
OFFICIAL = {
    "vim_tiny_in1k": (8, 128, 1e-3, 0.1, 0.0, 300),
    "vim_small_in1k": (8, 64, 1e-3, 0.05, 0.05, 300),
    "vim_tiny_stride8_ft": (8, 128, 1e-5, 1e-8, 0.0, 30),
    "vim_small_stride8_ft": (8, 128, 1e-5, 1e-8, 0.0, 30),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_recipes(name):
    gpus, batch, peak, decay, drop_path, epochs = OFFICIAL[name]
    config = load(CONFIGS[0].with_name(f"{name}.yaml"))
    assert config.data.batch_size == batch
    assert config.optim.lr * gpus * batch * config.accumulate / config.optim.lr_batch == pytest.approx(peak)
    assert config.optim.weight_decay == decay
    assert config.model.kwargs.get("drop_path_rate", 0.0) == drop_path
    assert config.schedule.epochs == epochs
    assert config.augment.repeats == 3
    assert config.ema.decay == 0.99996
