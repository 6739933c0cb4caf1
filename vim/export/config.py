"""Configuration of a model export. `--help` shows the text under each field."""

from dataclasses import dataclass, field

from vim.timm_models.config import LoadedModelConfig
from vim.timm_models.precision import Precision

from .programs import FORMATS


@dataclass
class ExportConfig(LoadedModelConfig):
    """The export."""

    formats: list[str] = field(default_factory=lambda: ["pt2", "onnx"])
    """pt2: torch.export, runs with torch alone. onnx: ONNX. aoti: compiled by TorchInductor for this CPU (minutes).
    aoti_cuda: compiled for this GPU, with the operators of vim_kernels."""
    images: str = "data/imagenet/val"
    """Images for the check: a folder at any depth, a list (.txt, .tsv), .tar or .parquet shards, hf://datasets/..."""
    batch_size: int = 4
    """Images to verify and time with, evenly spaced in `images`. The exported files take any batch size."""
    threads: int = 2
    """CPU threads for timing."""
    precision: Precision = "bf16"
    """Autocast precision of aoti_cuda: fp32, bf16 or fp16. The other formats compute in fp32."""
    output: str = "runs/export"
    """Folder for export.json and model.pt2, model.onnx, model_aoti.pt2, model_cuda.pt2; an existing export is
    replaced."""

    def __post_init__(self):
        if wrong := [f for f in self.formats if f not in FORMATS]:
            raise ValueError(f"formats must be some of {tuple(FORMATS)}, got {wrong[0]!r}")
        if not self.formats:
            raise ValueError(f"formats must name at least one of {tuple(FORMATS)}")
        for name in ("batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
