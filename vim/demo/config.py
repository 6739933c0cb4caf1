"""Configuration of the demo page. `--help` shows the text under each field."""

from dataclasses import dataclass

from vim.timm_models.config import LoadedModelConfig


@dataclass
class DemoConfig(LoadedModelConfig):
    """The page."""

    model: str = "runs/quickstart"
    """Any timm classifier, a run folder, local-dir:<folder> or hf-hub:<repository>. Only Vision Mambas have maps."""
    features: str | None = None
    """Export of tools/export_features.py with the same model, to search for nearest neighbours; null: none."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the page to everyone on the network."""
    port: int = 7860
    """Port to listen on."""

    def __post_init__(self):
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port must be from 1 to 65535, got {self.port}")
