"""Whole runs of a tiny model: what they learn, write, resume and refuse."""

import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
from dataclasses import asdict
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from image_shards import write_parquet
from image_tree import write_image_tree
from safetensors.torch import load_file
from whole_runs import TINY, config, interrupt, log, one_thread, state, timeless  # noqa: F401  (the fixture)

from vim.checkpoint import load_checkpoint, save_checkpoint
from vim.console import ConfigError, InterruptedRunError, RunError
from vim.console.environment import git_revision
from vim.data import AugmentConfig, DataConfig, DataError, EvalDataConfig, open_split, parquet_shards
from vim.experiments.kill_test import KillTest
from vim.timm_models.config import ModelConfig
from vim.timm_models.create import create_model
from vim.training import ValidateConfig, classification, classification_data, train, trainer, validate, validation
from vim.training.averaging import EmaConfig
from vim.training.classification import Classification
from vim.training.config import CheckpointConfig
from vim.training.evaluation import evaluate
from vim.training.graphs import wants_cuda_graph
from vim.training.optim import OptimConfig, ScheduleConfig
from vim.training.run_folder import RunFolder

os.environ["ACCELERATE_USE_CPU"] = "true"  # on the CPU, equal means bit for bit

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_image_tree(tmp_path_factory.mktemp("run") / "images", {"train": 66, "val": 15}, classes=3)


def assert_same(a, b):
    """Equal bit for bit, in nested dicts and lists."""
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
        "model.safetensors", "starts.jsonl", "summary.json",
    }  # fmt: skip
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"best.pt", "last.pt", "previous.pt"}
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["epochs"] == 3
    assert summary["updates"] == 3 * (66 // 16)
    assert summary["val_images"] == 15
    assert summary["parameters"] == sum(tensor.numel() for tensor in load_file(run_dir / "model.safetensors").values())
    for key in ("top1", "top5", "best_top1", "train_seconds", "images_per_second", "peak_memory_mib", "versions"):
        assert summary[key]
    records = log(run_dir)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert summary["top1"] == records[-1]["top1"]
    assert summary["best_top1"] == max(record["ema_top1"] for record in records)
    assert state(run_dir, "best")["history"] == state(run_dir)["history"][: summary["best_epoch"]]


def test_a_run_can_be_fine_tuned_with_other_classes_and_sizes(finished):
    """Fine-tuning: the body's weights, a resized position table, a new head."""
    run_dir, _ = finished
    trained = load_file(run_dir / "model.safetensors")
    kwargs = {"img_size": 20, "drop_path_rate": 0.1}
    model = create_model(ModelConfig(str(run_dir), pretrained=True, kwargs=kwargs), num_classes=5)
    loaded = model.state_dict()
    assert {name for name in trained if loaded[name].shape != trained[name].shape} == {
        "pos_embed", "head.weight", "head.bias",
    }  # fmt: skip
    assert loaded["head.weight"].shape == (5, 16)
    assert torch.equal(loaded["pos_embed"][:, 0], trained["pos_embed"][:, 0])
    body = [name for name in trained if not name.startswith(("pos_embed", "head."))]
    assert all(torch.equal(loaded[name], trained[name]) for name in body)


@pytest.mark.parametrize(("folder", "key"), [("", "top1"), ("ema", "ema_top1")])
def test_the_folder_is_a_timm_model_that_scores_the_same(finished, tree, folder, key, tmp_path):
    run_dir, summary = finished
    model = timm.create_model(f"local-dir:{run_dir / folder}", pretrained=True)
    weights = state(run_dir)["model_ema" if folder else "model"]
    assert_same(dict(model.state_dict()), dict(weights))
    images = torch.rand(16, 1, 12, 12)
    assert torch.equal(model.train()(images), model(images))  # drop rates are not part of the model
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
    record = log(run_dir)[summary["best_epoch"] - 1]
    assert results["loss"] == pytest.approx(record["ema_loss"], rel=1e-6) != record["loss"]


def test_several_sizes_and_crops_are_as_many_evaluations(finished, tree, tmp_path, monkeypatch):
    """The position table is resampled when the model is created and when its size changes."""
    loaders = []

    def counted(*args):
        evaluation = evaluate(*args)
        loaders.append(len(multiprocessing.active_children()))
        return evaluation

    monkeypatch.setattr(validation, "evaluate", counted)
    run_dir, output = str(finished[0]), tmp_path / "v.json"
    data = EvalDataConfig(str(tree), batch_size=4, num_workers=1)
    both = ValidateConfig(run_dir, data=data, img_sizes=[20, 12], crop_pcts=[1.0, 0.6], output=str(output))
    results = validate(both)
    assert json.loads(output.read_text())["rows"] == json.loads(json.dumps(results["rows"]))
    assert len({row["loss"] for row in results["rows"]}) == 4
    for row, (size, crop_pct) in zip(results["rows"], [(20, 1.0), (20, 0.6), (12, 1.0), (12, 0.6)], strict=True):
        single = EvalDataConfig(str(tree), batch_size=8, num_workers=0, crop_pct=crop_pct)
        alone = validate(ValidateConfig(run_dir, data=single, kwargs={"img_size": size}, output=str(output)))
        assert row["preprocessing"] == alone["preprocessing"]
        assert row["preprocessing"]["input_size"] == (1, size, size)
        for key in ("images", "bad_images", "top1", "top5", "parameters"):
            assert row[key] == alone[key]
        assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert json.loads(output.read_text()).keys() == alone.keys()
    assert loaders[:4] == [1, 1, 1, 1]  # workers of earlier rows have ended


@pytest.mark.parametrize(("update", "number"), [(0, signal.SIGTERM), (3, signal.SIGINT), (9, signal.SIGTERM)])
def test_a_stopped_run_equals_the_uninterrupted_one_bit_for_bit(finished, tree, tmp_path, monkeypatch, update, number):
    """Stopped in the first update, in the last one of an epoch, and within an epoch of four updates."""
    run_dir = tmp_path / "cut"
    interrupt(monkeypatch, Classification, update, number)
    where = f"stopped by {number.name}; resume with: python tools/train.py"
    with pytest.raises(InterruptedRunError, match=where) as stopped:
        train(config(tree, run_dir))
    monkeypatch.undo()
    assert stopped.value.exit_code == 128 + number
    assert state(run_dir)["update"] == update + 1
    torch.manual_seed(99)  # whatever the process drew before does not matter
    train(config(tree, run_dir), resume=True)
    assert_same_run(finished[0], run_dir)


def assert_same_run(whole, cut):
    """Weights, EMA, optimizer and log are equal bit for bit, except times."""
    states = state(whole), state(cut)
    histories = [s.pop("history") for s in states]
    for s in states:
        s["so_far"] = timeless([s["so_far"]])
    assert_same(*states)
    assert timeless(histories[0]) == timeless(histories[1])
    assert timeless(log(whole)) == timeless(log(cut))


def test_resuming_a_complete_run_trains_no_more(finished, tree):
    run_dir, summary = finished
    before, records = state(run_dir), log(run_dir)
    (run_dir / "log.jsonl").unlink()  # as if the run had been stopped before writing it
    again = train(config(tree, run_dir), resume=True)
    assert_same(before, state(run_dir))
    assert log(run_dir) == records
    assert again["top1"] == summary["top1"]


def test_an_existing_folder_is_refused_without_resume(finished, tree):
    command = f"python tools/train.py --config {finished[0] / 'config.yaml'} --resume"
    with pytest.raises(RunError, match=rf"run folder .* exists; resume it: {re.escape(command)}"):
        train(config(tree, finished[0]))


def test_there_must_be_something_to_resume(tree, tmp_path):
    with pytest.raises(RunError, match=r"no run to resume in .*; start it without --resume"):
        train(config(tree, tmp_path), resume=True)


def test_a_resumed_run_keeps_its_configuration(finished, tree):
    changed = config(tree, finished[0], optim=OptimConfig(lr=1e-3, clip_grad=1.0))
    with pytest.raises(RunError, match=r"optim.lr was 0.003, is 0.001; resume with"):
        train(changed, resume=True)


def plain(tree, run_dir, **changes):
    """A run in which only the data order is random, so that its loss must fall."""
    model = ModelConfig("vit_tiny_patch16_224", kwargs=TINY)
    augment = AugmentConfig(scale=(1, 1), ratio=(1, 1), hflip=0)
    return config(tree, run_dir, model=model, augment=augment, ema=EmaConfig(), **changes)


def test_it_learns(tree, tmp_path):
    steep = {"schedule": ScheduleConfig(epochs=12, warmup_epochs=1), "optim": OptimConfig(lr=1e-2, clip_grad=1.0)}
    summary = train(plain(tree, tmp_path / "run", **steep))
    assert summary["top1"] == 100
    losses = [record["train_loss"] for record in log(tmp_path / "run")]
    assert losses[-1] < losses[0] / 4


def test_accumulated_steps_equal_one_large_step(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")  # the run's config decides
    short = {"schedule": ScheduleConfig(epochs=1, warmup_epochs=0), "optim": OptimConfig(name="sgd", lr=0.1)}
    small_steps = DataConfig(str(tree), batch_size=4, num_workers=0, crop_pct=1.0, mean=(0.3,), std=(0.2,))
    train(plain(tree, tmp_path / "one", **short))
    train(plain(tree, tmp_path / "four", **short, data=small_steps, accumulate=4))
    one, four = state(tmp_path / "one"), state(tmp_path / "four")
    assert one["update"] == four["update"] == 66 // 16
    for name, weight in one["model"].items():
        torch.testing.assert_close(four["model"][name], weight, atol=1e-5, rtol=1e-4)


def test_the_ema_follows_its_formula(tree, tmp_path, monkeypatch):
    """ema = decay * ema + (1 - decay) * weights after every update, from the initial weights on."""
    seen = []
    end_update = trainer.TrainingState.end_update

    def recorded(self):
        seen.append({name: w.clone() for name, w in self.model.state_dict().items()})
        end_update(self)

    monkeypatch.setattr(trainer.TrainingState, "end_update", recorded)
    initial = {}
    create_optimizer = trainer.create_optimizer  # called after the model is created, before its first update

    def recorded_start(model, *args, **options):
        initial.update({name: w.clone() for name, w in model.state_dict().items()})
        return create_optimizer(model, *args, **options)

    monkeypatch.setattr(trainer, "create_optimizer", recorded_start)
    train(config(tree, tmp_path / "run", schedule=ScheduleConfig(epochs=1, warmup_epochs=0)))
    want = initial
    for weights in seen:
        want = {name: 0.9 * want[name].double() + 0.1 * weights[name].double() for name in want}
    got = state(tmp_path / "run")["model_ema"]
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name], atol=1e-6, rtol=1e-5)


def poison(monkeypatch, updates):
    """Put a NaN into a pixel of the batches of these updates; an epoch has four."""
    backward = trainer.Trainer._backward

    def poisoned(self, inputs, step):
        if 4 * self.state.epoch + step - 1 in updates:
            inputs[0][0, 0, 0, 0] = float("nan")
        return backward(self, inputs, step)

    monkeypatch.setattr(trainer.Trainer, "_backward", poisoned)


def test_a_non_finite_update_is_skipped(tree, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 5, 6})
    train(config(tree, tmp_path / "run", max_skipped=2))
    assert [record["skipped"] for record in log(tmp_path / "run")] == [1, 2, 0]
    last = state(tmp_path / "run")
    assert last["update"] == 12
    for tensor in (*last["model"].values(), *last["model_ema"].values()):
        assert tensor.isfinite().all()
    assert all(int(s["step"]) == 9 for s in last["optimizer"]["state"].values())


def test_a_loss_that_stays_non_finite_stops_the_run(tree, tmp_path, monkeypatch):
    poison(monkeypatch, range(5, 8))
    where = r"loss is nan .* epoch 2, update 8, .* precision fp32. Activations: .*; gradients: first in .* \(nan\)"
    with pytest.raises(RunError, match=where):
        train(config(tree, tmp_path / "run", max_skipped=2))
    assert state(tmp_path / "run")["update"] == 66 // 16
    found = tmp_path / "run" / "not_finite"
    assert all(weight.isfinite().all() for weight in load_checkpoint(found / "state.pt")["model"].values())


def test_a_diagnosis_names_block_and_files(tree, tmp_path, monkeypatch):
    """The weights of the second block overflow; everything before it is finite."""
    create = classification.create_model_at

    def overflowing(*args):
        model, kwargs = create(*args)
        with torch.no_grad():
            model.blocks[1].mlp.fc1.weight.fill_(3e38)
        return model, kwargs

    monkeypatch.setattr(classification, "create_model_at", overflowing)
    with pytest.raises(RunError, match=r"Activations: first in blocks.1 "):
        train(config(tree, tmp_path / "run", max_skipped=0, accumulate=2))
    found = tmp_path / "run" / "not_finite"
    report = json.loads((found / "report-0.json").read_text())
    peaks = report["largest_activation_by_block"]
    assert [peaks[name] is not None for name in ("patch_embed", "blocks.0", "blocks.1", "head")] == [1, 1, 0, 0]
    assert set(report["gradient_norm_by_block"]) == {"cls_token", "pos_embed", *peaks}
    images, labels, _ = load_checkpoint(found / "batch-0.pt")["batch"]
    assert len(images) == len(labels) == len(report["files"]) == 32
    assert ["abc".index(Path(file).parent.name) for file in report["files"]] == labels.tolist()


def test_a_diagnosis_repeats_the_skipped_update(tree, tmp_path, monkeypatch):
    """It repeats the update with the same images and the same random numbers."""
    seen, batch_loss = [], Classification.batch_loss

    def spoilt(self, batch):
        seen.append([torch.tensor(torch.initial_seed()), *(t.clone() for t in batch)])
        return batch_loss(self, batch) * (1 if self.state.update < 5 else math.nan)

    monkeypatch.setattr(Classification, "batch_loss", spoilt)
    data = DataConfig(str(tree), batch_size=8, num_workers=0, mean=(0.3,), std=(0.2,))
    with pytest.raises(RunError, match="epoch 2, update 7"):
        train(config(tree, tmp_path, data=data, accumulate=2, max_skipped=1))
    steps = 7 * 2
    assert len(seen) == steps + 2
    assert_same(seen[steps:], seen[steps - 2 : steps])
    labels = load_checkpoint(tmp_path / "not_finite" / "batch-0.pt")["batch"][1]
    assert_same(labels, torch.cat([step[2] for step in seen[steps:]]))


def test_unreadable_images_are_skipped_counted_and_listed(tmp_path, monkeypatch):
    tree = write_image_tree(tmp_path / "images", {"train": 66, "val": 15}, classes=3)
    bad = [tree / name for name in ("train/a/0.png", "train/b/10.png", "val/c/5.png")]
    for path, how in zip(bad, ("empty", "garbage", "truncated"), strict=True):
        damage(path, how)
    with pytest.raises(DataError, match="cannot read image"):
        train(config(tree, tmp_path / "run"))
    data = DataConfig(str(tree), batch_size=16, num_workers=1, crop_pct=1.0, mean=(0.3,), std=(0.2,), bad_images="skip")
    summary = train(config(tree, tmp_path / "whole", data=data))
    assert (summary["bad_images"], summary["val_images"]) == (3, 14)
    assert (tmp_path / "whole" / "bad_images.txt").read_text().split() == list(map(str, bad))
    interrupt(monkeypatch, Classification, 9)
    with pytest.raises(InterruptedRunError):
        train(config(tree, tmp_path / "cut", data=data))
    monkeypatch.undo()
    train(config(tree, tmp_path / "cut", data=data), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    data = EvalDataConfig(str(tree), bad_images="skip")
    results = validate(ValidateConfig(str(tmp_path / "cut"), data=data, output=str(tmp_path / "v.json")))
    assert (results["images"], results["bad_images"], results["top1"]) == (14, [str(bad[2])], summary["top1"])


def test_a_run_on_fetched_shards_resumes_bit_for_bit(tree, tmp_path, monkeypatch):
    """With another number of workers, an emptied cache, and cache space for some shards only."""
    names = [f"train-{i}.parquet" for i in range(6)]
    shards = {"train": dict(zip(names, (6, 9, 12, 15, 18, 6), strict=True)), "val": {"val.parquet": 15}}
    for split, sizes in shards.items():
        folder = open_split(tree, split)
        files = [(Path(folder.name(index)), folder.label(index)) for index in range(len(folder))]
        write_parquet(files, folder.classes, tmp_path / "set", sizes)
    monkeypatch.setattr(parquet_shards, "shard_folder", lambda: tmp_path / "cache")

    def at_once(fetch):
        return lambda shards: [fetch(shard) for shard in shards]

    monkeypatch.setattr(classification_data, "FetchAhead", at_once)

    def streamed(name, num_workers):
        data = DataConfig(
            str(tmp_path / "set"),
            num_workers=num_workers,
            window=1,
            cache_gib=1.5e-5,
            batch_size=16,
            crop_pct=1.0,
            mean=(0.3,),
            std=(0.2,),
        )
        return config(tree, tmp_path / name, data=data)

    summary = train(streamed("whole", 0))
    assert 2 <= len(list((tmp_path / "cache").glob("*.arrow"))) < 7
    with monkeypatch.context() as patch:
        interrupt(patch, Classification, 5)
        with pytest.raises(InterruptedRunError):
            train(streamed("cut", 2))
    shutil.rmtree(tmp_path / "cache")
    train(streamed("cut", 1), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    data = EvalDataConfig(str(tmp_path / "set"))
    results = validate(ValidateConfig(str(tmp_path / "cut"), data=data, output=str(tmp_path / "v.json")))
    assert (results["images"], results["top1"]) == (15, summary["top1"])
    assert results["split"] == f"file://{tmp_path}/set/val*.parquet"


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
    with pytest.raises(ConfigError, match=r"does not know 1 of the 4 classes of .*: d; it has 3: a, b, c"):
        validate(ValidateConfig(str(finished[0]), data=EvalDataConfig(str(other), num_workers=0)))
    renamed = write_image_tree(tmp_path / "renamed", {"val": 3}, classes=3)
    (renamed / "val" / "c").rename(renamed / "val" / "z")
    with pytest.raises(ConfigError, match=r"does not know 1 of the 3 classes of .*: z; it has 3: a, b, c"):
        validate(ValidateConfig(str(finished[0]), data=EvalDataConfig(str(renamed), num_workers=0)))


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 20,000 bytes: writing fails half way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, full_disk):
    path = tmp_path / "last.pt"
    save_checkpoint({"update": 1}, path)
    with pytest.raises(
        RunError, match=rf"cannot save {path}: the file grows beyond what the limit .* It takes 0.4 MiB"
    ):
        save_checkpoint({"update": 2, "model": {"head": torch.zeros(100_000)}}, path)
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


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "one bit":
        content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": content[:-100], "empty": b"", "garbage": b"garbage"}.get(how, content))


@pytest.mark.parametrize("how", ["one bit", "truncated", "empty", "garbage"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, tree, tmp_path, capsys, how):
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    last, previous = (run_dir / "checkpoints" / f"{name}.pt" for name in ("last", "previous"))
    damage(last, how)
    train(config(tree, run_dir), resume=True)
    assert f"warning: cannot load checkpoint {last}" in capsys.readouterr().out
    assert_same_run(finished[0], run_dir)
    for path in (last, previous):
        damage(path, how)
    with pytest.raises(RunError, match=f"cannot load checkpoint {previous}"):
        train(config(tree, run_dir), resume=True)


@pytest.mark.parametrize("every", [{"every_minutes": 1e-9}, {"every_updates": 1}])
def test_a_run_is_saved_as_often_as_asked(tree, tmp_path, monkeypatch, every):
    saved = []
    keep = RunFolder.keep_new

    def noted(run, *also):
        saved.append(load_checkpoint(run.new)["update"])
        keep(run, *also)

    monkeypatch.setattr(RunFolder, "keep_new", noted)
    train(plain(tree, tmp_path, checkpoint=CheckpointConfig(**every), schedule=ScheduleConfig(2, warmup_epochs=0)))
    assert saved == [1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 8, 8]  # two more around each evaluation


def test_a_tracker_gets_every_epoch_once(tree, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_dir = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"no tracker 'tensorbord': installed are .*tensorboard"):
        train(plain(tree, run_dir, trackers=["tensorbord"]))
    interrupt(monkeypatch, Classification, 9)
    with pytest.raises(InterruptedRunError):
        train(plain(tree, run_dir, trackers=["tensorboard"]))
    monkeypatch.undo()
    train(plain(tree, run_dir, trackers=["tensorboard"]), resume=True)
    (folder,) = {path.parent for path in run_dir.rglob("*tfevents*") if path.parent.name == "run"}
    found = events.EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in found.Scalars("train_loss")] == [
        (record["epoch"], pytest.approx(record["train_loss"])) for record in log(run_dir)
    ]
    assert {yaml.safe_load(path.read_text())["optim.lr"] for path in run_dir.rglob("hparams.yml")} == {3e-3}
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert all(start["versions"]["torch"] == torch.__version__.split("+")[0] for start in starts)
    assert starts[0]["git_revision"] == git_revision()


def test_the_best_epochs_are_kept(tree, tmp_path):
    train(plain(tree, tmp_path, checkpoint=CheckpointConfig(keep=2), schedule=ScheduleConfig(5, warmup_epochs=0)))
    scores = sorted((-record["top1"], record["epoch"]) for record in log(tmp_path))
    kept = {path.name: load_checkpoint(path) for path in (tmp_path / "checkpoints").glob("epoch-*")}
    assert kept.keys() == {f"epoch-{epoch}.pt" for _, epoch in scores[:2]}
    assert all(len(content["history"]) == int(name[6:-3]) for name, content in kept.items())


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(tree, tmp_path):
    """By SIGKILL, and by a SIGTERM that workers get too. tools/kill_and_resume.py tests many."""
    content = yaml.safe_load(yaml.safe_dump(asdict(config(tree, "", checkpoint=CheckpointConfig(every_updates=1)))))
    content |= {"cpu_threads": 1, "schedule": content["schedule"] | {"epochs": 12}}
    content["data"]["num_workers"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    command = [str(Path(__file__).parents[2] / "tools" / "train.py"), "--config", str(tmp_path / "config.yaml")]
    for number in (signal.SIGKILL, signal.SIGTERM):
        test = KillTest(command, tmp_path / number.name, number, kills=1)
        for index in count():
            killed = test.run(index)
            if killed.moments:
                break
            # The run ended before the signal: the uninterrupted run was slower.
            test.start_seconds, test.run_seconds = test.start_seconds / 2, test.run_seconds / 2
        assert killed.differences == []


# CUDA graphs


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "precision"), [("adamw", "bf16"), ("adamw", "fp16"), ("lamb", "fp32")])
def test_a_gpu_skips_non_finite_updates(tree, tmp_path, monkeypatch, name, precision):
    """With torch's fused kernels, with the fp16 scaler, and with an optimizer that supports neither."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    poison(monkeypatch, {2, 5, 6})
    gpu = {"optim": OptimConfig(name, lr=3e-3, clip_grad=1.0), "precision": precision, "max_skipped": 2}
    train(config(tree, tmp_path / "run", **gpu))
    assert [record["skipped"] for record in log(tmp_path / "run")] == [1, 2, 0]
    last = state(tmp_path / "run")
    for tensor in (*last["model"].values(), *last["model_ema"].values()):
        assert tensor.isfinite().all()
    monkeypatch.undo()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    poison(monkeypatch, {3, 4, 5})
    with pytest.raises(RunError, match=r"loss is nan .* epoch 2, update 6, .* first in .* \(nan\)"):
        train(config(tree, tmp_path / "stopped", **gpu))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.gpu
def test_a_run_stopped_on_a_gpu_resumes_unchanged(tree, tmp_path, monkeypatch):
    """A model with batch norm: a checkpoint must not have seen the images of the next update."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    model = ModelConfig("resnet10t", kwargs={"in_chans": 1, "drop_rate": 0.1})
    train(config(tree, tmp_path / "whole", model=model))
    interrupt(monkeypatch, Classification, 5, signal.SIGTERM)
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM"):
        train(config(tree, tmp_path / "cut", model=model))
    train(config(tree, tmp_path / "cut", model=model), resume=True)
    whole, cut = (state(tmp_path / name) for name in ("whole", "cut"))
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(cut["model"][name], tensor, atol=1e-4, rtol=1e-3)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "kwargs"), [("vim_nano", {"depth": 2}), ("resnet10t", {}), ("vit_tiny_patch16_224", TINY)]
)
def test_a_seed_gives_the_same_weights_on_a_gpu(tree, tmp_path, monkeypatch, name, kwargs):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    model = ModelConfig(name, kwargs=kwargs | {"in_chans": 1, "drop_rate": 0.1})
    for run in ("one", "two"):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(config(tree, tmp_path / run, model=model, precision="bf16"))
    assert_same(state(tmp_path / "one")["model"], state(tmp_path / "two")["model"])
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"kwargs": TINY}),
        ("resnet10t", {"kwargs": {"in_chans": 1}}),
        ("vim_nano", {"kwargs": {"depth": 2, "in_chans": 1}, "grad_checkpointing": True}),
        ("adventurer_tiny", {"kwargs": {"depth": 3, "in_chans": 1}, "grad_checkpointing": True}),
    ],
)
def test_a_graph_trains_as_the_eager_step(tree, tmp_path, monkeypatch, name, options, precision):
    """With drop path, dropout, and buffers, which the capture's warm-up must not change."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    logs = []
    for cuda_graph in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        kwargs = options["kwargs"] | {"drop_rate": 0.1}
        model = ModelConfig(name, **options | {"kwargs": kwargs}, cuda_graph=cuda_graph)
        train(config(tree, tmp_path / f"{cuda_graph}", model=model, precision=precision))
        logs.append(log(tmp_path / f"{cuda_graph}"))
    for a, b in zip(*logs, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_when_cuda_graphs_are_not_used():
    gpu = {"device": torch.device("cuda"), "gradient_accumulation_steps": 1}
    vit = timm.create_model("vit_tiny_patch16_224", **TINY)
    assert wants_cuda_graph(vit, ModelConfig(), SimpleNamespace(**gpu), False)
    assert not wants_cuda_graph(vit, ModelConfig(), SimpleNamespace(**gpu), True)
    for other in (ModelConfig(cuda_graph=False), ModelConfig(compile=True), ModelConfig(grad_checkpointing=True)):
        assert not wants_cuda_graph(vit, other, SimpleNamespace(**gpu), False)
    for other in ({"device": torch.device("cpu")}, {"gradient_accumulation_steps": 2}):
        assert not wants_cuda_graph(vit, ModelConfig(), SimpleNamespace(**gpu | other), False)
    vim = timm.create_model("vim_nano", depth=1)
    assert wants_cuda_graph(vim, ModelConfig(grad_checkpointing=True), SimpleNamespace(**gpu), False)
