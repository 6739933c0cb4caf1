"""Distillation: the teacher's input, the loss, and that the teacher is neither trained nor saved."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from image_tree import write_image_tree
from timm.task import LogitDistillationTask
from torch import nn
from torchvision.transforms import InterpolationMode, Resize
from whole_runs import TINY, config, interrupt, one_thread, timeless  # noqa: F401  (the fixture)

from vim.checkpoint import load_checkpoint
from vim.console import ConfigError, InterruptedRunError
from vim.console.progress import Progress
from vim.data import AugmentConfig, DataConfig
from vim.timm_models.accelerator import create_accelerator
from vim.timm_models.config import ModelConfig
from vim.training import classification, train
from vim.training.averaging import EmaConfig
from vim.training.classification import Classification
from vim.training.distillation import DistillConfig, Teacher, distillation_loss
from vim.training.dry_run import dry_run
from vim.training.optim import ScheduleConfig

os.environ["ACCELERATE_USE_CPU"] = "true"
CLASSES = ["a", "b", "c"]
STUDENT_INPUT = {"input_size": (1, 12, 12), "mean": (0.3,), "std": (0.2,)}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_image_tree(tmp_path_factory.mktemp("run") / "images", {"train": 66, "val": 15}, classes=3)


@pytest.fixture(scope="module")
def teacher(tree, tmp_path_factory):
    """A run folder: a model with batch norm, whose images have another mean, standard deviation and size."""
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    data = DataConfig(str(tree), batch_size=16, num_workers=0, img_size=32, mean=(0.6,), std=(0.4,))
    model = ModelConfig("test_resnet", kwargs={"in_chans": 1})
    train(config(tree, run_dir, model=model, data=data, ema=EmaConfig(), schedule=ScheduleConfig(1, 0)))
    return str(run_dir)


def make_teacher(path, classes=CLASSES, **data_config):
    return Teacher(DistillConfig(path), classes, STUDENT_INPUT | data_config, create_accelerator("fp32"))


def trainer(config):
    return Classification(config, create_accelerator("fp32"), Progress(False))


def states(run_dir):
    state = load_checkpoint(run_dir / "checkpoints" / "last.pt")
    state["history"] = timeless(state["history"])
    state["so_far"] = timeless([state["so_far"]])
    state["data"] = state["data"]["splits"]["train"]["names"]  # assert_close does not compare strings
    return state


def assert_same(a, b):
    """Equal bit for bit, except times."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


LOGITS = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.2, 0.1, -1.0, 4.0]])
ANSWERS = torch.tensor([[0.5, 0.0, 2.0, -1.0], [1.0, -3.0, 0.3, 2.0]])


def probabilities(logits, temperature=1.0):
    powers = [math.exp(x / temperature) for x in logits]
    return [p / sum(powers) for p in powers]


def test_the_hard_loss_is_that_of_the_teachers_class():
    want = -sum(math.log(probabilities(row)[label]) for row, label in zip(LOGITS.tolist(), (2, 3), strict=True)) / 2
    assert distillation_loss(LOGITS, ANSWERS, DistillConfig(mode="hard")).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_loss_is_a_divergence_at_a_temperature(temperature):
    want = 0.0
    for student, teacher in zip(LOGITS.tolist(), ANSWERS.tolist(), strict=True):
        pairs = zip(probabilities(student, temperature), probabilities(teacher, temperature), strict=True)
        want += temperature**2 * sum(t * math.log(t / s) for s, t in pairs) / 2
    soft = DistillConfig(mode="soft", temperature=temperature)
    assert distillation_loss(LOGITS, ANSWERS, soft).item() == pytest.approx(want, rel=1e-5)


def test_the_batch_loss_equals_timms(tree, teacher, tmp_path):
    """With mixed images and the weighted label loss. timm has the soft loss for models with one head."""
    distill = DistillConfig(teacher, mode="soft", alpha=0.3, temperature=2.0)
    run = trainer(config(tree, tmp_path / "run", distill=distill, model=ModelConfig("test_vit", kwargs=TINY)))
    with torch.no_grad():
        run.teacher.model.get_classifier().weight.mul_(100)  # so that its predictions differ between images
    batch = torch.randn(16, 1, 12, 12), torch.arange(16) % 3
    np.random.seed(3)
    loss = run.batch_loss([t.clone() for t in batch])
    np.random.seed(3)
    images, targets = run.mixup(*batch)
    assert not torch.equal(targets.max(1).values, targets.max(1).values.round())
    model = run.state.model
    model.pretrained_cfg |= {"mean": (0.3,), "std": (0.2,)}
    resized = nn.Sequential(Resize((32, 32), InterpolationMode.BICUBIC), run.teacher.model)
    resized.pretrained_cfg = run.teacher.model.pretrained_cfg
    task = LogitDistillationTask(
        model, resized, nn.CrossEntropyLoss(), task_loss_weight=0.7, temperature=2.0, verbose=False
    )
    torch.testing.assert_close(loss, task(images, targets)["loss"], rtol=1e-5, atol=0)


def test_images_are_normalised_and_resized_for_the_teacher(teacher):
    made, model = make_teacher(teacher), timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()
    pixels = torch.rand(4, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(made((pixels - 0.3) / 0.2), model((pixels - 0.6) / 0.4))
        grey = torch.full((1, 1, 12, 12), 0.45)
        want = model(torch.full((1, 1, 32, 32), (0.45 - 0.6) / 0.4))
        torch.testing.assert_close(made((grey - 0.3) / 0.2), want)


def test_a_teacher_with_alpha_0_changes_nothing_and_stays_unchanged(tree, teacher, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(classification, "Teacher", lambda *args: made.append(Teacher(*args)) or made[-1])
    train(config(tree, tmp_path / "taught", distill=DistillConfig(teacher, alpha=0.0)))
    train(config(tree, tmp_path / "alone"))
    assert_same(states(tmp_path / "taught"), states(tmp_path / "alone"))
    weights = timm.create_model(f"local-dir:{teacher}", pretrained=True).state_dict()
    assert_same(dict(made[0].model.state_dict()), dict(weights))
    assert not any(module.training for module in made[0].model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in made[0].model.parameters())


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_a_stopped_run_with_a_teacher_equals_the_uninterrupted_one(tree, teacher, tmp_path, monkeypatch, mode):
    options = {"distill": DistillConfig(teacher, mode=mode), "accumulate": 2}
    train(config(tree, tmp_path / "whole", **options))
    interrupt(monkeypatch, Classification, 2)
    with pytest.raises(InterruptedRunError):
        train(config(tree, tmp_path / "cut", **options))
    monkeypatch.undo()
    train(config(tree, tmp_path / "cut", **options), resume=True)
    assert_same(states(tmp_path / "whole"), states(tmp_path / "cut"))


def test_a_head_for_the_teacher_learns_from_it_and_the_other_from_the_labels(tree, teacher, tmp_path):
    student = ModelConfig("deit_tiny_distilled_patch16_224", kwargs=TINY)
    taught = config(tree, tmp_path / "run", distill=DistillConfig(teacher, alpha=0.25), model=student)
    run = trainer(replace(taught, augment=AugmentConfig()))
    images, labels = torch.randn(8, 1, 12, 12), torch.arange(8) % 3
    of_labels, of_teacher = run.state.model.train()(images)
    want = 0.75 * nn.functional.cross_entropy(of_labels, labels)
    want = want + 0.25 * nn.functional.cross_entropy(of_teacher, run.teacher(images).argmax(1))
    torch.testing.assert_close(run.batch_loss((images, labels)), want)
    assert train(taught)["top1"] > 0


def test_a_dry_run_uses_the_teacher(tree, teacher, tmp_path, capsys):
    assert math.isfinite(dry_run(config(tree, tmp_path / "run", distill=DistillConfig(teacher)), 2)["loss"])
    assert f"taught by {teacher}" in capsys.readouterr().out


def test_other_classes_and_channels_are_refused(teacher):
    with pytest.raises(ConfigError, match=r"the teacher .* has 3 classes, the data set 4; choose a teacher that"):
        make_teacher(teacher, [*CLASSES, "d"])
    with pytest.raises(ConfigError, match=r"class 1 is 'b' in the teacher .*, 'x' in the data set; choose a teacher"):
        make_teacher(teacher, ["a", "x", "c"])
    with pytest.raises(ConfigError, match=r"takes images with 1 channels, the student 3; set distill.kwargs.in_chans"):
        make_teacher(teacher, input_size=(3, 12, 12))
    with pytest.raises(ConfigError, match=r"no model 'regnety' in timm"):
        make_teacher("regnety")
