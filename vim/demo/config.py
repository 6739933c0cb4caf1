"""The configuration of the demo page; every field is read, and explained in `--help`."""

from dataclasses import dataclass

from vim.timm_models.config import LoadedModelConfig


@dataclass
class DemoConfig(LoadedModelConfig):
    """The page."""

    model: str = "runs/quickstart"
    """Any timm classifier, a run folder, local-dir:<folder> or hf-hub:<repository>. Only a Vision Mamba has maps."""
    features: str | None = None
    """Export of tools/export_features.py with the same model, to find nearest neighbours in; null: none."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the page to everybody on the network."""
    port: int = 7860
    """Port to listen on."""

    def __post_init__(self):
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port must be from 1 to 65535, got {self.port}")
