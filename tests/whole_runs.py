"""Shared by the tests of whole training runs."""

import json
import os
import signal

import pytest
import torch

from vim.checkpoint import load_checkpoint
from vim.data import AugmentConfig, DataConfig
from vim.experiments.kill_test import TIME_FIELDS
from vim.timm_models.config import ModelConfig
from vim.training import TrainConfig
from vim.training.averaging import EmaConfig
from vim.training.optim import OptimConfig, ScheduleConfig

TINY = {"img_size": 12, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def one_thread():
    """A second thread does not help tensors of this size, and costs milliseconds per operator on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(tree, run_dir, **changes):
    """A run with every kind of randomness (augmentation, mixing, drop path, dropout), and an EMA."""
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


def log(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def state(run_dir, name="last"):
    return load_checkpoint(run_dir / "checkpoints" / f"{name}.pt")


def timeless(history):
    return [{key: value for key, value in record.items() if key not in TIME_FIELDS} for record in history]


def interrupt(monkeypatch, task, update, number=signal.SIGINT):
    """Send a signal to a run during an update, counted from 0. task: a subclass of Trainer."""
    batch_loss = task.batch_loss

    def interrupted(self, batch):
        if self.state.update == update:
            os.kill(os.getpid(), number)
        return batch_loss(self, batch)

    monkeypatch.setattr(task, "batch_loss", interrupted)
