"""Export models to files that run without this package: torch.export, ONNX and AOTInductor."""

from .config import ExportConfig
from .export import export_model

__all__ = ["ExportConfig", "export_model"]
