"""Training, evaluation and benchmark of any timm model: timm's parts, accelerate's loop."""

from .benchmark import benchmark, benchmark_table
from .classification import Classification
from .cli import ConfigParser, plain_errors
from .config import BenchmarkConfig, PushConfig, TrainConfig, ValidateConfig
from .errors import ConfigError, InterruptedRunError, RunError
from .hub import push_to_hub
from .tool import training_tool
from .train import train
from .validate import validate

__all__ = [
    "BenchmarkConfig",
    "Classification",
    "ConfigError",
    "ConfigParser",
    "InterruptedRunError",
    "PushConfig",
    "RunError",
    "TrainConfig",
    "ValidateConfig",
    "benchmark",
    "benchmark_table",
    "plain_errors",
    "push_to_hub",
    "train",
    "training_tool",
    "validate",
]
