"""Training that begins with smaller images."""

import json
import os

import pytest
import torch
from accelerate.state import AcceleratorState
from image_tree import write_image_tree
from torch import nn
from whole_runs import interrupt, log, one_thread, state, timeless  # noqa: F401  (the fixture)

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigError, InterruptedRunError
from vim.console.progress import Progress
from vim.data import AugmentConfig, DataConfig, EvalDataConfig, ImageFolder, SampleKey, TrainImages, train_transform
from vim.timm_models.accelerator import create_accelerator
from vim.timm_models.config import ModelConfig
from vim.training import TrainConfig, ValidateConfig, train, validate
from vim.training.averaging import EmaConfig
from vim.training.classification import Classification
from vim.training.distillation import DistillConfig
from vim.training.dry_run import dry_run
from vim.training.graphs import capture_training
from vim.training.optim import ScheduleConfig

os.environ["ACCELERATE_USE_CPU"] = "true"
TINY = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
STEPS = [(8, 1), (12, 2)]
AUGMENT = AugmentConfig(scale=(0.5, 1.0), erasing=0.5, mixup=0.2, cutmix=0.2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_image_tree(tmp_path_factory.mktemp("run") / "images", {"train": 34, "val": 9}, classes=3)


def config(tree, run_dir, model="vit_tiny_patch16_224", kwargs=TINY, progressive=STEPS, img_size=None, **changes):
    defaults = {
        "run_dir": str(run_dir),
        "model": ModelConfig(model, kwargs=kwargs),
        "data": DataConfig(str(tree), batch_size=8, num_workers=1, img_size=img_size, progressive=progressive),
        "augment": AUGMENT,
        "schedule": ScheduleConfig(epochs=4, warmup_epochs=0.5),
        "ema": EmaConfig(0.9),
    }
    return TrainConfig(**defaults | changes)


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """The folder and the summary of a run, and the shapes of its batches."""
    shapes, batch_loss = [], Classification.batch_loss

    def seen(self, batch):
        shapes.append(tuple(batch[0].shape))
        return batch_loss(self, batch)

    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "batch_loss", seen)
        summary = train(config(tree, run_dir))
    return run_dir, summary, shapes


def test_batches_have_the_size_of_their_epoch_though_workers_live_on(finished):
    run_dir, _, shapes = finished
    sizes = [8, 12, 12, 16]
    assert shapes == [(8, 1, size, size) for size in sizes for _ in range(34 // 8)]
    assert [record["img_size"] for record in log(run_dir)] == sizes


def test_the_result_is_a_model_of_the_full_size(finished, tree, tmp_path):
    run_dir, summary, _ = finished
    about = json.loads((run_dir / "config.json").read_text())
    assert about["pretrained_cfg"]["input_size"] == [1, 16, 16]
    assert about["model_args"]["dynamic_img_size"]
    data = EvalDataConfig(str(tree), batch_size=4, num_workers=0)
    results = validate(ValidateConfig(str(run_dir), data=data, output=str(tmp_path / "v.json")))
    assert (results["preprocessing"]["input_size"], results["top1"]) == ((1, 16, 16), summary["top1"])


def test_the_full_size_may_be_another_than_the_models_own(tree, tmp_path):
    """20 pixels, where the model's positions are those of 16: the folder has the model that was evaluated."""
    summary = train(config(tree, tmp_path / "run", img_size=20, schedule=ScheduleConfig(2, 0), progressive=[(8, 1)]))
    data = EvalDataConfig(str(tree), num_workers=0)
    results = validate(ValidateConfig(str(tmp_path / "run"), data=data, output=str(tmp_path / "v.json")))
    assert results["preprocessing"]["input_size"] == (1, 20, 20)
    assert results["loss"] == pytest.approx(log(tmp_path / "run")[-1]["loss"], rel=1e-6)
    assert results["top1"] == summary["top1"]


@pytest.mark.parametrize("update", [3, 6])
def test_a_stopped_run_equals_the_uninterrupted_one(finished, tree, tmp_path, monkeypatch, update):
    """Stopped in the last update before a change of size, and in the midst of an epoch."""
    interrupt(monkeypatch, Classification, update)
    with pytest.raises(InterruptedRunError):
        train(config(tree, tmp_path))
    monkeypatch.undo()
    train(config(tree, tmp_path), resume=True)
    whole, cut = (state(path) for path in (finished[0], tmp_path))
    for key in ("model", "model_ema", "optimizer"):
        torch.testing.assert_close(whole[key], cut[key], rtol=0, atol=0)
    assert timeless(log(finished[0])) == timeless(log(tmp_path))


def test_a_sample_is_that_of_its_epochs_size(tree):
    folder = ImageFolder(tree, "train")
    inputs = {"mean": (0.2,), "std": (0.5,), "interpolation": "bilinear"}
    small, large = (train_transform(AUGMENT, inputs | {"input_size": (1, size, size)}) for size in (8, 16))
    both = TrainImages(folder, large, 0, 1, early=[small, small])
    for epoch, transform in enumerate((small, small, large, large)):
        key, one = SampleKey(epoch, 5, 0), TrainImages(folder, transform, 0, 1)
        assert torch.equal(both[key][0].pixels, one[key][0].pixels)


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("vim_nano", {"img_size": 16, "patch_size": 4, "in_chans": 1, "depth": 2}),
        ("test_resnet", {"in_chans": 1}),
        ("deit_tiny_distilled_patch16_224", TINY),
    ],
)
def test_models_that_take_several_sizes(tree, tmp_path, model, kwargs):
    img_size = 16 if model == "test_resnet" else None
    run = Classification(
        config(tree, tmp_path, model, kwargs, img_size=img_size), create_accelerator("fp32"), Progress()
    )
    for size in (8, 12, 16):
        assert run.model(torch.zeros(2, 1, size, size)).shape == (2, 3)


def test_what_cannot_be_is_refused(tree, tmp_path):
    def refused(message, *args, **changes):
        with pytest.raises(ConfigError, match=message):
            train(config(tree, tmp_path / "run", *args, **changes))

    mixer = "mixer_s16_224", {"img_size": 32, "in_chans": 1}, [(16, 1)]
    refused(r"mixer_s16_224 does not take images of 16 pixels, .* \(32\).*; choose other sizes", *mixer)
    refused("does not take images of 8 pixels", kwargs=TINY | {"dynamic_img_size": False})
    refused("does not take images of 10 pixels, .* divisible", progressive=[(8, 1), (10, 1)])
    refused("grow to their full size, 16 x 16 pixels; they cannot begin with 16", progressive=[(8, 1), (16, 1)])
    refused("for square images .*, 16 x 32 pixels", kwargs=TINY | {"img_size": (16, 32)})


def test_a_dry_run_has_the_full_size(tree, tmp_path, monkeypatch):
    batch_loss = Classification.batch_loss

    def full(self, batch):
        assert batch[0].shape[-1] == 16
        return batch_loss(self, batch)

    monkeypatch.setattr(Classification, "batch_loss", full)
    dry_run(config(tree, tmp_path), 1)


def test_a_capture_is_for_batches_of_its_shape(monkeypatch):
    """Here without a GPU: what torch would capture is noted, and a batch of another shape may not reach it."""
    captured, replayed = [], []

    def capture(module, sample, pool):
        eager = module.forward

        def forward(batch):
            if not module.training:
                return eager(batch)
            assert batch.shape == sample[0].shape
            replayed.append(batch.shape[-1])
            return batch

        assert torch.equal(module(sample[0]), 2 * sample[0])  # it is captured as it was, not as it is replayed
        module.forward = forward
        captured.append(pool)

    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, batch):
            self.seen += self.training
            return 2 * batch

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    model = Double()
    for size in (16, 8):
        capture_training(model.train(size == 16), torch.ones(2, size), None, memory="shared")
        assert (model.seen, model.training) == (0, size == 16)
    model.train()
    for size in (8, 16, 12):
        model(torch.ones(2, size))
    model.eval()
    assert torch.equal(model(torch.ones(2, 8)), torch.full((2, 8), 2.0))
    assert (captured, replayed) == (["shared"] * 2, [8, 16])


@pytest.mark.parametrize(
    ("error", "seen"), [(torch.cuda.OutOfMemoryError, torch.cuda.OutOfMemoryError), (RuntimeError, ConfigError)]
)
def test_a_capture_that_fails_for_want_of_memory_says_so(monkeypatch, error, seen):
    def fail(*_, **__):
        raise error("no")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(seen, match="no"):
        capture_training(nn.Linear(1, 1), torch.ones(1, 1), None)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_for_each_size_trains_as_the_eager_step(finished, tree, tmp_path, monkeypatch, precision):
    """With a teacher, which is none of what is captured."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    kwargs = {"img_size": 16, "patch_size": 4, "in_chans": 1, "depth": 2, "drop_rate": 0.1}
    logs = []
    for graph in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = config(tree, tmp_path / f"{graph}", "vim_nano", kwargs, precision=precision)
        run.model.cuda_graph, run.distill = graph, DistillConfig(str(finished[0]))
        train(run)
        logs.append(log(tmp_path / f"{graph}"))
    AcceleratorState._reset_state(reset_partial_state=True)
    for eager, replayed in zip(*logs, strict=True):
        assert replayed["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-3)
        assert replayed["loss"] == pytest.approx(eager["loss"], rel=1e-2)
