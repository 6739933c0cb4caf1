"""Image classification: its parts of a training run."""

from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from vim.data import (
    AugmentConfig,
    EvalImages,
    KeyedSampler,
    TrainImages,
    check_same_classes,
    eval_loader,
    eval_transform,
    open_images,
    train_loader,
    train_transform,
)

from .config import TrainConfig
from .evaluation import Evaluation, evaluate
from .graphs import capture_training, wants_cuda_graph
from .model import create_model, enable_grad_checkpointing, resolve_input
from .plots import write_plots
from .progress import Progress
from .run_folder import RunFolder
from .trainer import AUTOCAST, Trainer


class Classification(Trainer):
    """Training of an image classifier; see `Trainer`."""

    METRIC = "top1"
    config: TrainConfig

    def __init__(self, config: TrainConfig, accelerator: Accelerator, progress: Progress):
        super().__init__(config, accelerator, progress)
        data = config.data
        train, val = open_images(data, data.train_split, data.window), open_images(data, data.val_split)
        check_same_classes(train, val)
        self.classes = train.classes

        model = create_model(config.model, len(self.classes)).to(accelerator.device)
        self.data_config = resolve_input(model, config.model.kwargs, data)
        in_chans = self.data_config["input_size"][0]

        total_batch = self.images_per_update(data.batch_size)
        sampler = KeyedSampler(len(train), config.seed, config.augment.repeats, total_batch, train.shards, data.window)
        transform = train_transform(config.augment, self.data_config)
        images = TrainImages(train, transform, config.seed, in_chans, data.bad_images)
        held_out = EvalImages(val, eval_transform(self.data_config), in_chans, data.bad_images)
        self.mixup = create_mixup(config.augment, len(self.classes))
        self.loss = SoftTargetCrossEntropy() if self.mixup else LabelSmoothingCrossEntropy(config.augment.smoothing)
        self.prepare(
            model,
            train_loader(images, sampler, data.batch_size, data.num_workers),
            eval_loader(held_out, data.batch_size, data.num_workers),
            total_batch,
        )

    def accelerate_model(self, model: nn.Module) -> None:
        config, device = self.config, self.accelerator.device
        if config.model.grad_checkpointing:
            enable_grad_checkpointing(model, config.model.name)
        if config.model.compile:
            model.compile()  # in place: the names of the state dict stay
        if wants_cuda_graph(model, config.model, self.accelerator):
            sample = torch.zeros(config.data.batch_size, *self.data_config["input_size"], device=device)
            capture_training(model, sample, AUTOCAST[config.precision])

    def batch_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = self.mixup(*batch) if self.mixup is not None else batch
        return self.loss(self.model(images), targets)

    def evaluate_model(self, model: nn.Module) -> Evaluation:
        evaluation = evaluate(model, self.val_batches, self.accelerator, self.progress)
        self.state.bad_images.update(evaluation.bad_images)
        return evaluation

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.state.model.parameters())
        return (
            f"{self.config.model.name}: {parameters:,} parameters, {len(self.classes)} classes, input "
            f"{'x'.join(map(str, self.data_config['input_size']))}, {self.images_per_epoch} images an epoch, "
            f"{self.accelerator.num_processes} x {self.accelerator.device.type}"
        )

    def headline(self, record: dict[str, Any]) -> str:
        ema = f"  (averaged weights {record['ema_top1']:.2f})" if "ema_top1" in record else ""
        return f"val loss {record['loss']:.3f}  top-1 {record['top1']:.2f} %{ema}"

    def summary(self) -> dict[str, Any]:
        """Accuracies in percent, of the weights after the last epoch and of the best one."""
        last = self.state.history[-1]
        keys = ("top1", "top5", "ema_top1", "ema_top5")
        accuracies = {key: last[key] for key in keys if key in last}
        common = super().summary()
        return {"model": self.config.model.name} | accuracies | {"val_images": self.evaluation.images} | common

    def write_results(self, run: RunFolder, models: dict[str, nn.Module]) -> str:
        for name, model in models.items():
            run.export(model, self.config.model.kwargs, self.data_config, self.classes, name)
        last = self.state.history[-1]
        return (
            f"top-1 {last['top1']:.2f} %, top-5 {last['top5']:.2f} % on {self.evaluation.images} images\n"
            f"{write_plots(self.state.history, self.evaluation.confusion, self.classes, run.path)}"
        )


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
