"""Training and evaluation of any timm model: timm's parts, accelerate's loop."""

from .cli import ConfigParser, plain_errors
from .config import TrainConfig, ValidateConfig
from .errors import ConfigError, InterruptedRunError, RunError
from .train import train
from .validate import validate

__all__ = [
    "ConfigError",
    "ConfigParser",
    "InterruptedRunError",
    "RunError",
    "TrainConfig",
    "ValidateConfig",
    "plain_errors",
    "train",
    "validate",
]
