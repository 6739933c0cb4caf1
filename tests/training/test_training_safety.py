"""Skipped updates, regular checkpoints, random seeds, the best epoch."""

import math
import os
import shlex
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from image_tree import write_image_tree
from whole_runs import TINY, config, interrupt, log, one_thread, state  # noqa: F401  (the fixture)

from vim.checkpoint import duplicate, load_checkpoint, replace, save_checkpoint
from vim.console import InterruptedRunError, RunError
from vim.console.interruption import Interruption
from vim.console.progress import Progress
from vim.data import AugmentConfig, DataConfig
from vim.timm_models.accelerator import create_accelerator
from vim.timm_models.config import ModelConfig
from vim.training import checkpointer, run_folder, train
from vim.training.averaging import AveragedWeights, EmaConfig
from vim.training.checkpointer import Checkpointer
from vim.training.classification import Classification
from vim.training.config import CheckpointConfig
from vim.training.optim import OptimConfig, ScheduleConfig
from vim.training.run_folder import RunFolder
from vim.training.state import TrainingState
from vim.training.trainer import Trainer

os.environ["ACCELERATE_USE_CPU"] = "true"
UPDATES = 4  # per epoch of 66 images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_image_tree(tmp_path_factory.mktemp("run") / "images", {"train": 66, "val": 15}, classes=3)


def plain(tree, run_dir, epochs=2, **changes):
    """A run in which only the data order is random."""
    defaults = {
        "model": ModelConfig("vit_tiny_patch16_224", kwargs=TINY),
        "augment": AugmentConfig(scale=(1, 1), ratio=(1, 1), hflip=0),
        "schedule": ScheduleConfig(epochs, warmup_epochs=0),
        "ema": EmaConfig(),
    }
    return config(tree, run_dir, **defaults | changes)


def spoil(monkeypatch, updates, value):
    """Put a value into the gradient of these updates; losses stay finite. Returns: a list that collects the losses."""
    losses, backward = [], Trainer._backward

    def spoilt(self, inputs, step):
        loss = backward(self, inputs, step)
        losses.append(loss.item())
        if self.state.update in updates:
            next(self.state.model.parameters()).grad.view(-1)[0] = value
        return loss

    monkeypatch.setattr(Trainer, "_backward", spoilt)
    return losses


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_with_a_finite_loss_is_skipped(tree, tmp_path, monkeypatch, clip_grad, value):
    weights, end_update = [], TrainingState.end_update

    def recorded(self):
        weights.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]))
        end_update(self)

    monkeypatch.setattr(TrainingState, "end_update", recorded)
    losses = spoil(monkeypatch, {2, 5, 6}, value)
    train(plain(tree, tmp_path / "run", optim=OptimConfig(lr=3e-3, clip_grad=clip_grad), max_skipped=2))
    assert all(map(math.isfinite, losses))
    unchanged = [update for update in range(1, 8) if torch.equal(weights[update - 1], weights[update])]
    assert unchanged == [2, 5, 6]
    records = log(tmp_path / "run")
    assert [record["skipped"] for record in records] == [1, 2]
    made = [losses[update] for update in (0, 1, 3)], [losses[update] for update in (4, 7)]
    assert [record["train_loss"] for record in records] == pytest.approx([sum(x) / len(x) for x in made], rel=1e-5)


@pytest.mark.parametrize("cut", [False, True])
def test_consecutive_skips_are_counted_across_epochs_and_a_stop(tree, tmp_path, monkeypatch, cut):
    spoil(monkeypatch, {2, 3, 4}, math.nan)
    run = plain(tree, tmp_path / "run", max_skipped=2)
    if cut:
        with monkeypatch.context() as patch:
            interrupt(patch, Classification, 3)
            with pytest.raises(InterruptedRunError):
                train(run)
    with pytest.raises(RunError, match=r"loss is \d.* gradient norm nan in epoch 2, update 5, after 2 skipped updates"):
        train(run, resume=cut)


def test_a_good_update_resets_the_count_of_skips(tree, tmp_path, monkeypatch):
    spoil(monkeypatch, {1, 2, 4, 5, 7}, math.nan)
    train(plain(tree, tmp_path / "run", max_skipped=2))
    assert [record["skipped"] for record in log(tmp_path / "run")] == [2, 3]


@pytest.mark.parametrize(
    ("every", "want"),
    [({"every_minutes": 12}, [3, 4, 4, 7, 8, 8]), ({"every_updates": 3}, [3, 4, 4, 6, 8, 8]), ({}, [4, 4, 8, 8])],
)
def test_a_run_is_saved_an_interval_after_the_last_save(tree, tmp_path, monkeypatch, every, want):
    """An update takes four minutes. At the end of an epoch a run is saved twice: before and after its evaluation."""
    saved, keep, backward = [], RunFolder.keep_new, Trainer._backward
    clock = SimpleNamespace(now=1000.0)

    def slow(self, *args):
        clock.now += 4 * 60
        return backward(self, *args)

    def noted(run, *also):
        saved.append(load_checkpoint(run.new)["update"])
        keep(run, *also)

    monkeypatch.setattr(checkpointer, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(Trainer, "_backward", slow)
    monkeypatch.setattr(RunFolder, "keep_new", noted)
    train(plain(tree, tmp_path, checkpoint=CheckpointConfig(**{"every_minutes": None} | every)))
    assert saved == want


def test_each_process_step_and_epoch_mixes_with_its_own_seed(tree, tmp_path, monkeypatch):
    """The key is the same in another start of the run."""
    mixing = AugmentConfig(mixup=1.0, cutmix=1.0)
    batch = torch.rand(16, 1, 12, 12), torch.arange(16) % 3

    def mixed(process=0, step=1, epoch=0, seed=0):
        run = Classification(
            plain(tree, tmp_path, augment=mixing, seed=seed), create_accelerator("fp32"), Progress(False)
        )
        run.state.history = [{}] * epoch
        found, mixup = [], run.mixup
        run.mixup = lambda *args: found.append(mixup(*args)) or found[-1]
        torch.manual_seed(99)  # whatever the process drew before does not matter
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "process_index", process)
            run._backward([t.clone() for t in batch], step)
        return torch.cat([t.flatten() for t in found[0]])

    kinds = [mixed(), mixed(process=1), mixed(step=2), mixed(epoch=1), mixed(seed=1)]
    assert torch.equal(mixed(), kinds[0])
    assert torch.equal(mixed(process=1), kinds[1])
    assert not any(torch.equal(a, b) for i, a in enumerate(kinds) for b in kinds[:i])


def test_ema_warmup_counts_all_updates_of_the_run(tree, tmp_path, monkeypatch):
    """1 - n^(-2/3) for update n, up to ema.decay, across epochs and a stop."""
    decays, apply = [], AveragedWeights.apply_update_

    def noted(self, model, decay):
        decays.append(decay)
        apply(self, model, decay)

    monkeypatch.setattr(AveragedWeights, "apply_update_", noted)
    run = plain(tree, tmp_path / "run", ema=EmaConfig(0.72, warmup=True))
    with monkeypatch.context() as patch:
        interrupt(patch, Classification, 5)
        with pytest.raises(InterruptedRunError):
            train(run)
    train(run, resume=True)
    assert decays == pytest.approx([min(0.72, 1 - n ** (-2 / 3)) for n in range(1, 2 * UPDATES + 1)])
    assert decays[-2:] == [0.72, 0.72]


def test_accumulated_steps_report_the_loss_of_one_large_step(tree, tmp_path):
    """Both leave out the images that fill no update: of 66, five updates of 12, or 16 steps of 4."""
    short = {"optim": OptimConfig(name="sgd", lr=0.1)}
    for batch_size, accumulate in ((12, 1), (4, 3)):
        data = DataConfig(str(tree), batch_size=batch_size, num_workers=0, crop_pct=1.0, mean=(0.3,), std=(0.2,))
        train(plain(tree, tmp_path / str(accumulate), data=data, accumulate=accumulate, **short))
    one, three = log(tmp_path / "1"), log(tmp_path / "3")
    assert [record["updates"] for record in one] == [record["updates"] for record in three] == [5, 10]
    for a, b in zip(one, three, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


@pytest.fixture
def begun(tree, tmp_path):
    """A run before its first update: its state and its checkpointer."""
    about = plain(tree, tmp_path / "run")
    trainer = Classification(about, create_accelerator("fp32"), Progress(False))
    run = RunFolder(about.run_dir, "")
    return trainer.state, Checkpointer(run, about.checkpoint, Interruption(), trainer.accelerator, trainer.state)


def test_a_resumed_state_keeps_its_fp16_scale_and_uses_this_machines_kernels(begun):
    """Kernels without found_inf would make a non-finite update."""
    state, _ = begun
    kernels = [group.get("fused") for group in state.optimizer.param_groups]
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    saved = state.state_dict()
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = True
    state.scaler = torch.amp.GradScaler("cpu")
    assert state.load_state_dict(saved) == []
    assert state.scaler.get_scale() == 8
    assert [group.get("fused") for group in state.optimizer.param_groups] == kernels


def test_another_number_of_processes_is_a_warning(begun):
    state, _ = begun
    split = {"batch_size": 8, "processes": 2, "accumulate": 1}
    (warning,) = state.load_state_dict(state.state_dict() | {"split": split})
    assert warning.startswith("warning: the run had 2 processes, now it has 1: ")


def test_a_checkpoint_that_does_not_fit_is_refused_in_a_line(begun):
    state, _ = begun
    saved = state.state_dict()
    with pytest.raises(RunError, match=r"^the checkpoint has no so_far, split: it is damaged, or [^\n]*$"):
        state.load_state_dict({key: value for key, value in saved.items() if key not in ("split", "so_far")})
    weights = {name: tensor for name, tensor in saved["model"].items() if name != "norm.weight"}
    for other in (weights, weights | {"norm.weight": torch.ones(3)}):
        with pytest.raises(RunError, match=r"^the checkpoint does not fit the run: [^\n]*norm.weight[^\n]*$"):
            state.load_state_dict(saved | {"model": other})


def test_a_save_has_the_bad_images_of_all_processes_and_replaces_leftovers(begun, monkeypatch):
    """A killed save of a sharded model leaves a folder, perhaps with shards of more processes."""
    state, keeper = begun
    state.bad_images = {"mine"}
    monkeypatch.setattr(checkpointer, "gather_object", lambda found: [*found, {"of another"}])
    keeper.run.new.mkdir(parents=True)
    (keeper.run.new / "shard-7-of-8.pt").write_bytes(b"half")
    keeper.save()
    assert load_checkpoint(keeper.run.last)["bad_images"] == ["mine", "of another"]
    assert not keeper.run.new.exists()


@pytest.mark.parametrize("done", range(4))
def test_a_kill_during_a_save_never_loses_the_best_epoch(tmp_path, monkeypatch, done):
    """After a kill at any step of a save, the last checkpoint is intact and best.pt is at least as new."""
    run, steps = RunFolder(tmp_path, ""), []
    also = [run.best, run.epoch(2)]
    run.checkpoints.mkdir()

    def write(update):
        save_checkpoint({"update": update}, run.new)

    write(1)
    run.keep_new(*also)
    write(2)

    def counted(step, *paths):
        if len(steps) == done:
            raise KeyboardInterrupt
        steps.append(paths)
        step(*paths)

    for step in (duplicate, replace):
        monkeypatch.setattr(run_folder, step.__name__, partial(counted, step))
    with suppress(KeyboardInterrupt):
        run.keep_new(*also)
    assert len(steps) == done
    newest = run.load(lambda _: None)["update"]
    assert all(load_checkpoint(path)["update"] >= newest for path in also)


def test_a_run_that_another_process_has_just_begun_is_refused(tree, tmp_path):
    folder = tmp_path / "my run"
    one, other = RunFolder(folder, "tools/train.py"), RunFolder(folder, "tools/train.py")
    about = plain(tree, folder)
    for run in (one, other):
        run.check(about, resume=False)
    one.begin(about, resume=False)
    one.lock.release()
    with pytest.raises(RunError, match=r"run folder .* exists; resume it: .*; or") as refused:
        other.begin(plain(tree, folder, epochs=7), resume=False)
    command = str(refused.value).split("; ")[1].removeprefix("resume it: ")
    assert shlex.split(command) == ["python", "tools/train.py", "--config", str(folder / "config.yaml"), "--resume"]
    other.lock.release()
    one.check(about, resume=True)


def test_every_epoch_has_its_own_order(tree, tmp_path, monkeypatch):
    labels, batch_loss = [], Classification.batch_loss

    def noted(self, batch):
        labels.extend(batch[1].tolist())
        return batch_loss(self, batch)

    monkeypatch.setattr(Classification, "batch_loss", noted)
    train(plain(tree, tmp_path / "run"))
    assert labels[:64] != labels[64:]
    assert len(labels) == 128


@pytest.mark.parametrize(
    ("top1", "ema_top1", "best"),
    [([10, 30, 30, 20], None, 2), ([40, 10, 20, 30], [10, 20, 30, 30], 3), ([10, 10, 10, 10], None, 1)],
)
def test_the_best_epoch_is_the_first_with_the_highest_score(tree, tmp_path, monkeypatch, top1, ema_top1, best):
    """By the EMA if there is one; a stop does not change it."""
    evaluate = Classification.evaluate

    def scored(self, after_batch):
        epoch = self.state.epoch
        averaged = {} if ema_top1 is None else {"ema_top1": float(ema_top1[epoch])}
        return evaluate(self, after_batch) | {"top1": float(top1[epoch])} | averaged

    monkeypatch.setattr(Classification, "evaluate", scored)
    run = plain(tree, tmp_path / "run", epochs=4, ema=EmaConfig(0.9 if ema_top1 else 0.0))
    with monkeypatch.context() as patch:
        interrupt(patch, Classification, 3 * UPDATES + 1)
        with pytest.raises(InterruptedRunError):
            train(run)
    summary = train(run, resume=True)
    assert summary["best_epoch"] == best
    assert summary["best_top1"] == (ema_top1 or top1)[best - 1]
    kept = state(tmp_path / "run", "best")
    assert (len(kept["history"]), kept["update"]) == (best, best * UPDATES)
