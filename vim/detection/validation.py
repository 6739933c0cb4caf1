"""Evaluation of a trained detector on a data set."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vim.console.errors import ConfigError
from vim.console.output import make_output
from vim.console.progress import Progress
from vim.files import write_json
from vim.timm_models.accelerator import create_accelerator
from vim.timm_models.precision import Precision

from .coco import CocoData
from .evaluation import evaluate
from .loaders import DetectionEvalDataConfig, EvalImages, eval_loader
from .sheet import write_sheet
from .store import StoredDetector, load_detector


@dataclass
class DetectionValidateConfig:
    """The evaluation."""

    model: str = "runs/detection"
    """Run folder of a detector."""
    checkpoint: str | None = None
    """Weight file, for example runs/<name>/checkpoints/best.pt; null takes the weights of the run folder."""
    data: DetectionEvalDataConfig = field(default_factory=DetectionEvalDataConfig)
    precision: Precision = "fp32"
    """Autocast precision of the forward pass: fp32, bf16 or fp16; weights stay in fp32."""
    output: str = "runs/detection_results"
    """Folder for results.json, predictions.json (COCO's result format) and detections.png."""
    sheet: int = 8
    """Number of images in detections.png, evenly spread over the data; 0 writes no picture."""

    def __post_init__(self):
        if self.sheet < 0:
            raise ValueError(f"sheet must be 0 or more, got {self.sheet}")


def validate(config: DetectionValidateConfig) -> dict[str, Any]:
    """Evaluate a detector and write results.json, predictions.json and detections.png to config.output.

    Returns: the content of results.json: model, images, COCO's twelve metrics (0..1) of boxes and, prefixed with
        mask_, of masks, and per_class.
    Raises: DataError, ConfigError or RunError, with a message for the user.
    """
    accelerator = create_accelerator(config.precision)
    progress = Progress(accelerator.is_main_process)
    stored = load_detector(config.model, config.checkpoint)
    progress.line(f"weights: {stored.weights}")
    root = Path(config.data.root)
    data = CocoData(root / config.data.val_annotations, root / config.data.val_images, masks=stored.config.masks)
    _check_categories(stored, data, config)
    output = make_output(config.output)
    progress.line(data.describe())
    batches = accelerator.prepare(eval_loader(EvalImages(data), config.data.batch_size, config.data.num_workers))
    evaluation = evaluate(stored.model.to(accelerator.device), batches, data, accelerator, progress)
    results = {
        "model": config.model,
        "checkpoint": config.checkpoint,
        "annotations": str(root / config.data.val_annotations),
        "images": evaluation.images,
        **evaluation.metrics(),
        "per_class": evaluation.per_class,
        "precision": config.precision,
    }
    if accelerator.is_main_process:
        sheet = output / "detections.png"
        sheet.unlink(missing_ok=True)  # from an earlier evaluation
        write_json(evaluation.predictions, output / "predictions.json")
        write_json(results, output / "results.json")
        if config.sheet:
            try:
                write_sheet(data, evaluation, config.sheet, sheet)
            except ModuleNotFoundError as error:
                progress.line(f"no detections.png: {error}; pip install matplotlib")
    accelerator.end_training()
    return results


def _check_categories(stored: StoredDetector, data: CocoData, config: DetectionValidateConfig) -> None:
    mine = dict(zip(stored.category_ids, stored.classes, strict=True))
    if mine != data.categories:
        raise ConfigError(
            f"{config.model} was trained on the categories {mine}, {config.data.val_annotations} has {data.categories}"
        )
