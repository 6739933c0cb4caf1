"""Detection: torchvision's heads and a cascade on any timm backbone, COCO's data format and metrics."""

from .benchmark import build_detector_step
from .boxes_csv import boxes_to_coco
from .coco import CocoData
from .config import DetectionBenchmarkConfig, DetectionTrainConfig, DetectionValidateConfig, DetectorConfig
from .detector import Detector
from .evaluation import METRICS, coco_metrics
from .store import load_detector
from .training import Detection
from .trees import write_trees
from .validate import validate

__all__ = [
    "METRICS",
    "CocoData",
    "Detection",
    "DetectionBenchmarkConfig",
    "DetectionTrainConfig",
    "DetectionValidateConfig",
    "Detector",
    "DetectorConfig",
    "boxes_to_coco",
    "build_detector_step",
    "coco_metrics",
    "load_detector",
    "validate",
    "write_trees",
]
