"""Training a detector: the parts of a run that are specific to detection."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vim.console.errors import ConfigError
from vim.console.progress import Progress
from vim.data import KeyedSampler
from vim.files import write_json
from vim.timm_models.create import weights_from
from vim.timm_models.precision import AUTOCAST
from vim.training.config import RunConfig
from vim.training.data_record import names_within, record_data
from vim.training.graphs import capture_training, wants_cuda_graph
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

from .coco import CocoData
from .detector import Detector, DetectorConfig
from .evaluation import Evaluation, evaluate
from .loaders import DetectionDataConfig, EvalImages, TrainImages, eval_loader, train_loader
from .plots import plot_learning_curve
from .sheet import write_sheet
from .store import TRAINING_TOOL, StoredDetector, save_detector
from .transforms import JitterConfig, Target, train_transform

SHEET_IMAGES = 6


@dataclass
class DetectionTrainConfig(RunConfig):
    """The run."""

    TOOL: ClassVar[str] = TRAINING_TOOL

    model: DetectorConfig = field(default_factory=DetectorConfig)
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    augment: JitterConfig = field(default_factory=JitterConfig)


class Detection(Trainer):
    """The training run of a detector; see `Trainer`."""

    METRIC = "AP"
    config: DetectionTrainConfig

    def __init__(self, config: DetectionTrainConfig, accelerator: Accelerator, progress: Progress):
        super().__init__(config, accelerator, progress)
        data = config.data
        train = _read(data, data.train_annotations, data.train_images, config.model.masks)
        self.data = _read(data, data.val_annotations, data.val_images, config.model.masks)
        if train.categories != self.data.categories:
            raise ConfigError(
                f"{data.train_annotations} and {data.val_annotations} have different categories: "
                f"{train.categories} and {self.data.categories}"
            )
        self.about_data = f"training on {train.describe()}\nevaluating on {self.data.describe()}"
        model = Detector(config.model, len(train.classes)).to(accelerator.device)
        total_batch = self.images_per_update(data.batch_size)
        transform = train_transform(config.augment, config.model.img_size)
        images = TrainImages(train, transform, config.seed, data.passes, data.bad_images)
        sampler = KeyedSampler(len(images), config.seed, multiple_of=total_batch)
        self.prepare(
            model,
            train_loader(images, sampler, data.batch_size, data.num_workers),
            eval_loader(EvalImages(self.data), data.batch_size, data.num_workers),
            _record(train, self.data),
        )

    def accelerate_model(self, model: nn.Module) -> bool:
        assert isinstance(model, Detector)
        config, backbone = self.config, model.backbone
        if config.model.grad_checkpointing:
            model.set_grad_checkpointing()
        if config.model.compile:
            backbone.compile()  # not the heads: their shapes change with every image
        captured = wants_cuda_graph(model, config.model, self.accelerator, self.sharded)
        if captured:
            size = config.model.img_size
            sample = torch.zeros(config.data.batch_size, 3, size, size, device=self.accelerator.device)
            capture_training(backbone, sample, AUTOCAST[config.precision])
        return captured

    def batch_loss(self, batch: tuple[list[Tensor], list[Target]]) -> Tensor:
        return sum(self.model(*batch).values(), torch.zeros((), device=self.accelerator.device))

    def evaluate_model(self, model: nn.Module, after_batch: Callable[[], None]) -> Evaluation:
        return evaluate(model, self.val_batches, self.data, self.accelerator, self.progress, after_batch)

    def initial_weights(self) -> str:
        line, from_elsewhere = super().initial_weights(), weights_from(self.state.model) is not None
        return f"{line}; pyramid and heads: random (seed {self.config.seed})" if from_elsewhere else line

    def describe(self) -> str:
        model, parameters = self.config.model, sum(p.numel() for p in self.state.model.parameters())
        return (
            f"{model.detector} on {model.name}: {parameters:,} parameters, {len(self.data.classes)} classes, "
            f"{model.img_size} pixels, {self.images_per_epoch} images per epoch, "
            f"{self.accelerator.num_processes} x {self.accelerator.device.type}\n{self.about_data}"
        )

    def headline(self, record: dict[str, Any]) -> str:
        keys = ("AP", "AP50", "mask_AP", "ema_AP", "ema_AP50", "ema_mask_AP")
        return "  ".join(f"{key} {record[key]:.3f}" for key in keys if key in record)

    def summary(self) -> dict[str, Any]:
        """Average precisions, 0..1, of the weights after the last epoch and of the best ones."""
        about = {"model": self.config.model.name, "detector": self.config.model.detector}
        last, metrics = self.state.history[-1], self.evaluation.metrics()
        averaged = {f"ema_{name}": last[f"ema_{name}"] for name in metrics if f"ema_{name}" in last}
        counted = {"val_images": self.evaluation.images, "per_class": self.evaluation.per_class}
        return about | metrics | averaged | counted | super().summary()

    def write_results(self, run: RunFolder, models: dict[str, nn.Module]) -> str:
        """Write the models, predictions.json, detections.png and learning_curve.png."""
        for name, model in models.items():
            assert isinstance(model, Detector)
            stored = StoredDetector(model, self.config.model, self.data.classes, self.data.category_ids)
            save_detector(stored, run.path / name)
        predictions = run.path / "predictions.json"
        write_json(self.evaluation.predictions, predictions)
        lines = [self.headline(self.state.history[-1]), f"predictions: {predictions}"]
        curve, sheet = run.path / "learning_curve.png", run.path / "detections.png"
        try:
            plot_learning_curve(self.state.history, curve)
            write_sheet(self.data, self.evaluation, SHEET_IMAGES, sheet)
            lines.append(f"plots: {curve} {sheet}")
        except ModuleNotFoundError as error:
            lines.append(f"no plots: {error}; pip install matplotlib")
        return "\n".join(lines)


def _record(train: CocoData, val: CocoData) -> dict[str, Any]:
    classes = [f"{name} (id {number})" for number, name in train.categories.items()]
    splits = {"training": train, "evaluation": val}
    names = {split: names_within(data.folder, data) for split, data in splits.items()}
    return record_data(classes, names, {split: data.digest() for split, data in splits.items()})


def _read(data: DetectionDataConfig, annotations: str, images: str, masks: bool) -> CocoData:
    root = Path(data.root)
    return CocoData(root / annotations, root / images, masks=masks)
