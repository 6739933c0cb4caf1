"""Every option of training and evaluation has a test that sees its effect."""

import math
import os
import re
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from image_tree import write_image_tree
from option_effects import Seen
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close
from whole_runs import TINY, config, one_thread  # noqa: F401  (the fixture)

import vim.training.checkpointer
from vim.console import ConfigError, RunError
from vim.console.interruption import Interruption
from vim.console.progress import Progress
from vim.data import AugmentConfig, DataConfig, DataError, EvalDataConfig, SampleKey
from vim.data.loaders import batches_of
from vim.timm_models.accelerator import create_accelerator
from vim.timm_models.config import ModelConfig
from vim.training import TrainConfig, ValidateConfig, classification, train, trainer, validate, validation
from vim.training.averaging import EmaConfig
from vim.training.checkpointer import Checkpointer
from vim.training.classification import Classification
from vim.training.config import CheckpointConfig
from vim.training.distillation import DistillConfig
from vim.training.evaluation import evaluate
from vim.training.optim import OptimConfig, ScheduleConfig, create_optimizer
from vim.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerator")
os.environ["ACCELERATE_USE_CPU"] = "true"
VIT = "vit_tiny_patch16_224"
sees = Seen()
ELSEWHERE = {
    (TrainConfig, "run_dir"): "test_training_run.py::test_the_folder_holds_what_it_should",
    (TrainConfig, "accumulate"): "test_training_run.py::test_accumulated_steps_equal_one_large_step",
    (TrainConfig, "trackers"): "test_training_run.py::test_a_tracker_gets_every_epoch_once",
    (TrainConfig, "max_skipped"): "test_training_run.py::test_a_loss_that_stays_non_finite_stops_the_run",
    (OptimConfig, "layer_decay"): "test_training_optim.py::test_layer_decay_lowers_the_rate_of_lower_layers",
    (ScheduleConfig, "epochs"): "test_training_run.py::test_the_folder_holds_what_it_should",
    (EmaConfig, "decay"): "test_training_run.py::test_the_ema_follows_its_formula",
    (DistillConfig, "mode"): "test_training_distillation.py::test_the_hard_loss_is_that_of_the_teachers_class",
    (DistillConfig, "alpha"): "test_training_distillation.py::test_the_batch_loss_equals_timms",
    (
        DistillConfig,
        "temperature",
    ): "test_training_distillation.py::test_the_soft_loss_is_a_divergence_at_a_temperature",
    (CheckpointConfig, "keep"): "test_training_run.py::test_the_best_epochs_are_kept",
    (ValidateConfig, "model"): "test_training_run.py::test_the_folder_is_a_timm_model_that_scores_the_same",
    (ValidateConfig, "checkpoint"): "test_training_run.py::test_a_checkpoint_of_the_run_evaluates_too",
    (ValidateConfig, "kwargs"): "test_training_run.py::test_several_sizes_and_crops_are_as_many_evaluations",
    (ValidateConfig, "img_sizes"): "test_training_run.py::test_several_sizes_and_crops_are_as_many_evaluations",
    (ValidateConfig, "crop_pcts"): "test_training_run.py::test_several_sizes_and_crops_are_as_many_evaluations",
    (ValidateConfig, "output"): "test_training_run.py::test_several_sizes_and_crops_are_as_many_evaluations",
    (ValidateConfig, "labels"): "test_training_labels.py::test_real_labels_count_as_timm_counts_them",
    (EvalDataConfig, "cache_gib"): "test_data_effects.py::cache_gib",
}


TESTS = Path(__file__).parents[1]


def options(config_class):
    """Class and name of every field, including sections."""
    for field in fields(config_class):
        if field.type not in (DataConfig, AugmentConfig):  # tested in tests/data
            yield from options(field.type) if is_dataclass(field.type) else [(config_class, field.name)]


def test_every_field_has_a_test_that_sees_its_effect():
    assert {*options(TrainConfig), *options(ValidateConfig)} == sees | ELSEWHERE.keys()


@pytest.mark.parametrize("where", sorted({*ELSEWHERE.values()}))
def test_the_tests_of_other_files_are_there(where):
    file, name = where.split("::")
    assert re.search(rf"^def {name}\(", next(TESTS.rglob(file)).read_text(), re.MULTILINE)


@pytest.fixture
def fresh_accelerator():
    """accelerate's global state would keep the precision of the previous test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_image_tree(tmp_path_factory.mktemp("effects") / "images", {"train": 66, "val": 15}, classes=3)


def data(tree, batch_size=16, **changes):
    return DataConfig(str(tree), batch_size=batch_size, num_workers=0, **{"mean": (0.3,), "std": (0.2,)} | changes)


def made(tree, **changes):
    """A run in which only the data order is random."""
    still = {
        "model": ModelConfig(VIT, kwargs=TINY),
        "data": data(tree),
        "augment": AugmentConfig(scale=(1, 1), ratio=(1, 1), hflip=0.0),
    }
    about = config(tree, "run", **still | changes)
    return Classification(about, create_accelerator(about.precision, about.accumulate), Progress(False))


def saver(run, folder="run"):
    return Checkpointer(RunFolder(folder, ""), run.config.checkpoint, Interruption(), run.accelerator, run.state)


def epoch(run):
    """Train one epoch without saving."""
    record = run.train_epoch(saver(run))
    run.state.end_epoch(record)
    return record


@sees(OptimConfig, "clip_grad")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_is_clipped_as_a_whole_to_the_norm(tree, accumulate):
    def change(clip_grad):
        """Change of all weights by one SGD update at learning rate 1."""
        plain = {"momentum": 0, "nesterov": False}
        run = made(
            tree,
            data=data(tree, 66 // accumulate),
            accumulate=accumulate,
            optim=OptimConfig("sgd", lr=1.0, weight_decay=0, clip_grad=clip_grad, kwargs=plain),
            schedule=ScheduleConfig(1, 0),
        )
        before = parameters_to_vector(run.state.model.parameters()).detach()
        assert epoch(run)["updates"] == 1
        return before - parameters_to_vector(run.state.model.parameters()).detach()

    free = change(None)
    norm = free.norm().item()
    assert norm > 0.1
    assert_close(change(norm / 4), free / 4, rtol=1e-3, atol=1e-6)
    assert_close(change(norm * 4), free)


@sees(OptimConfig, "lr", "lr_batch")
@sees(ScheduleConfig, "warmup_epochs", "warmup_lr", "min_lr", "steps")
@pytest.mark.parametrize("steps", [None, [1, 2.5]])
def test_every_update_is_made_at_the_rate_of_the_schedule(tree, steps):
    """An epoch has four updates of two steps. The peak rate is for 64 images; an update has 32. With layer decay, the
    peak and the logged rate are those of the top layer."""
    lowest = {} if steps else {"min_lr": 4e-3}
    run = made(
        tree,
        data=data(tree, 8),
        accumulate=2,
        optim=OptimConfig("sgd", lr=0.1, lr_batch=32, weight_decay=0, layer_decay=0.5),
        schedule=ScheduleConfig(3, warmup_epochs=0.5, warmup_lr=1e-3, steps=steps, **lowest),
    )
    rates = []
    optimizer = run.state.optimizer.optimizer
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[-1]["lr"]))
    for _ in range(3):
        record = epoch(run)
        assert record["lr"] == rates[-1]
    cosine = [4e-3 + (0.05 - 4e-3) * (1 + math.cos(math.pi * done / 10)) / 2 for done in range(10)]
    after = [0.05, 0.05, *[0.005] * 6, *[0.0005] * 2] if steps else cosine
    assert rates == pytest.approx([1e-3, (1e-3 + 0.05) / 2, *after])


@sees(OptimConfig, "name", "weight_decay", "kwargs")
def test_an_optimizer_is_the_one_that_was_named_with_its_arguments():
    model = torch.nn.Linear(2, 2)
    for name, kind in (("adamw", torch.optim.AdamW), ("lion", timm.optim.Lion)):
        about = OptimConfig(name, weight_decay=0.3, kwargs={"betas": (0.7, 0.8)})
        optimizer = create_optimizer(model, about, total_batch=1)
        assert type(optimizer) is kind
        assert {group["betas"] for group in optimizer.param_groups} == {(0.7, 0.8)}
        assert {group["weight_decay"]: len(group["params"][0].shape) for group in optimizer.param_groups} == {
            0: 1,
            0.3: 2,
        }


@sees(EmaConfig, "warmup")
@pytest.mark.parametrize(("warmup", "kept"), [(True, [0, 1 - 2 ** (-2 / 3), 0.5, 0.5]), (False, [0.5] * 4)])
def test_ema_warmup_starts_with_a_small_decay(tree, warmup, kept):
    state = made(tree, ema=EmaConfig(0.5, warmup)).state
    own, average = state.model.head.bias, state.ema.module.head.bias
    want = average.clone()
    for number, part in enumerate(kept, 1):
        with torch.no_grad():
            own.fill_(number)
        state.end_update()
        want = part * want + (1 - part) * number
        assert_close(average, want)


@sees(TrainConfig, "seed")
def test_weights_order_augmentation_and_draws_depend_on_the_seed(tree):
    def seen(seed):
        run = made(tree, seed=seed, augment=AugmentConfig(scale=(0.3, 1.0), smoothing=0.0))
        keys, drawn = run.sampler.keys(0, 64), []
        dataset = run.train_batches.dataset
        images = dataset.collate([dataset[SampleKey(0, image, 0)] for image in range(4)])[0].to("cpu")
        weights = parameters_to_vector(run.state.model.parameters()).detach()

        def draw(batch):
            drawn.extend([torch.rand(()).item(), np.random.rand()])
            return 0 * run.state.model.head.bias.sum()

        run.batch_loss = draw
        epoch(run)
        epoch(run)
        assert len(set(drawn)) == 2 * 2 * 4  # each update draws its own
        return weights, torch.tensor([key.image for key in keys]), images, torch.tensor(drawn)

    first, again, other = seen(0), seen(0), seen(1)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert (a != c).double().mean() > 0.3


@sees(TrainConfig, "precision")
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_training_and_evaluation_compute_in_the_precision(tree, precision, dtype):
    run, seen, batches = made(tree, precision=precision, ema=EmaConfig(0.9)), [], []
    for model in (run.state.model, run.state.ema.module):
        model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    epoch(run)
    metrics = run.evaluate(lambda: batches.append(len(seen)))
    assert seen == [dtype] * (66 // 16 + 2)
    assert batches == [5, 6]  # after each of the two evaluations, where a signal may stop the run
    assert metrics["loss"] == run.evaluation.loss != metrics["ema_loss"]  # the plots are of the last weights
    assert {p.dtype for p in run.state.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_teacher_computes_in_the_precision_and_answers_in_full(tree, stored, precision, dtype):
    run, seen = made(tree, precision=precision, distill=DistillConfig(stored.folder)), []
    run.teacher.model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert run.teacher(torch.randn(2, 1, 12, 12)).dtype == torch.float32
    assert seen == [dtype]


def test_half_precision_is_refused_where_it_would_be_ignored(tree):
    with pytest.raises(ConfigError, match="precision fp16 needs a GPU"):
        made(tree, precision="fp16")


@sees(TrainConfig, "fsdp")
@pytest.mark.parametrize(("processes", "fsdp"), [(1, True), (2, False), (2, True)])
def test_a_model_is_sharded_over_several_processes_if_configured(tree, monkeypatch, processes, fsdp):
    divided = []
    monkeypatch.setattr(trainer, "shard", divided.append)
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    state = made(tree, fsdp=fsdp).state
    assert divided == [state.model, state.ema.module] * (fsdp and processes == 2)


@sees(TrainConfig, "cpu_threads")
@pytest.mark.parametrize(("cpu_threads", "want"), [(3, 3), (None, 1)])
def test_a_run_has_as_many_threads_as_it_says(tree, tmp_path, cpu_threads, want):
    before = torch.get_num_threads()
    try:
        with pytest.raises(RunError, match="no run to resume"):  # checked after the threads are set
            train(config(tree, tmp_path, cpu_threads=cpu_threads), resume=True)
        assert torch.get_num_threads() == want
    finally:
        torch.set_num_threads(before)


@sees(ModelConfig, "grad_checkpointing", "compile", "cuda_graph")
@pytest.mark.parametrize("option", ["grad_checkpointing", "compile", "cuda_graph"])
def test_a_model_is_checkpointed_compiled_or_captured_as_configured(tree, monkeypatch, option):
    captured, compiled, passes = [], [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(classification, "wants_cuda_graph", lambda model, config, *_: config.cuda_graph)
    monkeypatch.setattr(classification, "capture_training", lambda *args: captured.append(args))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    chosen = {"grad_checkpointing": False, "compile": False, "cuda_graph": False} | {option: True}
    run = made(tree, model=ModelConfig(VIT, kwargs=TINY, **chosen), precision="bf16")
    model = run.state.model
    assert compiled == [model] * (option == "compile")
    assert [(part is model, sample.shape, dtype, pool) for part, sample, dtype, pool in captured] == [
        (True, (16, 1, 12, 12), torch.bfloat16, "pool")
    ] * (option == "cuda_graph")
    model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    model.train()(torch.randn(2, 1, 12, 12)).sum().backward()
    assert len(passes) == 1 + (option == "grad_checkpointing")


@pytest.fixture
def stored(tmp_path):
    """Folder of a finished run, a file with other weights, and the models with both."""
    torch.manual_seed(5)
    first, second = (timm.create_model(VIT, num_classes=3, **TINY) for _ in range(2))
    run = RunFolder(tmp_path / "stored", "")
    run.path.mkdir()
    run.export(first, TINY, {"input_size": (1, 12, 12), "mean": (0.3,), "std": (0.2,)}, ["a", "b", "c"])
    torch.save(second.state_dict(), tmp_path / "file.pth")
    return SimpleNamespace(
        folder=str(run.path), file=str(tmp_path / "file.pth"), models={"folder": first, "file": second}
    )


def same_weights(model, stored):
    """Which of the stored weights a model has."""
    body = model.state_dict()["blocks.1.mlp.fc1.weight"]
    return [name for name, other in stored.models.items() if torch.equal(body, other.blocks[1].mlp.fc1.weight)]


@sees(ModelConfig, "name", "kwargs", "pretrained", "checkpoint")
@pytest.mark.parametrize(
    ("name", "given", "want"),
    [
        ("folder", {}, ["folder"]),
        ("folder", {"pretrained": True}, ["folder"]),
        ("folder", {"pretrained": False}, []),
        ("folder", {"checkpoint": "file"}, ["file"]),
        (VIT, {}, []),
        (VIT, {"checkpoint": "file"}, ["file"]),
    ],
)
def test_a_run_begins_with_the_weights_that_were_given(tree, stored, name, given, want):
    about = {"checkpoint": stored.file} if "checkpoint" in given else given
    folder = name == "folder"
    model = ModelConfig(stored.folder if folder else name, kwargs={} if folder else TINY, **about)
    run = made(tree, model=model)
    assert same_weights(run.state.model, stored) == want
    assert same_weights(run.state.ema.module, stored) == want
    assert ("random (seed 0)" in run.initial_weights()) == (not want)
    deeper = made(tree, model=ModelConfig("deit_tiny_distilled_patch16_224", kwargs=TINY | {"depth": 3})).state.model
    assert len(deeper.blocks) == 3
    assert deeper.dist_token is not None


@sees(DistillConfig, "teacher", "checkpoint", "kwargs")
def test_a_teacher_is_the_one_that_was_given(tree, stored):
    assert made(tree).teacher is None
    assert same_weights(made(tree, distill=DistillConfig(stored.folder)).teacher.model, stored) == ["folder"]
    other = made(tree, distill=DistillConfig(stored.folder, stored.file, kwargs={"img_size": 20})).teacher
    assert same_weights(other.model, stored) == ["file"]
    assert other.size == (20, 20)
    assert other(torch.zeros(2, 1, 12, 12)).shape == (2, 3)


@sees(CheckpointConfig, "every_minutes", "every_updates")
@pytest.mark.parametrize(
    ("every", "want"),
    [
        ({"every_minutes": None}, []),
        ({"every_minutes": None, "every_updates": 3}, [3, 6]),
        ({"every_minutes": 5.0}, []),
        ({"every_minutes": 2.0}, [5]),
        ({"every_minutes": 1.5}, [4, 8]),
    ],
)
def test_a_run_is_saved_by_the_minute_and_by_the_update(tree, tmp_path, monkeypatch, every, want):
    """Eight updates of half a minute each. The first update that starts after the interval is saved."""
    run = made(tree, data=data(tree, 8), checkpoint=CheckpointConfig(**every))
    state = run.state
    monkeypatch.setattr(vim.training.checkpointer, "time", SimpleNamespace(monotonic=lambda: 30 * state.update))
    saved, keeper = [], saver(run, tmp_path)
    monkeypatch.setattr(keeper.run, "keep_new", lambda *also: saved.append(state.update))
    run.train_epoch(keeper)
    assert saved == want


FREE = {
    "run_dir", "accumulate", "max_skipped", "trackers", "checkpoint.every_minutes", "checkpoint.every_updates",
    "checkpoint.keep", "data.root", "data.num_workers", "data.batch_size", "data.bad_images", "data.cache_gib",
}  # fmt: skip


def keys(section, prefix=""):
    for field in fields(section):
        value = getattr(section, field.name)
        yield from keys(value, f"{prefix}{field.name}.") if is_dataclass(value) else [prefix + field.name]


def another(value):
    """Another value of the same type; a number instead of None."""
    kinds = {
        bool: lambda: not value,
        dict: lambda: {**value, "more": 1},
        str: lambda: value + "x",
        type(None): lambda: 1,
    }
    kinds |= {tuple: lambda: (*value, 1), list: lambda: [*value, 1]}
    return kinds.get(type(value), lambda: value / 2 + 1)()


@pytest.mark.parametrize("key", list(keys(TrainConfig())))
def test_a_resumed_run_refuses_another_value_of_what_changes_results(tree, tmp_path, key):
    about, run = config(tree, tmp_path), RunFolder(tmp_path, "")
    run.write_config(about)
    run.check(about, resume=True)
    *sections, name = key.split(".")
    changed = deepcopy(about)
    section = changed
    for part in sections:
        section = getattr(section, part)
    setattr(section, name, another(getattr(section, name)))
    if key in FREE:
        run.check(changed, resume=True)
    else:
        with pytest.raises(RunError, match=rf"keeps its configuration, but {re.escape(key)}(\.more)? was .*, is "):
            run.check(changed, resume=True)


def validated(monkeypatch, config):
    """Run a validation. Returns: its dataloader, its results, and the dtypes that its model computed in."""
    loaders, dtypes = [], []

    def seen(model, loader, *args):
        loaders.append(loader)
        model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
        return evaluate(model, loader, *args)

    monkeypatch.setattr(validation, "evaluate", seen)
    results = validate(config)
    return loaders[0], results, dtypes


@sees(EvalDataConfig, "root", "val_split", "batch_size", "num_workers", "img_size", "mean", "std", "crop_pct")
@sees(EvalDataConfig, "interpolation")
@pytest.mark.parametrize(
    "change",
    [
        {"val_split": "train"}, {"batch_size": 4}, {"num_workers": 1}, {"img_size": 20}, {"mean": (0.6,)},
        {"std": (0.5,)}, {"crop_pct": 0.5}, {"interpolation": "nearest", "img_size": 20}, {"root": "other"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_validation_reads_what_training_would(tree, tmp_path, stored, monkeypatch, change):
    """Training has its own tests of the data section."""
    if "root" in change:
        change = {"root": str(write_image_tree(tmp_path / "other", {"train": 66, "val": 9}, classes=3, size=14))}
    given = {"root": str(tree), "batch_size": 16, "num_workers": 0, "mean": (0.3,), "std": (0.2,)} | change
    about = ValidateConfig(stored.folder, data=EvalDataConfig(**given), output=str(tmp_path / "v.json"))
    loader, results, _ = validated(monkeypatch, about)
    model = ModelConfig(VIT, kwargs=TINY | {"img_size": change.get("img_size", 12)})
    peer = made(tree, model=model, data=DataConfig(**given)).val_batches
    batches, wanted = ([(images, labels) for images, labels, _ in batches_of(each)] for each in (loader, peer))
    assert_close(batches, wanted, rtol=0, atol=0)
    assert (loader.num_workers, results["images"]) == (peer.num_workers, sum(len(labels) for _, labels in wanted))


@sees(EvalDataConfig, "bad_images")
def test_images_that_cannot_be_read_stop_a_validation_or_are_listed(tmp_path, stored):
    root = write_image_tree(tmp_path / "images", {"val": 9}, classes=3)
    broken = root / "val" / "b" / "4.png"
    broken.write_bytes(b"no image")

    def results(bad_images):
        about = EvalDataConfig(str(root), num_workers=0, bad_images=bad_images)
        return validate(ValidateConfig(stored.folder, data=about, output=str(tmp_path / "v.json")))

    with pytest.raises(DataError, match=r"cannot read image .*4\.png"):
        results("raise")
    found = results("skip")
    assert (found["images"], found["bad_images"]) == (8, [str(broken)])


@sees(ValidateConfig, "precision")
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_validation_computes_in_its_precision(tree, tmp_path, stored, monkeypatch, precision, dtype):
    data = EvalDataConfig(str(tree), num_workers=0)
    about = ValidateConfig(stored.folder, data=data, precision=precision, output=str(tmp_path / "v.json"))
    assert validated(monkeypatch, about)[2] == [dtype]
