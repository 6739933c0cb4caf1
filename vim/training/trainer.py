"""The loop of a training run: an epoch of updates, for any task."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, ClassVar, NoReturn, Protocol, runtime_checkable

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import send_to_device, set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from vim.data import KeyedSampler, SampleKey, derive_seed

from .checkpointer import Checkpointer
from .config import Precision, RunConfig
from .diagnosis import first_not_finite, gradient_norms, largest_activations
from .errors import ConfigError, RunError
from .optim import create_optimizer, create_schedule
from .progress import Progress
from .run_folder import RunFolder
from .sharding import shard
from .state import TrainingState
from .summary import summarise

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def create_accelerator(precision: Precision, accumulate: int = 1) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU; on a CPU accelerate would run fp32 without a word; choose bf16")
    return accelerator


@runtime_checkable
class TrainingData(Protocol):
    """What a loader of training batches reads from."""

    def __getitem__(self, key: SampleKey) -> Any: ...

    def name(self, key: SampleKey) -> str:
        """Path of the image."""


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
        self.sharded = config.fsdp and accelerator.num_processes > 1
        set_seed(config.seed)

    def images_per_update(self, batch_size: int) -> int:
        """Over all processes and accumulated steps."""
        return batch_size * self.accelerator.num_processes * self.config.accumulate

    def prepare(self, model: nn.Module, train_batches: DataLoader, val_batches: DataLoader, total_batch: int) -> None:
        """Make optimizer, schedule and averaged weights of a model that is on its device.

        Args:
            total_batch: images in an update.
        """
        config, accelerator = self.config, self.accelerator
        ema = ModelEmaV3(model, config.ema.decay, use_warmup=config.ema.warmup) if config.ema.decay else None
        self.accelerate_model(model)
        assert isinstance(train_batches.sampler, KeyedSampler)
        self.sampler = train_batches.sampler
        self.images_per_epoch = len(self.sampler)
        unsharded = deepcopy(model).cpu() if self.sharded else None
        if self.sharded:
            shard(model)
            if ema is not None:
                shard(ema.module)
        optimizer = create_optimizer(model, config.optim, total_batch)
        # (With evaluation_mode accelerate gives the model its autocast and nothing else.)
        self.model = accelerator.prepare_model(model, evaluation_mode=self.sharded)
        optimizer, self.train_batches, self.val_batches = accelerator.prepare(optimizer, train_batches, val_batches)
        schedule = create_schedule(optimizer, config.schedule, self.images_per_epoch // total_batch)
        self.state = TrainingState(
            model, optimizer, schedule, self.METRIC, total_batch, ema, accelerator.scaler, unsharded
        )

    @abstractmethod
    def accelerate_model(self, model: nn.Module) -> None:
        """Recompute, compile or capture what is to be, in place. (The copy for the averaged weights is made before.)"""

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch of the training loader, without its last part: the names of files that could not be
        read. A task may mix its images first."""

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
    def write_results(self, run: RunFolder, models: dict[str, nn.Module]) -> str:
        """Write models, those of the state, and plots of the finished run, on the main process; returns lines about
        them."""

    def summary(self) -> dict[str, Any]:
        """Content of summary.json."""
        return summarise(self.state, self.config.seed, self.accelerator.device)

    def train_epoch(self, checkpointer: Checkpointer) -> dict[str, Any]:
        """What is left of a pass over the training images.

        Returns: mean loss, learning rate of the last update, images per second over all processes.
        Raises: RunError if loss or gradient stay without finite numbers; InterruptedRunError after a signal.
        """
        state, accelerator, clock = self.state, self.accelerator, time.perf_counter()
        images_per_step = state.total_batch // self.config.accumulate
        first, steps = state.so_far.images // images_per_step, self.images_per_epoch // images_per_step
        loss_sum = torch.zeros((), device=accelerator.device)  # of an update
        self.model.train()
        with self.progress.bar(f"epoch {state.epoch + 1}/{self.config.schedule.epochs}", steps, first) as advance:
            for step, batch in enumerate(self._batches_left(), first + 1):
                # Mixing, sampling, dropout and drop path depend on the step alone: no generator to save and restore.
                key = derive_seed("step", self.config.seed, state.epoch, step, accelerator.process_index)
                set_seed(key % 2**32)
                *inputs, bad = batch
                state.bad_images.update(bad)
                with accelerator.accumulate(self.model):
                    if self.sharded:
                        self.model.set_requires_gradient_sync(accelerator.sync_gradients)
                    loss = self.batch_loss(inputs)
                    accelerator.backward(loss)
                    loss_sum += loss.detach()
                    if accelerator.sync_gradients:
                        loss_sum /= self.config.accumulate
                        now = time.perf_counter()
                        save, stop = self._update(loss_sum, now - clock, checkpointer)
                        clock = now
                        loss_sum.zero_()
                        checkpointer.after_update(save, stop)
                advance(f"loss {state.so_far.loss / max(state.so_far.updates, 1):.3f}")
        so_far = state.so_far
        return {
            "train_loss": so_far.loss / max(so_far.updates, 1),
            "lr": so_far.lr,
            "updates": state.update,
            "skipped": so_far.skipped,
            "images_per_second": self.images_per_epoch / so_far.seconds,
            "data_wait": so_far.waited / so_far.seconds,
        }

    def _batches_left(self) -> Iterator[Any]:
        """Of this epoch, on this process."""
        done = self.state.so_far.images
        if done == self.images_per_epoch:
            return
        self.sampler.start_at(done)
        self.train_batches.set_epoch(self.state.epoch)
        batches, asked = iter(self.train_batches), time.perf_counter()
        for batch in batches:
            self.state.so_far.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def _update(self, loss: Tensor, seconds: float, checkpointer: Checkpointer) -> tuple[bool, bool]:
        """Change the weights by the gradients of an update, if all is finite.

        Returns: whether any process wants a checkpoint, and to stop; it travels with the loss, for one wait in all.
        Raises: RunError, with a diagnosis in the run folder, if too many updates in a row had to be left out.
        """
        accelerator, optimizer = self.accelerator, self.state.optimizer
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad or math.inf)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        mine = torch.stack([loss, norm.to(loss), *torch.tensor(checkpointer.wishes()).to(loss)])
        mean_loss, norm, save, stop = accelerator.reduce(mine, "mean").tolist()  # type: ignore[union-attr]
        made = math.isfinite(mean_loss) and math.isfinite(norm)
        if made or accelerator.scaler is not None:  # the scaler of fp16 leaves the update out itself, and learns of it
            optimizer.step()
        if not made and self.state.so_far.skipped_in_row == self.config.max_skipped:
            self._diagnose(mean_loss, norm, checkpointer)
        optimizer.zero_grad()
        self.state.end_update(mean_loss, made, seconds)
        return save > 0, stop > 0

    def _diagnose(self, loss: float, norm: float, checkpointer: Checkpointer) -> NoReturn:
        """Say where an update stopped being finite. Weights are those before it, gradients its own."""
        state, accelerator, dataset = self.state, self.accelerator, self.train_batches.dataset
        assert isinstance(dataset, TrainingData)
        norms = gradient_norms(state.model)
        batch_size = state.total_batch // accelerator.num_processes // self.config.accumulate
        keys: list[SampleKey] = []
        for step in range(self.config.accumulate):
            first = state.so_far.images + (step * accelerator.num_processes + accelerator.process_index) * batch_size
            keys += self.sampler.keys(first, first + batch_size)
        assert self.train_batches.collate_fn is not None
        inputs, *_ = batch = self.train_batches.collate_fn([dataset[key] for key in keys])

        @torch.no_grad()
        def forward() -> None:
            with accelerator.autocast():
                state.model(send_to_device(inputs, accelerator.device))

        state.model.eval()  # without what a CUDA graph has of it, which runs no hooks
        report = {
            "epoch": state.epoch + 1,
            "update": state.update,
            "learning_rate": state.learning_rate,
            "precision": self.config.precision,
            "loss": loss,
            "gradient_norm": norm,
            "gradient_norm_by_block": norms,
            "largest_activation_by_block": (peaks := largest_activations(state.model, forward)),
            "files": [dataset.name(key) for key in keys],
        }
        folder = checkpointer.save_diagnosis(report, batch)
        raise RunError(
            f"loss is {loss} and the norm of the gradient {norm} in epoch {state.epoch + 1}, update "
            f"{state.update + 1}, as in the {self.config.max_skipped} updates before, at learning rate "
            f"{state.learning_rate:.2g} and precision {self.config.precision}. "
            f"Activations: {first_not_finite(peaks)}; gradients: {first_not_finite(norms)}. "
            f"Batch, weights and all blocks are in {folder}. "
            "Lower optim.lr, set optim.clip_grad, or train in bf16 or fp32"
        )
