"""Training steps of detectors, for the benchmark."""

import torch
from torch import Tensor

from vim.training.benchmark import DTYPES, LEARNING_RATE, Step, materialise_attention
from vim.training.config import Contender, Precision, Workload
from vim.training.graphs import capture_training

from .config import DetectionBenchmarkConfig, DetectorConfig
from .detector import Detector


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
            loss = sum(model(images, targets).values(), torch.zeros((), device=device))  # type: ignore[union-attr]
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
