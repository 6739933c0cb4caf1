"""Features of any timm model for images: exported to a folder of shards, and read back with one call."""

from .config import FeaturesConfig
from .export import export_features
from .store import Features, load

__all__ = ["Features", "FeaturesConfig", "export_features", "load"]
