"""COCO's metrics of a detector, with each image counted once for any number of processes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vim.console.errors import ConfigError, RunError
from vim.console.progress import Progress
from vim.data.loaders import batches_of

from .coco import CocoData

# COCO's twelve metrics, in its order.
# AP: average precision over IoU 0.50..0.95, at 0.50, at 0.75, and of small, medium and large objects.
# AR: average recall with 1, 10 and 100 boxes per image, and of small, medium and large objects.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
Kind = Literal["bbox", "segm"]
PREFIXES: dict[Kind, str] = {"bbox": "", "segm": "mask_"}
MASK_THRESHOLD = 0.5


@dataclass
class Evaluation:
    """The results of an evaluation.

    Attributes:
        images: number of images.
        predictions: in COCO's result format.
        values: COCO's twelve METRICS, 0..1, or -1 if there is no such object; those of masks are prefixed with mask_.
        per_class: by class name: AP and AP50, likewise; F1, the best on the precision-recall curve at IoU 0.5; and
            threshold, the score at which it is reached.
    """

    images: int
    predictions: list[dict[str, Any]]
    values: dict[str, float] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)

    def metrics(self, prefix: str = "") -> dict[str, float]:
        return {f"{prefix}{name}": value for name, value in self.values.items()}


def coco_metrics(
    truth: dict[str, Any], predictions: list[dict[str, Any]], kind: Kind
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """COCO's metrics, 0..1, or -1 if there is no such object.

    Args:
        truth: in COCO's annotation format.
        predictions: in COCO's result format.
        kind: bbox for boxes, segm for masks.

    Returns: the twelve METRICS; and AP, AP50, F1 and threshold by category id, see `Evaluation`.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ModuleNotFoundError as error:
        raise ConfigError(f"evaluation needs faster-coco-eval: pip install 'vim-mamba[detection]' ({error})") from error

    coco = COCO(truth, print_function=_silent)
    run = COCOeval_faster(coco, coco.loadRes([dict(row) for row in predictions]), kind, print_function=_silent)
    run.evaluate()
    run.accumulate()
    run.summarize()
    # (IoU, recall, category, area, boxes per image); -1: no such object
    precision, scores = (torch.from_numpy(run.eval[name]) for name in ("precision", "scores"))
    recall = torch.from_numpy(run.params.recThrs)
    per_category = {}
    for place, category in enumerate(run.params.catIds):
        values = {"AP": precision[:, :, place, 0, -1], "AP50": precision[0, :, place, 0, -1]}
        row = {name: v[v > -1].mean().item() if (v > -1).any() else -1.0 for name, v in values.items()}
        at_half = values["AP50"].clamp(min=0)
        f1 = 2 * at_half * recall / (at_half + recall).clamp(min=1e-12)
        best = int(f1.argmax())
        threshold = scores[0, best, place, 0, -1].clamp(min=0).item()
        per_category[category] = row | {"F1": f1[best].item(), "threshold": threshold}
    return dict(zip(METRICS, map(float, run.stats[: len(METRICS)]), strict=True)), per_category


def _silent(*_: Any) -> None:
    pass


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    data: CocoData,
    accelerator: Accelerator,
    progress: Progress,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run a detector on all images and compute COCO's metrics.

    Args:
        model: see `Detector`; stays in evaluation mode.
        loader: the dataloader of `data`, prepared by the accelerator.
        after_batch: called after each batch in every process; may raise.

    Returns: the same in every process.
    """
    model.eval()
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        progress.line("warning: the model has non-finite weights and will detect nothing")
    mine: dict[int, list[dict[str, Any]]] = {}
    with progress.bar("evaluating", len(loader)) as advance:
        for images, targets in batches_of(loader):
            with accelerator.autocast():
                detections = model(images)
            for detected, target in zip(detections, targets, strict=True):
                mine[target["image_id"]] = as_results(detected, target["image_id"], data.category_ids)
            advance("")
            after_batch()
    # An image may occur twice: accelerate pads the last batches so that every process gets one.
    images_of = dict(gather_object(list(mine.items())))
    if len(images_of) != len(data):
        raise RunError(f"evaluation saw {len(images_of)} of {len(data)} images")
    evaluation = Evaluation(len(images_of), [row for image in data.image_ids for row in images_of[image]])
    truth = data.truth()
    kinds: tuple[Kind, ...] = ("bbox", "segm") if data.masks else ("bbox",)
    for kind in kinds:
        metrics, per_class = coco_metrics(truth, evaluation.predictions, kind)
        prefix = PREFIXES[kind]
        evaluation.values |= {f"{prefix}{name}": value for name, value in metrics.items()}
        for category, name in data.categories.items():
            row = evaluation.per_class.setdefault(name, {})
            row |= {f"{prefix}{key}": value for key, value in per_class[category].items()}
    return evaluation


def as_results(detected: dict[str, Tensor], image_id: int, category_ids: list[int]) -> list[dict[str, Any]]:
    """The detections of an image in COCO's result format: boxes as x, y, width, height; masks run-length encoded."""
    corners = detected["boxes"].double().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    rows = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for label, box, score in zip(detected["labels"].tolist(), boxes, detected["scores"].tolist(), strict=True)
    ]
    if "masks" in detected:
        from faster_coco_eval.core import mask as coding

        masks = (detected["masks"][:, 0] > MASK_THRESHOLD).byte().cpu().numpy()
        for row, mask in zip(rows, masks, strict=True):
            code = coding.encode(np.asfortranarray(mask))
            row["segmentation"] = {"size": list(code["size"]), "counts": _text(code["counts"])}
    return rows


def _text(counts: str | bytes) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts
