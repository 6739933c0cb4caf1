"""Whole runs of the families besides Vim, which other tests train: they learn, and the tools take their folders."""

import os

import pytest
import timm
import torch
from image_tree import write_image_tree
from whole_runs import config, log, one_thread  # noqa: F401  (the fixture)

import vim  # noqa: F401  (registers the models)
from vim.data import AugmentConfig, EvalDataConfig
from vim.timm_models.config import ModelConfig
from vim.training import ValidateConfig, train, validate
from vim.training.optim import OptimConfig, ScheduleConfig

os.environ["ACCELERATE_USE_CPU"] = "true"

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"img_size": 12, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 3, "drop_path_rate": 0.1}
FAMILIES = {
    "mambar_small": {"num_registers": 3, "register_dim": 4},
    "videomamba_tiny": {},
    "adventurer_tiny": {"d_state": 6, "head_dim": 8},
    "arm_base": {},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_image_tree(tmp_path_factory.mktemp("run") / "images", {"train": 66, "val": 15}, classes=3)


@pytest.mark.parametrize(("name", "options"), FAMILIES.items(), ids=FAMILIES)
def test_a_run_learns_and_its_folder_is_a_model(name, options, tree, tmp_path):
    """With gradient checkpointing and layer decay. Validation of the folder has the accuracy of the run."""
    run_dir = tmp_path / "run"
    summary = train(
        config(
            tree,
            run_dir,
            model=ModelConfig(name, kwargs=TINY | options, grad_checkpointing=True),
            augment=AugmentConfig(scale=(1.0, 1.0), hflip=0.0),
            optim=OptimConfig(lr=1e-2, layer_decay=0.9),
            schedule=ScheduleConfig(epochs=5, warmup_epochs=0),
        )
    )
    losses = [line["train_loss"] for line in log(run_dir)]
    assert losses[-1] < 0.7 * losses[0], losses
    data = EvalDataConfig(str(tree), batch_size=8, num_workers=0)
    found = validate(ValidateConfig(str(run_dir), data=data, output=str(tmp_path / "validate.json")))
    assert found["top1"] == summary["top1"] > 50
    sizes = ValidateConfig(str(run_dir), data=data, img_sizes=[12, 20], output=str(tmp_path / "sizes.json"))
    assert validate(sizes)["rows"][0]["top1"] == summary["top1"]
    model = timm.create_model(f"local-dir:{run_dir}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["a", "b", "c"]
    assert model(torch.randn(1, 1, 12, 12)).shape == (1, 3)
