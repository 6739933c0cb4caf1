"""Benchmark of detector training steps."""

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
    """The benchmark: training steps of detectors with different backbones."""

    workloads: list[Workload] = field(default_factory=lambda: [Workload("train", 1024, 4)])
    """What to time: list of mode (train), img_size (pixels), batch_size (images), models (null: all)."""
    detector: Heads = "cascade_mask_rcnn"
    """Detector on all backbones: faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn or fcos."""
    kwargs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arguments of the backbones, by model name."""
    classes: int = 80
    """Number of object classes, without background."""
    boxes: int = 7
    """Objects per image, at random places and sizes; 7 is the average of COCO."""
    output: str = "runs/detection_benchmark"
    """Folder for benchmark.json and benchmark.png; existing ones are overwritten."""

    def __post_init__(self):
        super().__post_init__()
        for workload in self.workloads:
            if workload.mode != "train":
                raise ConfigError("mode must be train: the inference time of untrained heads depends on chance")
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
    """Create a training step of a detector, as in tools/train_detection.py, but without loading images.

    The contender's options apply to the backbone only: shapes in the heads depend on the objects that they find.
    """
    torch.manual_seed(0)  # the same images, boxes and sampling for all contenders
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
    """Random boxes, with edges of 0.1 to 0.35 of the image's, and masks that fill them."""
    edges = size * (0.1 + torch.rand(config.boxes, 2) * 0.25)
    corners = torch.rand(config.boxes, 2) * (size - edges)
    boxes = torch.cat([corners, corners + edges], 1).round()
    places = torch.arange(size)
    rows, columns = ((places >= boxes[:, i, None]) & (places < boxes[:, i + 2, None]) for i in (1, 0))
    labels = torch.randint(1, config.classes + 1, (config.boxes,))
    objects = {"boxes": boxes, "labels": labels, "masks": (rows[:, :, None] & columns[:, None]).byte()}
    return {name: value.to(device) for name, value in objects.items()}
