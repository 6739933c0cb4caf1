"""Export models to files that run without this package: torch.export, ONNX and AOTInductor."""

from .config import ExportConfig
from .export import export_model
from .programs import load_compiled

__all__ = ["ExportConfig", "export_model", "load_compiled"]
