"""Training and evaluation of any timm model: timm's parts, accelerate's loop."""

from .classification import Classification
from .config import TrainConfig
from .run import train
from .tool import training_tool
from .validation import ValidateConfig, validate

__all__ = ["Classification", "TrainConfig", "ValidateConfig", "train", "training_tool", "validate"]
