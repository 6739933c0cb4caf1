"""Training of image classifiers."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vim.console.progress import Progress
from vim.data import AugmentConfig
from vim.timm_models.create import create_model_at, enable_grad_checkpointing, weights_from
from vim.timm_models.input import check_size, resolve_input
from vim.timm_models.precision import AUTOCAST

from .checkpointer import Checkpointer
from .classification_data import ClassificationData
from .config import TrainConfig
from .distillation import Teacher, distillation_loss
from .evaluation import Evaluation, evaluate
from .graphs import capture_training, wants_cuda_graph
from .plots import write_plots
from .progressive import check_sizes, create_model_of_sizes
from .run_folder import RunFolder
from .trainer import Trainer


class Classification(Trainer):
    """Training of an image classifier; see `Trainer`."""

    METRIC = "top1"
    config: TrainConfig

    def __init__(self, config: TrainConfig, accelerator: Accelerator, progress: Progress):
        super().__init__(config, accelerator, progress)
        sizes = [size for size, _ in config.data.progressive]
        data = ClassificationData(config.data)
        self.classes = data.classes
        if len(self.classes) == 1:
            progress.line(
                f"warning: {data.train.path} has one class, {self.classes[0]!r}: every answer is right, and nothing is "
                "learned"
            )

        create = create_model_of_sizes if sizes else create_model_at
        model, self.model_kwargs = create(config.model, len(self.classes), config.data.img_size)
        model = model.to(accelerator.device)
        self.data_config = resolve_input(model, self.model_kwargs, config.data)
        check_size(model, config.model.name, self.model_kwargs, self.data_config)
        check_sizes(model, config.model.name, self.data_config["input_size"], sizes)
        self.teacher = None
        if config.distill.teacher is not None:  # after the model: its initial weights must not depend on the teacher
            self.teacher = Teacher(config.distill, self.classes, self.data_config, accelerator)
            progress.line(f"the teacher's weights: {weights_from(self.teacher.model)}")
            if hasattr(model, "set_distilled_training"):
                model.set_distilled_training(True)  # logits of both heads
        self.mixup = create_mixup(config.augment, len(self.classes))
        self.loss = SoftTargetCrossEntropy() if self.mixup else LabelSmoothingCrossEntropy(config.augment.smoothing)
        total_batch = self.images_per_update(config.data.batch_size)
        self.prepare(
            model,
            data.train_batches(config.augment, self.data_config, config.seed, total_batch),
            data.val_batches(self.data_config),
            data.record(),
        )

    def accelerate_model(self, model: nn.Module) -> bool:
        config, device = self.config, self.accelerator.device
        if config.model.grad_checkpointing:
            enable_grad_checkpointing(model, config.model.name)
        if config.model.compile:
            model.compile()  # in place: the names of the state dict stay
        captured = wants_cuda_graph(model, config.model, self.accelerator, self.sharded)
        if captured:
            channels, height, width = self.data_config["input_size"]
            shapes = {(height, width): None} | {(size, size): None for size, _ in config.data.progressive}
            memory = torch.cuda.graph_pool_handle()
            for shape in shapes:  # the largest first: the others fit into its memory
                sample = torch.zeros(config.data.batch_size, channels, *shape, device=device)
                capture_training(model, sample, AUTOCAST[config.precision], memory)
        return captured

    def batch_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = self.mixup(*batch) if self.mixup is not None else batch
        logits = self.model(images)
        if self.teacher is None:
            return self.loss(logits, targets)
        logits, taught = logits if isinstance(logits, tuple) else (logits, logits)
        alpha = self.config.distill.alpha
        taught_loss = distillation_loss(taught, self.teacher(images), self.config.distill)
        return (1 - alpha) * self.loss(logits, targets) + alpha * taught_loss

    def train_epoch(self, checkpointer: Checkpointer) -> dict[str, Any]:
        record, early = super().train_epoch(checkpointer), self.config.data.early_sizes
        if early:
            epoch = self.state.epoch
            record["img_size"] = early[epoch] if epoch < len(early) else self.data_config["input_size"][1]
        return record

    def evaluate_model(self, model: nn.Module, after_batch: Callable[[], None]) -> Evaluation:
        evaluation = evaluate(model, self.val_batches, self.accelerator, self.progress, after_batch=after_batch)
        self.state.bad_images.update(evaluation.bad_images)
        return evaluation

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.state.model.parameters())
        early = "".join(f" ({epochs} epochs with {size} pixels)" for size, epochs in self.config.data.progressive)
        teacher = f", taught by {self.config.distill.teacher}" if self.teacher is not None else ""
        return (
            f"{self.config.model.name}: {parameters:,} parameters, {len(self.classes)} classes, input "
            f"{'x'.join(map(str, self.data_config['input_size']))}{early}, {self.images_per_epoch} images an epoch, "
            f"{self.accelerator.num_processes} x {self.accelerator.device.type}{teacher}"
        )

    def headline(self, record: dict[str, Any]) -> str:
        size = f"{record['img_size']} pixels  " if "img_size" in record else ""
        ema = f"  (EMA {record['ema_top1']:.2f} %)" if "ema_top1" in record else ""
        return f"{size}val loss {record['loss']:.3f}  top-1 {record['top1']:.2f} %{ema}"

    def summary(self) -> dict[str, Any]:
        """Accuracies in percent, after the last epoch and of the best one."""
        last = self.state.history[-1]
        keys = ("top1", "top5", "ema_top1", "ema_top5")
        accuracies = {key: last[key] for key in keys if key in last}
        common = super().summary()
        return {"model": self.config.model.name} | accuracies | {"val_images": self.evaluation.images} | common

    def write_results(self, run: RunFolder, models: dict[str, nn.Module]) -> str:
        for name, model in models.items():
            run.export(model, self.model_kwargs, self.data_config, self.classes, name)
        last = self.state.history[-1]
        return (
            f"top-1 {last['top1']:.2f} %, top-5 {last['top5']:.2f} % on {self.evaluation.images} images\n"
            f"{write_plots(self.state.history, self.evaluation.confusion, self.classes, run.path)}"
        )


def create_mixup(augment: AugmentConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix of a batch, with label smoothing; None if both are off."""
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
