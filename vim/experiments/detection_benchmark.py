"""Training steps of detectors, for the benchmark."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vim.console.errors import ConfigError
from vim.detection.detector import Detector, DetectorConfig, Heads
from vim.timm_models.precision import DTYPES, Precision
from vim.training.graphs import capture_training

from .benchmark import LEARNING_RATE, Step, materialise_attention
from .benchmark_config import BenchmarkConfig, Contender, Workload


@dataclass
class DetectionBenchmarkConfig(BenchmarkConfig):
    """The benchmark: training steps of detectors on backbones beside each other."""

    workloads: list[Workload] = field(default_factory=lambda: [Workload("train", 1024, 4)])
    """What they do: list of mode (train), img_size (pixels), batch_size (images), models (null: all)."""
    detector: Heads = "cascade_mask_rcnn"
    """Heads of all."""
    kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arguments of backbones, by the model's name."""
    classes: int = 80
    """Classes of objects, without the background."""
    boxes: int = 7
    """Objects in an image, of random places and sizes; 7 is COCO's average."""
    output: str = "runs/detection_benchmark"
    """Folder for benchmark.json and benchmark.png; those of an earlier benchmark are overwritten."""

    def __post_init__(self):
        super().__post_init__()
        for workload in self.workloads:
            if workload.mode != "train":
                raise ConfigError("mode must be train: what untrained heads find, and so their inference, is by chance")
        for name in ("classes", "boxes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def build_detector_step(
    config: DetectionBenchmarkConfig,
    contender: Contender,
    workload: Workload,
    precision: Precision,
    device: torch.device,
) -> Step:
    """Forward, backward and update of a detector as tools/train_detection.py does them, without loading images.

    The contender's options are of the backbone: the shapes in the heads follow what they find.
    """
    torch.manual_seed(0)  # the same images, boxes and sampling for all
    batch, size = workload.batch_size, workload.img_size
    kwargs = config.kwargs.get(contender.model, {})
    about = DetectorConfig(contender.model, kwargs=kwargs, detector=config.detector, img_size=size)
    model = Detector(about, config.classes).to(device).train()
    if "checkpoint" in contender.options:
        model.set_grad_checkpointing()
    if "materialised" in contender.options:
        materialise_attention(model.body, contender.model)
    images = [torch.rand(3, size, size, device=device) for _ in range(batch)]
    targets = [_objects(config, size, device) for _ in range(batch)]
    backbone = model.backbone
    if "compile" in contender.options:
        backbone.compile()
    if "graph" in contender.options:
        capture_training(backbone, torch.zeros(batch, 3, size, size, device=device), DTYPES[precision])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            loss = sum(model(images, targets).values(), torch.zeros((), device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _objects(config: DetectionBenchmarkConfig, size: int, device: torch.device) -> dict[str, Tensor]:
    """Boxes of a tenth to a third of the image's edge, each all mask."""
    edges = size * (0.1 + torch.rand(config.boxes, 2) * 0.25)
    corners = torch.rand(config.boxes, 2) * (size - edges)
    boxes = torch.cat([corners, corners + edges], 1).round()
    places = torch.arange(size)
    rows, columns = ((places >= boxes[:, i, None]) & (places < boxes[:, i + 2, None]) for i in (1, 0))
    labels = torch.randint(1, config.classes + 1, (config.boxes,))
    objects = {"boxes": boxes, "labels": labels, "masks": (rows[:, :, None] & columns[:, None]).byte()}
    return {name: value.to(device) for name, value in objects.items()}
