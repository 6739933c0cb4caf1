"""Image features of any timm model: export to shards, read them back, evaluate them with kNN and linear probes."""

from .config import FeaturesConfig, KnnConfig, LinearProbeConfig
from .export import export_features
from .report import knn, probe
from .store import Features, load

__all__ = ["Features", "FeaturesConfig", "KnnConfig", "LinearProbeConfig", "export_features", "knn", "load", "probe"]
