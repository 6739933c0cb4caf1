"""Features of any timm model for images: exported to shards, read back with one call, judged by simple classifiers."""

from .config import FeaturesConfig, KnnConfig, LinearProbeConfig
from .export import export_features
from .report import knn, probe
from .store import Features, load

__all__ = ["Features", "FeaturesConfig", "KnnConfig", "LinearProbeConfig", "export_features", "knn", "load", "probe"]
