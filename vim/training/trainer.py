"""The loop of a training run: an epoch of updates, for any task."""

import math
import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vim.data import derive_seed

from .config import Precision, RunConfig
from .errors import ConfigError, RunError
from .optim import create_optimizer, create_schedule
from .progress import Progress
from .run_folder import RunFolder
from .state import TrainingState
from .summary import summarise

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS_BETWEEN_CHECKS = 20  # reading the loss waits for the GPU


def create_accelerator(precision: Precision, accumulate: int = 1) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU; on a CPU accelerate would run fp32 without a word; choose bf16")
    return accelerator


class Trainer(ABC):
    """Data, model and optimizer of a run, prepared for this process's device.

    A task is a subclass: its constructor makes model and loaders and hands them to `prepare`.

    Args:
        config: of the run.
        accelerator: deals out batches, reduces gradients, casts.
        progress: where to report.
    """

    METRIC: ClassVar[str]  # the result of `evaluate` that makes an epoch the best

    def __init__(self, config: RunConfig, accelerator: Accelerator, progress: Progress):
        self.config, self.accelerator, self.progress = config, accelerator, progress
        set_seed(config.seed)

    def images_per_update(self, batch_size: int) -> int:
        """Over all processes and accumulated steps."""
        return batch_size * self.accelerator.num_processes * self.config.accumulate

    def prepare(self, model: nn.Module, train_batches: DataLoader, val_batches: DataLoader, total_batch: int) -> None:
        """Make optimizer, schedule and averaged weights of a model that is on its device.

        Args:
            total_batch: images in an update.
        """
        config = self.config
        optimizer = create_optimizer(model, config.optim, total_batch)
        ema = ModelEmaV3(model, decay=config.ema.decay) if config.ema.decay else None
        self.accelerate_model(model)
        self.images_per_epoch = len(train_batches.sampler)  # type: ignore[arg-type]
        self.model, optimizer, self.train_batches, self.val_batches = self.accelerator.prepare(
            model, optimizer, train_batches, val_batches
        )
        schedule = create_schedule(optimizer, config.schedule, self.images_per_epoch // total_batch)
        self.state = TrainingState(model, optimizer, schedule, self.METRIC, ema, self.accelerator.scaler)

    @abstractmethod
    def accelerate_model(self, model: nn.Module) -> None:
        """Recompute, compile or capture what is to be, in place. (The copy for the averaged weights is made before.)"""

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch of the training loader; a task may mix its images first."""

    @abstractmethod
    def evaluate_model(self, model: nn.Module) -> Any:
        """The task's evaluation of a model on the validation split, with `metrics(prefix)`: numbers by name."""

    def evaluate(self) -> dict[str, float]:
        """Results on the validation split, those of the averaged weights with ema_ before their names."""
        self.evaluation = self.evaluate_model(self.model)
        metrics = self.evaluation.metrics()
        if self.state.ema is not None:
            metrics |= self.evaluate_model(self.state.ema.module).metrics("ema_")
        return metrics

    @abstractmethod
    def describe(self) -> str:
        """What is about to train, in one line."""

    @abstractmethod
    def headline(self, record: dict[str, Any]) -> str:
        """The results of an epoch, in a few words."""

    @abstractmethod
    def write_results(self, run: RunFolder) -> str:
        """Write models and plots of the finished run, on the main process; returns lines about them."""

    def summary(self) -> dict[str, Any]:
        """Content of summary.json."""
        return summarise(self.state, self.config.seed, self.accelerator.device)

    def train_epoch(self) -> dict[str, Any]:
        """One pass over the training images.

        Returns: mean loss, learning rate of the last update, images per second over all processes.
        Raises: RunError if the loss is no longer finite.
        """
        accelerator, state = self.accelerator, self.state
        epoch, steps, start = state.epoch, len(self.train_batches), time.perf_counter()
        total = torch.zeros((), device=accelerator.device)
        self.model.train()
        self.train_batches.set_epoch(epoch)
        with self.progress.bar(f"epoch {epoch + 1}/{self.config.schedule.epochs}", steps) as advance:
            for step, batch in enumerate(self.train_batches, 1):
                # Mixing, sampling, dropout and drop path depend on the step alone: no generator to save and restore.
                key = derive_seed("step", self.config.seed, epoch, step, accelerator.process_index)
                set_seed(key % 2**32)
                with accelerator.accumulate(self.model):
                    loss = self.batch_loss(batch)
                    accelerator.backward(loss)
                    if self.config.optim.clip_grad and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                if accelerator.sync_gradients:
                    lr = state.learning_rate
                    state.end_update()
                total += loss.detach()
                if step % STEPS_BETWEEN_CHECKS == 0 or step == steps:
                    mean = self._finite_mean(total / step, step)
                advance(f"loss {mean:.3f}" if step >= STEPS_BETWEEN_CHECKS else "")
        seconds = time.perf_counter() - start
        rate = self.images_per_epoch / seconds
        return {"train_loss": mean, "lr": lr, "updates": state.update, "images_per_second": rate}

    def _finite_mean(self, loss: Tensor, step: int) -> float:
        """Mean of a loss over the processes, the same on all of them, so that they stop together."""
        mean = self.accelerator.reduce(loss, "mean").item()  # type: ignore[union-attr]
        if not math.isfinite(mean):
            raise RunError(
                f"loss is {mean} in epoch {self.state.epoch + 1}, within {STEPS_BETWEEN_CHECKS} steps before step "
                f"{step}, at learning rate {self.state.learning_rate:.2g} and precision "
                f"{self.config.precision}; lower optim.lr, set optim.clip_grad, or train in bf16 or fp32"
            )
        return mean
