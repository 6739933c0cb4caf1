"""A trained detector in its run folder."""

from dataclasses import asdict, dataclass
from pathlib import Path

from vim.console.errors import RunError
from vim.timm_models.name import CONFIG
from vim.training.store import load_trained, read_about, save_trained

from .config import DetectionTrainConfig, DetectorConfig
from .detector import Detector


@dataclass
class StoredDetector:
    """A detector with its classes in label order, their ids in COCO's format, and where its weights are from."""

    model: Detector
    config: DetectorConfig
    classes: list[str]
    category_ids: list[int]
    weights: str = ""


def save_detector(detector: StoredDetector, folder: Path) -> None:
    # Weights that the training began with are no part of the trained model.
    config = asdict(detector.config) | {"pretrained": False, "checkpoint": None}
    about = {"detector": config, "classes": detector.classes, "category_ids": detector.category_ids}
    save_trained(detector.model, about, folder)


def load_detector(folder: str | Path, checkpoint: str | None = None) -> StoredDetector:
    """The detector of a run folder, in evaluation mode.

    Args:
        checkpoint: takes the weights from this file instead: safetensors, or a checkpoint of a run, of which the
            averaged weights count where there are any.

    Raises: RunError for a folder without a detector, or weights that do not fit it.
    """
    folder = Path(folder)
    about = read_about(folder, "detector", DetectionTrainConfig.TOOL)
    try:
        config, classes, ids = DetectorConfig(**about["detector"]), list(about["classes"]), list(about["category_ids"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / CONFIG} is damaged, or of another version: {error}") from error
    model = Detector(config, len(classes))
    weights = load_trained(model, folder, checkpoint)
    return StoredDetector(model.eval(), config, classes, ids, weights)
