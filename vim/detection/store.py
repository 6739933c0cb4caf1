"""A trained detector as files: model.safetensors and config.json in its run folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from vim.training.checkpoint import load_checkpoint
from vim.training.errors import RunError
from vim.training.files import whole_file, write_json

from .config import DetectorConfig
from .detector import Detector

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass
class StoredDetector:
    """A detector with its classes in label order and their ids in COCO's format."""

    model: Detector
    config: DetectorConfig
    classes: list[str]
    category_ids: list[int]


def save_detector(detector: StoredDetector, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Weights that the training began with are no part of the trained model.
    config = asdict(detector.config) | {"pretrained": False, "checkpoint": None}
    with whole_file(folder / WEIGHTS) as unfinished:
        save_file({k: v.detach().cpu().contiguous() for k, v in detector.model.state_dict().items()}, unfinished)
    about = {"detector": config, "classes": detector.classes, "category_ids": detector.category_ids}
    write_json(about, folder / CONFIG)


def load_detector(folder: str | Path, checkpoint: str | None = None) -> StoredDetector:
    """The detector of a run folder, in evaluation mode.

    Args:
        checkpoint: takes the weights from this file instead: safetensors, or a checkpoint of a run, of which the
            averaged weights count where there are any.

    Raises: RunError for a folder without a detector, or weights that do not fit it.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise RunError(f"no detector in {folder}: {folder / CONFIG} is missing; give the folder of a finished run")
    about = json.loads((folder / CONFIG).read_text())
    if "detector" not in about:
        raise RunError(f"{folder} holds no detector but a classifier; train one with tools/train_detection.py")
    config = DetectorConfig(**about["detector"])
    model = Detector(config, len(about["classes"]))
    weights = Path(checkpoint) if checkpoint else folder / WEIGHTS
    if weights.suffix == ".safetensors":
        state = load_file(weights)
    else:
        training = load_checkpoint(weights)
        state = training.get("model_ema", training.get("model", training))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"{weights} does not fit the detector of {folder}: {error}") from error
    return StoredDetector(model.eval(), config, about["classes"], about["category_ids"])
