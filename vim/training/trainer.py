"""The parts of a training run, put together, and one epoch of it."""

import math
import time
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

from vim.data import (
    AugmentConfig,
    EvalImages,
    ImageFolder,
    KeyedSampler,
    TrainImages,
    check_same_classes,
    derive_seed,
    eval_loader,
    eval_transform,
    train_loader,
    train_transform,
)

from .config import Precision, TrainConfig
from .errors import ConfigError, RunError
from .evaluation import Evaluation, evaluate
from .graphs import capture_training, wants_cuda_graph
from .model import create_model, enable_grad_checkpointing, resolve_input
from .optim import create_optimizer, create_schedule
from .progress import Progress
from .state import TrainingState

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


class Trainer:
    """Data, model and optimizer of a run, prepared for this process's device.

    Args:
        config: of the run.
        accelerator: deals out batches, reduces gradients, casts.
        progress: where to report.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, progress: Progress):
        self.config, self.accelerator, self.progress = config, accelerator, progress
        data, seed = config.data, config.seed

        train_folder, val_folder = (ImageFolder(data.root, split) for split in (data.train_split, data.val_split))
        check_same_classes(train_folder, val_folder)
        self.classes = train_folder.classes

        set_seed(seed)
        model = create_model(config.model, len(self.classes)).to(accelerator.device)
        self.data_config = resolve_input(model, config.model.kwargs, data)
        in_chans = self.data_config["input_size"][0]

        total_batch = data.batch_size * accelerator.num_processes * config.accumulate
        sampler = KeyedSampler(len(train_folder), seed, config.augment.repeats, multiple_of=total_batch)
        images = TrainImages(train_folder, train_transform(config.augment, self.data_config), seed, in_chans)
        train_batches = train_loader(images, sampler, data.batch_size, data.num_workers)
        held_out = EvalImages(val_folder, eval_transform(self.data_config), in_chans)
        val_batches = eval_loader(held_out, data.batch_size, data.num_workers)
        self.images_per_epoch = len(sampler)

        optimizer = create_optimizer(model, config.optim, total_batch)
        ema = ModelEmaV3(model, decay=config.ema.decay) if config.ema.decay else None
        if config.model.grad_checkpointing:
            enable_grad_checkpointing(model, config.model.name)
        if config.model.compile:
            model.compile()  # in place: the names of the state dict stay
        if wants_cuda_graph(model, config, accelerator):
            sample = torch.zeros(data.batch_size, *self.data_config["input_size"], device=accelerator.device)
            capture_training(model, sample, AUTOCAST[config.precision])
        self.mixup = create_mixup(config.augment, len(self.classes))
        self.loss = SoftTargetCrossEntropy() if self.mixup else LabelSmoothingCrossEntropy(config.augment.smoothing)

        self.model, optimizer, self.train_batches, self.val_batches = accelerator.prepare(
            model, optimizer, train_batches, val_batches
        )
        schedule = create_schedule(optimizer, config.schedule, self.images_per_epoch // total_batch)
        self.state = TrainingState(model, optimizer, schedule, ema, accelerator.scaler)

    def describe(self) -> str:
        """What is about to train, in one line."""
        parameters = sum(p.numel() for p in self.state.model.parameters())
        return (
            f"{self.config.model.name}: {parameters:,} parameters, {len(self.classes)} classes, input "
            f"{'x'.join(map(str, self.data_config['input_size']))}, {self.images_per_epoch} images an epoch, "
            f"{self.accelerator.num_processes} x {self.accelerator.device.type}"
        )

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
            for step, (images, targets) in enumerate(self.train_batches, 1):
                # Mixing, dropout and drop path depend on the step alone: no generator state to save and restore.
                key = derive_seed("step", self.config.seed, epoch, step, accelerator.process_index)
                set_seed(key % 2**32)
                if self.mixup is not None:
                    images, targets = self.mixup(images, targets)
                with accelerator.accumulate(self.model):
                    loss = self.loss(self.model(images), targets)
                    accelerator.backward(loss)
                    if self.config.optim.clip_grad and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                if accelerator.sync_gradients:
                    lr = state.optimizer.param_groups[0]["lr"]
                    state.end_update()
                total += loss.detach()
                if step % STEPS_BETWEEN_CHECKS == 0 or step == steps:
                    mean = self._finite_mean(total / step, step)
                advance(f"loss {mean:.3f}" if step >= STEPS_BETWEEN_CHECKS else "")
        seconds = time.perf_counter() - start
        rate = self.images_per_epoch / seconds
        return {"train_loss": mean, "lr": lr, "updates": state.update, "images_per_second": rate}

    def _finite_mean(self, loss: torch.Tensor, step: int) -> float:
        """Mean of a loss over the processes, the same on all of them, so that they stop together."""
        mean = self.accelerator.reduce(loss, "mean").item()  # type: ignore[union-attr]
        if not math.isfinite(mean):
            raise RunError(
                f"loss is {mean} in epoch {self.state.epoch + 1}, within {STEPS_BETWEEN_CHECKS} steps before step "
                f"{step}, at learning rate {self.state.optimizer.param_groups[0]['lr']:.2g} and precision "
                f"{self.config.precision}; lower optim.lr, set optim.clip_grad, or train in bf16 or fp32"
            )
        return mean

    def evaluate(self) -> tuple[Evaluation, dict[str, float]]:
        """Evaluate on the validation split.

        Returns: the evaluation of the weights in training, and its metrics with those of the averaged weights.
        """
        evaluation = evaluate(self.model, self.val_batches, self.accelerator, self.progress)
        metrics = evaluation.metrics()
        if self.state.ema is not None:
            averaged = evaluate(self.state.ema.module, self.val_batches, self.accelerator, self.progress)
            metrics |= averaged.metrics("ema_")
        return evaluation, metrics


def create_mixup(augment: AugmentConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix of a batch, which smooths the targets too; None where both are off."""
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch_prob,
        label_smoothing=augment.smoothing,
        num_classes=num_classes,
    )
