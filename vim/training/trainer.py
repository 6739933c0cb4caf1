"""The loop of a training run: an epoch of updates, for any task."""

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
        self.clock = 0.0
        self.unsettled: tuple[Tensor, torch.cuda.Event | None, float] | None = None
        set_seed(config.seed)
        torch.backends.cudnn.deterministic = True  # its gradients of weights may differ from run to run

    def images_per_update(self, batch_size: int) -> int:
        """Over all processes and accumulated steps."""
        return self._split(batch_size).total_batch

    def _split(self, batch_size: int) -> UpdateSplit:
        return UpdateSplit(batch_size, self.accelerator.num_processes, self.config.accumulate)

    def prepare(
        self, model: nn.Module, train_batches: DataLoader, val_batches: DataLoader, data: dict[str, Any]
    ) -> None:
        """Make optimizer, schedule and averaged weights of a model that is on its device.

        Args:
            data: what `record_data` gives.
        """
        config, accelerator = self.config, self.accelerator
        assert train_batches.batch_size is not None
        split = self._split(train_batches.batch_size)
        total_batch = split.total_batch
        ema = AveragedWeights(model, config.ema.decay, use_warmup=config.ema.warmup) if config.ema.decay else None
        captured = self.accelerate_model(model)
        self.averages = captured and accelerator.num_processes > 1
        assert isinstance(train_batches.sampler, KeyedSampler)
        self.sampler = train_batches.sampler
        self.images_per_epoch = len(self.sampler)
        unsharded = deepcopy(model).cpu() if self.sharded else None
        if self.sharded:
            shard(model)
            if ema is not None:
                shard(ema.module)
        optimizer = create_optimizer(model, config.optim, total_batch, fused=not self.sharded)
        self.skips_on_gpu = optimizer if optimizer.defaults.get("fused") else None
        # (With evaluation_mode accelerate gives the model its autocast and nothing else.)
        self.model = accelerator.prepare_model(model, evaluation_mode=self.sharded or self.averages)
        optimizer, self.train_batches, self.val_batches = accelerator.prepare(optimizer, train_batches, val_batches)
        schedule = create_schedule(optimizer, config.schedule, self.images_per_epoch // total_batch)
        self.state = TrainingState(
            model, optimizer, schedule, self.METRIC, split, data, ema, accelerator.scaler, unsharded
        )

    @abstractmethod
    def accelerate_model(self, model: nn.Module) -> bool:
        """Recompute, compile or capture what is to be, in place. (The copy for the averaged weights is made before.)

        Returns: whether it is captured.
        """

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch of the training loader, without its last part: the names of files that could not be
        read. A task may mix its images first."""

    @abstractmethod
    def evaluate_model(self, model: nn.Module, after_batch: Callable[[], None]) -> Any:
        """The task's evaluation of a model on the validation split, with `metrics(prefix)`: numbers by name."""

    def evaluate(self, after_batch: Callable[[], None]) -> dict[str, float]:
        """Results on the validation split, those of the averaged weights with ema_ before their names.

        Args:
            after_batch: called after each batch, on all processes; may raise.
        """
        self.evaluation = self.evaluate_model(self.model, after_batch)
        metrics = self.evaluation.metrics()
        if self.state.ema is not None:
            metrics |= self.evaluate_model(self.state.ema.module, after_batch).metrics("ema_")
        return metrics

    def initial_weights(self) -> str:
        """Where they are from, in one line."""
        return f"initial weights: {weights_from(self.state.model) or f'random (seed {self.config.seed})'}"

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

        Returns: mean loss, NaN if every update was left out; learning rate of the last update, images per second over
            all processes.
        Raises: RunError if loss or gradient stay without finite numbers, or a worker fails; DataError for images that
            cannot be read; InterruptedRunError after a signal.
        """
        state, accelerator, accumulate = self.state, self.accelerator, self.config.accumulate
        images_per_step = state.total_batch // accumulate
        first, steps = state.so_far.images // images_per_step, self.images_per_epoch // images_per_step
        loss_sum = torch.zeros((), device=accelerator.device)  # of an update
        self.clock = time.perf_counter()
        self.model.train()
        with self.progress.bar(f"epoch {state.epoch + 1}/{self.config.schedule.epochs}", steps, first) as advance:
            for step, (*inputs, bad) in enumerate(self._batches_left(checkpointer), first + 1):
                state.bad_images.update(bad)
                with accelerator.accumulate(self.model):
                    loss_sum += self._backward(inputs, step).detach()
                    if accelerator.sync_gradients:
                        save, stop = self._settle(checkpointer)
                        self._update(loss_sum / accumulate, checkpointer)
                        loss_sum.zero_()
                        # A GPU is left to work on while the CPU prepares the next step, and what it found is read then;
                        # but a checkpoint must know all, and hold no batch norm that has seen the next images.
                        if save or stop or accelerator.device.type != "cuda" or checkpointer.wants(state.update):
                            later = self._settle(checkpointer)
                            checkpointer.after_update(save or later[0], stop or later[1])
                advance(f"loss {state.so_far.mean_loss:.3f}" if state.so_far.updates else "")
            self._settle(checkpointer)
        so_far = state.so_far
        return {
            "train_loss": so_far.mean_loss,
            "lr": so_far.lr,
            "updates": state.update,
            "skipped": so_far.skipped,
            "images_per_second": self.images_per_epoch / so_far.seconds,
            "data_wait": so_far.waited / so_far.seconds,
        }

    def _batches_left(self, checkpointer: Checkpointer) -> Iterator[Any]:
        """Of this epoch, on this process. If there is none to be had, the last update is saved first."""
        done, accumulate = self.state.so_far.images, self.config.accumulate
        if done == self.images_per_epoch:
            return
        self.sampler.start_at(done)
        self.train_batches.set_epoch(self.state.epoch)
        batches, buffers = batches_of(self.train_batches), []
        # A signal need not wait for workers that hang. (One of several processes cannot end its update alone.)
        alone = self.accelerator.num_processes == 1
        waiting = checkpointer.interruption.admitted if alone and self.train_batches.num_workers else nullcontext
        for step in count():
            if accumulate > 1 and step % accumulate == 0:  # the last update's, if another is not completed
                buffers = [buffer.clone() for buffer in self.state.model.buffers()]
            asked = time.perf_counter()
            try:
                with waiting():
                    batch = next(batches, None)
            except (DataError, OSError, RuntimeError) as error:
                self._give_up(error, buffers, checkpointer)
                raise
            if batch is None:
                return
            self.state.so_far.waited += time.perf_counter() - asked
            yield batch

    def _give_up(self, error: Exception, buffers: list[Tensor], checkpointer: Checkpointer) -> None:
        """Save the last update, if this process is alone and can, and end a run that a signal stops.

        Raises: RunError for a worker that failed, with how to go on.
        """
        saved = "What the last checkpoint has is kept"
        if self.accelerator.num_processes == 1:
            self._settle(checkpointer)
            for buffer, value in zip(self.state.model.buffers(), buffers, strict=False):  # none without accumulation
                buffer.copy_(value)
            checkpointer.after_failure()
            saved = f"All up to update {self.state.update} is saved" if self.state.update else "It had not begun"
        if isinstance(error, InterruptedRunError):
            checkpointer.stop()
        if isinstance(error, WorkerError):
            raise RunError(f"{error}. {saved}; go on with: {checkpointer.run.resume_command}") from error

    def _backward(self, inputs: Any, step: int) -> Tensor:
        """Gradients of a step of this epoch, counted from 1. Returns its loss."""
        # Mixing, sampling, dropout and drop path depend on the step alone: no generator to save and restore.
        key = derive_seed("step", self.config.seed, self.state.epoch, step, self.accelerator.process_index)
        set_seed(key % 2**32)
        if self.sharded:
            self.model.set_requires_gradient_sync(self.accelerator.sync_gradients)
        loss = self.batch_loss(inputs)
        self.accelerator.backward(loss)
        if self.averages:
            average_gradients(self.state.model)
        return loss

    def _update(self, loss: Tensor, checkpointer: Checkpointer) -> None:
        """Change the weights by the gradients of an update, if all is finite; what came of it waits for `_settle`."""
        accelerator, state = self.accelerator, self.state
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad or math.inf)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        # Filled in on the GPU: a copy of a tensor from the CPU would wait for all that the GPU has to do.
        wishes = (loss.new_full((), float(wish)) for wish in checkpointer.wishes())
        mine = torch.stack([loss, norm.to(loss), *wishes])
        found: Tensor = accelerator.reduce(mine, "mean")
        finite = found[:2].isfinite().all()
        if accelerator.scaler is not None:  # of fp16: it leaves out what is not finite itself, and learns of it
            state.optimizer.step()
        elif self.skips_on_gpu is not None:  # told as torch's GradScaler tells it
            self.skips_on_gpu.found_inf = (~finite).float()  # type: ignore[attr-defined]
            state.optimizer.step()
        elif finite:
            state.optimizer.step()
        state.optimizer.zero_grad()
        lr = state.learning_rate
        state.end_update()
        host, copied = found, None
        if found.is_cuda:
            host, copied = torch.empty(found.shape, dtype=found.dtype, pin_memory=True), torch.cuda.Event()
            host.copy_(found, non_blocking=True)
            copied.record()
        self.unsettled = host, copied, lr

    def _settle(self, checkpointer: Checkpointer) -> tuple[bool, bool]:
        """Count the update that was made last, if it is not counted yet.

        Returns: whether any process wanted a checkpoint then, and to stop.
        Raises: RunError, with a diagnosis in the run folder, if too many updates in a row had to be left out.
        """
        if self.unsettled is None:
            return False, False
        (host, copied, lr), self.unsettled = self.unsettled, None
        if copied is not None:
            copied.synchronize()
        loss, norm, save, stop = host.tolist()
        made = math.isfinite(loss) and math.isfinite(norm)
        if not made and self.state.so_far.skipped_in_row == self.config.max_skipped:
            self._diagnose(loss, norm, lr, checkpointer)
        now = time.perf_counter()
        self.state.count_update(loss, made, lr, now - self.clock)
        self.clock = now
        return save > 0, stop > 0

    def _diagnose(self, loss: float, norm: float, lr: float, checkpointer: Checkpointer) -> NoReturn:
        """Do an update again that was left out, to say where it stops being finite; the weights are still the same."""
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

        state.model.eval()  # without what a CUDA graph has of it, which runs no hooks
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
            f"loss is {loss} and the norm of the gradient {norm} in epoch {state.epoch + 1}, update {state.update}, as "
            f"in the {self.config.max_skipped} updates before, at learning rate {lr:.2g} and precision "
            f"{self.config.precision}. "
            f"Activations: {first_not_finite(peaks)}; gradients: {first_not_finite(norms)}. "
            f"Batch, weights and all blocks are in {folder}. "
            "Lower optim.lr, set optim.clip_grad, or train in bf16 or fp32"
        )
