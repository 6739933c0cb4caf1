"""Saving a trained detector to its run folder, and loading it."""

from dataclasses import asdict, dataclass
from pathlib import Path

from vim.console.errors import RunError
from vim.timm_models.name import CONFIG
from vim.training.store import load_trained, read_about, save_trained

from .detector import Detector, DetectorConfig

TRAINING_TOOL = "tools/train_detection.py"


@dataclass
class StoredDetector:
    """A detector, its classes in label order, their COCO category ids, and the source of its weights."""

    model: Detector
    config: DetectorConfig
    classes: list[str]
    category_ids: list[int]
    weights: str = ""


def save_detector(detector: StoredDetector, folder: Path) -> None:
    # Loading must not fetch the initial weights of the training run.
    config = asdict(detector.config) | {"pretrained": False, "checkpoint": None}
    about = {"detector": config, "classes": detector.classes, "category_ids": detector.category_ids}
    save_trained(detector.model, about, folder)


def load_detector(folder: str | Path, checkpoint: str | None = None) -> StoredDetector:
    """The detector of a run folder, in evaluation mode.

    Args:
        checkpoint: take the weights from this file instead: safetensors, or a checkpoint of a run; its averaged
            weights (EMA) if it has any.

    Raises: RunError for a folder without a detector or a damaged file; ConfigError for weights that do not fit.
    """
    folder = Path(folder)
    about = read_about(folder, "detector", TRAINING_TOOL)
    try:
        config, classes, ids = DetectorConfig(**about["detector"]), list(about["classes"]), list(about["category_ids"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / CONFIG} is damaged or from another version: {error}") from error
    model = Detector(config, len(classes))
    weights = load_trained(model, folder, checkpoint)
    return StoredDetector(model.eval(), config, classes, ids, weights)
