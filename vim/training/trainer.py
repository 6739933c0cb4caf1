"""The training loop of any task: an epoch of updates."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from itertools import count
from typing import Any, ClassVar, NoReturn, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from vim.console.errors import InterruptedRunError, RunError
from vim.console.progress import Progress
from vim.data import DataError, KeyedSampler, SampleKey, derive_seed
from vim.data.errors import WorkerError
from vim.data.loaders import batches_of
from vim.timm_models.create import weights_from

from .averaging import AveragedWeights
from .checkpointer import Checkpointer
from .config import RunConfig
from .diagnosis import first_not_finite, gradient_norms, largest_activations
from .graphs import average_gradients
from .optim import create_optimizer, create_schedule
from .run_folder import RunFolder
from .sharding import shard
from .state import TrainingState, UpdateSplit
from .summary import summarise


@runtime_checkable
class TrainingData(Protocol):
    """The data set behind a training dataloader."""

    def __getitem__(self, key: SampleKey) -> Any: ...

    def name(self, key: SampleKey) -> str:
        """Path of the image."""


class Trainer(ABC):
    """Data, model and optimizer of a run, prepared for this process's device.

    A task is a subclass: it implements the abstract methods, and its constructor creates the model and the dataloaders
    and passes them to `prepare`.

    Args:
        config: of the run.
        accelerator: distributes batches, reduces gradients, casts.
        progress: where to report.
    """

    METRIC: ClassVar[str]  # the result of `evaluate` that ranks epochs

    def __init__(self, config: RunConfig, accelerator: Accelerator, progress: Progress):
        self.config, self.accelerator, self.progress = config, accelerator, progress
        self.sharded = config.fsdp and accelerator.num_processes > 1
        self._clock = 0.0
        self._pending: tuple[Tensor, torch.cuda.Event | None, float] | None = None  # an update not counted yet
        set_seed(config.seed)
        torch.backends.cudnn.deterministic = True  # otherwise its weight gradients may differ from run to run

    # Implemented by a task

    @abstractmethod
    def accelerate_model(self, model: nn.Module) -> bool:
        """Set up activation checkpointing, compilation or CUDA graphs, in place, after the EMA copy was made.

        Returns: whether CUDA graphs were captured.
        """

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch of the training dataloader, without its last element, the names of unreadable files. A
        task may mix its images first."""

    @abstractmethod
    def evaluate_model(self, model: nn.Module, after_batch: Callable[[], None]) -> Any:
        """Evaluate a model on the validation split. The result has `metrics(prefix)`: numbers by name."""

    @abstractmethod
    def describe(self) -> str:
        """One line about the model and the data."""

    @abstractmethod
    def headline(self, record: dict[str, Any]) -> str:
        """The results of an epoch in a few words."""

    @abstractmethod
    def write_results(self, run: RunFolder, models: dict[str, nn.Module]) -> str:
        """Write the models (see `TrainingState.models`) and plots of the finished run, on the main process.

        Returns: lines about them.
        """

    # Setting up and reporting

    def images_per_update(self, batch_size: int) -> int:
        """Images per update, over all processes and accumulated steps."""
        return self._split(batch_size).total_batch

    def _split(self, batch_size: int) -> UpdateSplit:
        return UpdateSplit(batch_size, self.accelerator.num_processes, self.config.accumulate)

    def prepare(
        self, model: nn.Module, train_batches: DataLoader, val_batches: DataLoader, data: dict[str, Any]
    ) -> None:
        """Create EMA, optimizer and schedule of a model that is on its device, and set up distributed training.

        Args:
            data: from `record_data`.
        """
        config, accelerator = self.config, self.accelerator
        assert train_batches.batch_size is not None
        split = self._split(train_batches.batch_size)
        total_batch = split.total_batch
        ema = AveragedWeights(model, config.ema.decay, use_warmup=config.ema.warmup) if config.ema.decay else None
        captured = self.accelerate_model(model)
        self._averages_gradients = captured and accelerator.num_processes > 1
        assert isinstance(train_batches.sampler, KeyedSampler)
        self.sampler = train_batches.sampler
        self.images_per_epoch = len(self.sampler)
        unsharded = deepcopy(model).cpu() if self.sharded else None
        if self.sharded:
            shard(model)
            if ema is not None:
                shard(ema.module)
        optimizer = create_optimizer(model, config.optim, total_batch, fused=not self.sharded)
        self._fused_optimizer = optimizer if optimizer.defaults.get("fused") else None
        # evaluation_mode: accelerate adds autocast only, not DistributedDataParallel.
        self.model = accelerator.prepare_model(model, evaluation_mode=self.sharded or self._averages_gradients)
        optimizer, self.train_batches, self.val_batches = accelerator.prepare(optimizer, train_batches, val_batches)
        schedule = create_schedule(optimizer, config.schedule, self.images_per_epoch // total_batch)
        self.state = TrainingState(
            model, optimizer, schedule, self.METRIC, split, data, ema, accelerator.scaler, unsharded
        )

    def initial_weights(self) -> str:
        """One line about the source of the initial weights."""
        return f"initial weights: {weights_from(self.state.model) or f'random (seed {self.config.seed})'}"

    def summary(self) -> dict[str, Any]:
        """Content of summary.json."""
        return summarise(self.state, self.config.seed, self.accelerator.device)

    def evaluate(self, after_batch: Callable[[], None]) -> dict[str, float]:
        """Results on the validation split; those of the EMA have the prefix ema_.

        Args:
            after_batch: called after each batch, on all processes; may raise.
        """
        self.evaluation = self.evaluate_model(self.model, after_batch)
        metrics = self.evaluation.metrics()
        if self.state.ema is not None:
            metrics |= self.evaluate_model(self.state.ema.module, after_batch).metrics("ema_")
        return metrics

    # The loop

    def train_epoch(self, checkpointer: Checkpointer) -> dict[str, Any]:
        """Train on the remaining images of the current epoch.

        Returns: mean loss, NaN if every update was skipped; learning rate of the last update; images per second over
            all processes.
        Raises: RunError if loss or gradient stay non-finite, or a worker fails; DataError for unreadable images;
            InterruptedRunError after a signal.
        """
        state, accelerator, accumulate = self.state, self.accelerator, self.config.accumulate
        images_per_step = state.total_batch // accumulate
        first, steps = state.so_far.images // images_per_step, self.images_per_epoch // images_per_step
        loss_sum = torch.zeros((), device=accelerator.device)  # over the steps of an update
        self._clock = time.perf_counter()
        self.model.train()
        with self.progress.bar(f"epoch {state.epoch + 1}/{self.config.schedule.epochs}", steps, first) as advance:
            for step, (*inputs, bad) in enumerate(self._remaining_batches(checkpointer), first + 1):
                state.bad_images.update(bad)
                with accelerator.accumulate(self.model):
                    loss_sum += self._backward(inputs, step).detach()
                    if accelerator.sync_gradients:
                        self._update_and_save(loss_sum / accumulate, checkpointer)
                        loss_sum.zero_()
                advance(f"loss {state.so_far.mean_loss:.3f}" if state.so_far.updates else "")
            self._count_update(checkpointer)
        so_far = state.so_far
        return {
            "train_loss": so_far.mean_loss,
            "lr": so_far.lr,
            "updates": state.update,
            "skipped": so_far.skipped,
            "images_per_second": self.images_per_epoch / so_far.seconds,
            "data_wait": so_far.waited / so_far.seconds,
        }

    def _backward(self, inputs: Any, step: int) -> Tensor:
        """Forward and backward pass of a step of this epoch, counted from 1. Returns its loss."""
        # Mixing, sampling, dropout and drop path depend on the step alone: no random state to save and restore.
        key = derive_seed("step", self.config.seed, self.state.epoch, step, self.accelerator.process_index)
        set_seed(key % 2**32)
        if self.sharded:
            self.model.set_requires_gradient_sync(self.accelerator.sync_gradients)
        loss = self.batch_loss(inputs)
        self.accelerator.backward(loss)
        if self._averages_gradients:
            average_gradients(self.state.model)
        return loss

    def _update_and_save(self, loss: Tensor, checkpointer: Checkpointer) -> None:
        """Update the weights; then save and stop, if due or requested."""
        save, stop = self._count_update(checkpointer)  # the update before
        self._update(loss, checkpointer)
        # On a GPU this update is counted after the next step: until then the CPU can run ahead. A checkpoint must be
        # saved at once, however, before batch norm sees the images of the next step.
        on_gpu = self.accelerator.device.type == "cuda"
        if save or stop or not on_gpu or checkpointer.due_at(self.state.update):
            later = self._count_update(checkpointer)
            checkpointer.after_update(save or later[0], stop or later[1])

    def _update(self, loss: Tensor, checkpointer: Checkpointer) -> None:
        """Update the weights if loss and gradient are finite. `_count_update` reads the result later."""
        accelerator, state = self.accelerator, self.state
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad or math.inf)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        # new_full fills on the GPU: copying a tensor from the CPU would wait for the GPU.
        requests = (loss.new_full((), float(request)) for request in checkpointer.requests())
        local = torch.stack([loss, norm.to(loss), *requests])
        result: Tensor = accelerator.reduce(local, "mean")
        finite = result[:2].isfinite().all()
        if accelerator.scaler is not None:  # fp16: the scaler itself skips non-finite gradients
            state.optimizer.step()
        elif self._fused_optimizer is not None:  # fused kernels skip the update on the GPU, as for torch's GradScaler
            self._fused_optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            state.optimizer.step()
        elif finite:
            state.optimizer.step()
        state.optimizer.zero_grad()
        lr = state.learning_rate
        state.end_update()
        on_cpu, copied = result, None
        if result.is_cuda:
            on_cpu, copied = torch.empty(result.shape, dtype=result.dtype, pin_memory=True), torch.cuda.Event()
            on_cpu.copy_(result, non_blocking=True)
            copied.record()
        self._pending = on_cpu, copied, lr

    def _count_update(self, checkpointer: Checkpointer) -> tuple[bool, bool]:
        """Count the last update, if it is not counted yet.

        Returns: whether any process requested a checkpoint at that update, and a stop.
        Raises: RunError, with a diagnosis in the run folder, after too many consecutive skipped updates.
        """
        if self._pending is None:
            return False, False
        (on_cpu, copied, lr), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        loss, norm, save, stop = on_cpu.tolist()
        made = math.isfinite(loss) and math.isfinite(norm)
        if not made and self.state.so_far.skipped_in_row == self.config.max_skipped:
            self._diagnose(loss, norm, lr, checkpointer)
        now = time.perf_counter()
        self.state.count_update(loss, made, lr, now - self._clock)
        self._clock = now
        return save > 0, stop > 0

    def _remaining_batches(self, checkpointer: Checkpointer) -> Iterator[Any]:
        """The remaining batches of this epoch, on this process. If loading fails, the last update is saved first."""
        done, accumulate = self.state.so_far.images, self.config.accumulate
        if done == self.images_per_epoch:
            return
        self.sampler.start_at(done)
        self.train_batches.set_epoch(self.state.epoch)
        batches, buffers = batches_of(self.train_batches), []
        # A signal need not wait for hanging workers. (One of several processes cannot end its update alone.)
        alone = self.accelerator.num_processes == 1
        waiting = checkpointer.interruption.admitted if alone and self.train_batches.num_workers else nullcontext
        for step in count():
            if accumulate > 1 and step % accumulate == 0:  # buffers of the last update, in case this one fails
                buffers = [buffer.clone() for buffer in self.state.model.buffers()]
            asked = time.perf_counter()
            try:
                with waiting():
                    batch = next(batches, None)
            except (DataError, OSError, RuntimeError) as error:
                self._save_after_failure(error, buffers, checkpointer)
                raise
            if batch is None:
                return
            self.state.so_far.waited += time.perf_counter() - asked
            yield batch

    # When a run cannot continue

    def _save_after_failure(self, error: Exception, buffers: list[Tensor], checkpointer: Checkpointer) -> None:
        """Save the last update, if this is the only process, and stop a run that got a signal.

        Raises: RunError for a worker that failed, with the command to resume.
        """
        saved = "The last checkpoint is kept"
        if self.accelerator.num_processes == 1:
            self._count_update(checkpointer)
            for buffer, value in zip(self.state.model.buffers(), buffers, strict=False):  # none without accumulation
                buffer.copy_(value)
            checkpointer.after_failure()
            saved = f"All up to update {self.state.update} is saved" if self.state.update else "The run had not begun"
        if isinstance(error, InterruptedRunError):
            checkpointer.stop()
        if isinstance(error, WorkerError):
            raise RunError(f"{error}. {saved}; resume with: {checkpointer.run.resume_command}") from error

    def _diagnose(self, loss: float, norm: float, lr: float, checkpointer: Checkpointer) -> NoReturn:
        """Repeat a skipped update, with the same weights, to find where values stop being finite."""
        state, accelerator, dataset = self.state, self.accelerator, self.train_batches.dataset
        assert isinstance(dataset, TrainingData)
        collate = self.train_batches.collate_fn
        assert collate is not None
        processes, accumulate = accelerator.num_processes, self.config.accumulate
        batch_size = state.total_batch // processes // accumulate
        keys, samples, steps = [], [], []
        state.optimizer.zero_grad()
        for place in range(accumulate):
            first = state.so_far.images + (place * processes + accelerator.process_index) * batch_size
            keys += self.sampler.keys(first, first + batch_size)
            samples += [dataset[key] for key in keys[-batch_size:]]
            *inputs, _ = collate(samples[-batch_size:])
            steps.append(send_to_device(inputs, accelerator.device))
            self._backward(steps[-1], state.so_far.images // (state.total_batch // accumulate) + place + 1)
        accelerator.unscale_gradients()
        norms = gradient_norms(state.model)

        @torch.no_grad()
        def forward() -> None:
            for images, *_ in steps:
                with accelerator.autocast():
                    state.model(images)

        state.model.eval()  # in eval mode no CUDA graph is replayed; a graph would run no hooks
        peaks = largest_activations(state.model, forward)
        report = {
            "epoch": state.epoch + 1,
            "update": state.update,
            "learning_rate": lr,
            "precision": self.config.precision,
            "loss": loss,
            "gradient_norm": norm,
            "gradient_norm_by_block": norms,
            "largest_activation_by_block": peaks,
            "files": [dataset.name(key) for key in keys],
        }
        folder = checkpointer.save_diagnosis(report, send_to_device(collate(samples), "cpu"))
        raise RunError(
            f"the loss is {loss} and the gradient norm {norm} in epoch {state.epoch + 1}, update {state.update}, after "
            f"{self.config.max_skipped} skipped updates, at learning rate {lr:.2g} and precision "
            f"{self.config.precision}. "
            f"Activations: {first_not_finite(peaks)}; gradients: {first_not_finite(norms)}. "
            f"Batch, weights and values by block are in {folder}. "
            "Lower optim.lr, set optim.clip_grad, or train in bf16 or fp32"
        )
