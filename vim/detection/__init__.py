"""Object detection on any timm backbone: torchvision's heads and a cascade, COCO's data format and metrics."""

from .boxes_csv import boxes_to_coco
from .coco import CocoData
from .detector import Detector, DetectorConfig
from .evaluation import METRICS, coco_metrics
from .store import load_detector
from .training import Detection, DetectionTrainConfig
from .trees import write_trees
from .validation import DetectionValidateConfig, validate

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
