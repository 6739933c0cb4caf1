"""Models; importing this registers them with timm."""

from .adventurer import Adventurer
from .mambar import MambaR
from .videomamba import VideoMamba
from .vision_mamba import VisionMamba

__all__ = ["Adventurer", "MambaR", "VideoMamba", "VisionMamba"]
