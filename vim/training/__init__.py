"""Training and evaluation of any timm model, built from timm's parts and accelerate."""

from .classification import Classification
from .config import TrainConfig
from .run import train
from .tool import training_tool
from .validation import ValidateConfig, validate

__all__ = ["Classification", "TrainConfig", "ValidateConfig", "train", "training_tool", "validate"]
