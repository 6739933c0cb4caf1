"""Models; importing this registers them with timm."""

from .adventurer import Adventurer
from .arm import ARM
from .mambar import MambaR
from .videomamba import VideoMamba
from .vision_mamba import VisionMamba

__all__ = ["ARM", "Adventurer", "MambaR", "VideoMamba", "VisionMamba"]
