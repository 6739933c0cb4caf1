"""Whole runs of a tiny model: what they learn, write, resume and refuse."""

import json
import os
import pickle
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from image_tree import write_image_tree
from whole_runs import interrupt, one_thread, timeless  # noqa: F401  (the fixture)

from vim.data import AugmentConfig, DataConfig, EvalDataConfig
from vim.training import ConfigError, InterruptedRunError, RunError, ValidateConfig, train, trainer, validate
from vim.training.checkpoint import load_checkpoint, save_checkpoint
from vim.training.config import EmaConfig, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
from vim.training.graphs import wants_cuda_graph
from vim.training.run_folder import RunFolder

os.environ["ACCELERATE_USE_CPU"] = "true"  # on a CPU, equal means equal to the last bit
TINY = {"img_size": 12, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_image_tree(tmp_path_factory.mktemp("run") / "images", {"train": 66, "val": 15}, classes=3)


def config(tree, run_dir, **changes):
    """A run with everything random in it: augmentation, mixing, drop path, dropout, and averaged weights."""
    defaults = {
        "run_dir": str(run_dir),
        "model": ModelConfig("vit_tiny_patch16_224", kwargs=TINY | {"drop_path_rate": 0.2, "drop_rate": 0.1}),
        "data": DataConfig(str(tree), batch_size=16, num_workers=0, crop_pct=1.0, mean=(0.3,), std=(0.2,)),
        "augment": AugmentConfig(scale=(0.8, 1.0), hflip=0.0, erasing=0.2, mixup=0.2, cutmix=0.2, smoothing=0.1),
        "optim": OptimConfig(lr=3e-3, clip_grad=1.0),
        "schedule": ScheduleConfig(epochs=3, warmup_epochs=0.5),
        "ema": EmaConfig(0.9),
    }
    return TrainConfig(**defaults | changes)


def state(run_dir, name="last"):
    return load_checkpoint(run_dir / "checkpoints" / f"{name}.pt")


def log(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def assert_same(a, b):
    """Equal to the last bit, through nested dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """A run of three epochs: its folder and its summary."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, train(config(tree, run_dir))


def test_the_folder_holds_what_it_should(finished):
    run_dir, summary = finished
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "checkpoints", "config.json", "config.yaml", "confusion_matrix.png", "ema", "learning_curve.png", "log.jsonl",
        "model.safetensors", "summary.json",
    }  # fmt: skip
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"best.pt", "last.pt"}
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["epochs"] == 3
    assert summary["updates"] == 3 * (66 // 16)
    assert summary["val_images"] == 15
    for key in ("top1", "top5", "best_top1", "train_seconds", "images_per_second", "peak_memory_mib", "versions"):
        assert summary[key]
    records = log(run_dir)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert summary["top1"] == records[-1]["top1"]
    assert summary["best_top1"] == max(record["ema_top1"] for record in records)
    assert state(run_dir, "best")["history"] == state(run_dir)["history"][: summary["best_epoch"]]


@pytest.mark.parametrize(("folder", "key"), [("", "top1"), ("ema", "ema_top1")])
def test_the_folder_is_a_timm_model_that_scores_the_same(finished, tree, folder, key, tmp_path):
    run_dir, summary = finished
    model = timm.create_model(f"local-dir:{run_dir / folder}", pretrained=True)
    weights = state(run_dir)["model_ema" if folder else "model"]
    assert_same(dict(model.state_dict()), dict(weights))
    data_config = timm.data.resolve_model_data_config(model)
    assert [list(data_config[key]) for key in ("input_size", "mean", "std")] == [[1, 12, 12], [0.3], [0.2]]
    data = EvalDataConfig(str(tree), batch_size=4, num_workers=0)
    results = validate(ValidateConfig(str(run_dir / folder), data=data, output=str(tmp_path / "out" / "v.json")))
    assert results["top1"] == summary[key]
    assert results["images"] == 15
    assert json.loads((tmp_path / "out" / "v.json").read_text())["top1"] == summary[key]


def test_a_checkpoint_of_the_run_evaluates_too(finished, tree, tmp_path):
    run_dir, summary = finished
    best = str(run_dir / "checkpoints" / "best.pt")
    data = EvalDataConfig(str(tree), batch_size=4, num_workers=0)
    results = validate(ValidateConfig(str(run_dir), best, data=data, output=str(tmp_path / "v.json")))
    assert results["top1"] == summary["best_top1"]


@pytest.mark.parametrize("epochs_before", [0, 2])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(finished, tree, tmp_path, monkeypatch, epochs_before):
    run_dir = tmp_path / "cut"
    interrupt(monkeypatch, epochs_before)
    with pytest.raises(InterruptedRunError, match=f"interrupted in epoch {epochs_before + 1}; go on with: python"):
        train(config(tree, run_dir))
    monkeypatch.undo()
    assert RunFolder(run_dir, "tools/train.py").last.exists() == (epochs_before > 0)
    torch.manual_seed(99)  # whatever the process drew before does not matter
    train(config(tree, run_dir), resume=True)
    whole, cut = state(finished[0]), state(run_dir)
    assert timeless(whole.pop("history")) == timeless(cut.pop("history"))
    assert_same(whole, cut)
    assert timeless(log(finished[0])) == timeless(log(run_dir))


def test_resuming_a_complete_run_trains_no_more(finished, tree):
    run_dir, summary = finished
    before = state(run_dir)
    again = train(config(tree, run_dir), resume=True)
    assert_same(before, state(run_dir))
    assert again["top1"] == summary["top1"]


def test_an_existing_folder_is_refused_without_resume(finished, tree):
    command = f"python tools/train.py --config {finished[0] / 'config.yaml'} --resume"
    with pytest.raises(RunError, match=rf"run folder .* exists; go on with it: {re.escape(command)}"):
        train(config(tree, finished[0]))


def test_there_must_be_something_to_resume(tree, tmp_path):
    with pytest.raises(RunError, match=r"no run to resume in .*; start it without --resume"):
        train(config(tree, tmp_path), resume=True)


def test_a_resumed_run_keeps_its_configuration(finished, tree):
    changed = config(tree, finished[0], optim=OptimConfig(lr=1e-3, clip_grad=1.0))
    with pytest.raises(RunError, match=r"optim.lr was 0.003, is 0.001; resume with"):
        train(changed, resume=True)


def plain(tree, run_dir, **changes):
    """A run without anything random but the order, whose loss must fall."""
    model = ModelConfig("vit_tiny_patch16_224", kwargs=TINY)
    augment = AugmentConfig(scale=(1, 1), ratio=(1, 1), hflip=0)
    return config(tree, run_dir, model=model, augment=augment, ema=EmaConfig(), **changes)


def test_it_learns(tree, tmp_path):
    steep = {"schedule": ScheduleConfig(epochs=12, warmup_epochs=1), "optim": OptimConfig(lr=1e-2, clip_grad=1.0)}
    summary = train(plain(tree, tmp_path / "run", **steep))
    assert summary["top1"] == 100
    losses = [record["train_loss"] for record in log(tmp_path / "run")]
    assert losses[-1] < losses[0] / 4


def test_accumulated_steps_equal_one_large_step(tree, tmp_path):
    short = {"schedule": ScheduleConfig(epochs=1, warmup_epochs=0), "optim": OptimConfig(name="sgd", lr=0.1)}
    small_steps = DataConfig(str(tree), batch_size=4, num_workers=0, crop_pct=1.0, mean=(0.3,), std=(0.2,))
    train(plain(tree, tmp_path / "one", **short))
    train(plain(tree, tmp_path / "four", **short, data=small_steps, accumulate=4))
    one, four = state(tmp_path / "one"), state(tmp_path / "four")
    assert one["update"] == four["update"] == 66 // 16
    for name, weight in one["model"].items():
        torch.testing.assert_close(four["model"][name], weight, atol=1e-5, rtol=1e-4)


def test_averaged_weights_follow_their_formula(tree, tmp_path, monkeypatch):
    """ema = decay * ema + (1 - decay) * weights after every update, from the initial weights on."""
    seen = []
    end_update = trainer.TrainingState.end_update

    def recorded(self):
        seen.append({name: w.clone() for name, w in self.model.state_dict().items()})
        end_update(self)

    monkeypatch.setattr(trainer.TrainingState, "end_update", recorded)
    initial = {}
    create_optimizer = trainer.create_optimizer  # called between the model's creation and its first update

    def recorded_start(model, *args):
        initial.update({name: w.clone() for name, w in model.state_dict().items()})
        return create_optimizer(model, *args)

    monkeypatch.setattr(trainer, "create_optimizer", recorded_start)
    train(config(tree, tmp_path / "run", schedule=ScheduleConfig(epochs=1, warmup_epochs=0)))
    want = initial
    for weights in seen:
        want = {name: 0.9 * want[name].double() + 0.1 * weights[name].double() for name in want}
    got = state(tmp_path / "run")["model_ema"]
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name], atol=1e-6, rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tree, tmp_path, monkeypatch):
    train_epoch = trainer.Trainer.train_epoch

    def poisoned(self):
        if self.state.epoch == 1:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        return train_epoch(self)

    monkeypatch.setattr(trainer.Trainer, "train_epoch", poisoned)
    with pytest.raises(RunError, match=r"loss is nan in epoch 2, .* learning rate .* precision fp32; lower optim.lr"):
        train(config(tree, tmp_path / "run"))
    last = state(tmp_path / "run")
    assert last["update"] == 66 // 16
    assert all(weight.isfinite().all() for weight in last["model"].values())


def test_a_model_without_gradient_checkpointing_says_so(tree, tmp_path, monkeypatch):
    model = ModelConfig("vit_tiny_patch16_224", kwargs=TINY, grad_checkpointing=True)
    monkeypatch.delattr(timm.models.VisionTransformer, "set_grad_checkpointing")
    with pytest.raises(ConfigError, match=r"vit_tiny_patch16_224 has no gradient checkpointing"):
        train(config(tree, tmp_path / "run", model=model))


def test_a_run_that_cannot_start_leaves_no_folder(tree, tmp_path):
    few = DataConfig(str(tree), batch_size=128, num_workers=0)
    with pytest.raises(ValueError, match=r"an update takes 128 images"):
        train(config(tree, tmp_path / "run", data=few))
    assert not (tmp_path / "run").exists()


def test_other_classes_are_not_evaluated(finished, tree, tmp_path):
    other = write_image_tree(tmp_path / "other", {"val": 4}, classes=4)
    with pytest.raises(ConfigError, match=r"has 3 classes, .* has 4"):
        validate(ValidateConfig(str(finished[0]), data=EvalDataConfig(str(other), num_workers=0)))
    renamed = write_image_tree(tmp_path / "renamed", {"val": 3}, classes=3)
    (renamed / "val" / "c").rename(renamed / "val" / "z")
    with pytest.raises(ConfigError, match=r"trained on the classes \['a', 'b', 'c'\], .* has \['a', 'b', 'z'\]"):
        validate(ValidateConfig(str(finished[0]), data=EvalDataConfig(str(renamed), num_workers=0)))


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint({"update": 1}, path)

    def disk_full(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint({"update": 2}, path)
    assert load_checkpoint(path) == {"update": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_cannot_run_code(tmp_path):
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (type(marker).touch, (marker,))

    path = tmp_path / "last.pt"
    path.write_bytes(pickle.dumps({"model": Hostile()}, protocol=2))
    with pytest.raises(RunError, match=f"cannot load checkpoint {path}"):
        load_checkpoint(path)
    torch.save({"model": Hostile()}, path)
    with pytest.raises(RunError, match=f"cannot load checkpoint {path}"):
        load_checkpoint(path)
    assert not marker.exists()


def test_a_damaged_checkpoint_says_which(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"garbage")
    with pytest.raises(RunError, match=f"cannot load checkpoint {path}"):
        load_checkpoint(path)


# CUDA graphs


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_graph_trains_as_the_eager_step(tree, tmp_path, monkeypatch, precision):
    """The same run, drop path and dropout included, and buffers that the capture's warm-up must not have moved."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # its weight gradients differ from run to run
    logs = []
    models = {
        "vit_tiny_patch16_224": {"kwargs": TINY},
        "resnet10t": {"kwargs": {"in_chans": 1}},
        "vim_nano": {"kwargs": {"depth": 2, "in_chans": 1}, "grad_checkpointing": True},
    }
    for name, options in models.items():
        for cuda_graph in (False, True):
            AcceleratorState._reset_state(reset_partial_state=True)
            model = ModelConfig(name, **options, cuda_graph=cuda_graph)
            model.kwargs["drop_rate"] = 0.1
            train(config(tree, tmp_path / f"{name}{cuda_graph}", model=model, precision=precision))
            logs.append(log(tmp_path / f"{name}{cuda_graph}"))
        eager, graph = logs[-2:]
        for a, b in zip(eager, graph, strict=True):
            assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_what_a_graph_is_not_for():
    gpu = {"device": torch.device("cuda"), "num_processes": 1, "gradient_accumulation_steps": 1}
    vit = timm.create_model("vit_tiny_patch16_224", **TINY)
    assert wants_cuda_graph(vit, ModelConfig(), SimpleNamespace(**gpu))
    for config in (ModelConfig(cuda_graph=False), ModelConfig(compile=True), ModelConfig(grad_checkpointing=True)):
        assert not wants_cuda_graph(vit, config, SimpleNamespace(**gpu))
    for other in ({"device": torch.device("cpu")}, {"num_processes": 2}, {"gradient_accumulation_steps": 2}):
        assert not wants_cuda_graph(vit, ModelConfig(), SimpleNamespace(**gpu | other))
    vim = timm.create_model("vim_nano", depth=1)
    assert wants_cuda_graph(vim, ModelConfig(grad_checkpointing=True), SimpleNamespace(**gpu))
