"""Timm models for the tools: name, weights, input, precision."""

from .config import LoadedModelConfig, ModelConfig
from .create import create_model, load_model
from .input import resolve_input
from .precision import Precision

__all__ = ["LoadedModelConfig", "ModelConfig", "Precision", "create_model", "load_model", "resolve_input"]
