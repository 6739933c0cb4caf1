"""Models; importing this registers them with timm."""

from .vision_mamba import VisionMamba

__all__ = ["VisionMamba"]
