"""Accuracy on a split, each image counted once for any number of processes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vim.data import DataError
from vim.data.loaders import NO_LABEL

from .errors import RunError
from .progress import Progress


@dataclass
class Evaluation:
    """Results over `images` images: top1 and top5 in percent, mean cross-entropy, and counts (true, predicted).

    bad_images: files that could not be read and are not counted.
    """

    images: int
    loss: float
    top1: float
    top5: float
    confusion: Tensor
    bad_images: list[str]

    def metrics(self, prefix: str = "") -> dict[str, float]:
        return {f"{prefix}{name}": getattr(self, name) for name in ("loss", "top1", "top5")}


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator, progress: Progress) -> Evaluation:
    """Evaluate a model.

    Args:
        model: images (B, C, H, W) -> logits (B, classes). Left in eval mode.
        loader: prepared by the accelerator, whose padding of the last batches is taken off again.

    With fewer than five classes, top5 counts all of them.
    """
    model.eval()
    images, bad = 0, set()
    loss = torch.zeros((), dtype=torch.float64)
    hits = torch.zeros(2, dtype=torch.int64)
    confusion = torch.zeros(0)
    with progress.bar("evaluating", len(loader)) as advance:
        for batch, target, unreadable in loader:
            bad.update(unreadable)
            with accelerator.autocast():
                logits = model(batch)
            logits = logits.float()
            classes = logits.shape[1]
            losses = F.cross_entropy(logits, target, reduction="none", ignore_index=NO_LABEL)
            ranked = logits.topk(min(5, classes)).indices
            losses, ranked, target = (t.cpu() for t in accelerator.gather_for_metrics((losses, ranked, target)))
            labelled = target != NO_LABEL
            losses, ranked, target = losses[labelled], ranked[labelled], target[labelled]
            right = ranked == target[:, None]
            images += len(target)
            loss += losses.double().sum()
            hits += torch.stack([right[:, 0].sum(), right.sum()])
            pairs = torch.bincount(target * classes + ranked[:, 0], minlength=classes**2).view(classes, classes)
            confusion = pairs + confusion if confusion.numel() else pairs
            advance("")
    bad = set().union(*gather_object([bad]))
    if images + len(bad) != len(loader.dataset):  # type: ignore[arg-type]
        raise RunError(f"evaluation counted {images} images of {len(loader.dataset)}")  # type: ignore[arg-type]
    if not images:
        raise DataError(f"no image could be read, {min(bad)} for one" if bad else "no images to evaluate on")
    top1, top5 = (100 * hits.double() / images).tolist()
    return Evaluation(images, loss.item() / images, top1, top5, confusion, sorted(bad))
