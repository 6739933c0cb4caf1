"""Detection: torchvision's heads and a cascade on any timm backbone, COCO's data format and metrics."""

from .boxes_csv import boxes_to_coco
from .coco import CocoData
from .config import DetectionTrainConfig, DetectionValidateConfig, DetectorConfig
from .detector import Detector
from .evaluation import METRICS, coco_metrics
from .store import load_detector
from .training import Detection
from .trees import write_trees
from .validation import validate

__all__ = [
    "METRICS",
    "CocoData",
    "Detection",
    "DetectionTrainConfig",
    "DetectionValidateConfig",
    "Detector",
    "DetectorConfig",
    "boxes_to_coco",
    "coco_metrics",
    "load_detector",
    "validate",
    "write_trees",
]
