"""Accuracy on a split. Each image counts once, whatever the number of processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vim.console.errors import RunError
from vim.console.progress import Progress
from vim.data import DataError
from vim.data.loaders import NO_LABEL, batches_of


@dataclass
class Evaluation:
    """Results over `images` images: top1 and top5 in percent, mean cross-entropy, true and predicted class per image.

    not_finite: images with non-finite logits. They count as wrong and make the loss NaN.
    true, predicted: (images - not_finite,), in the order of the split. classes: number of classes of the model.
    bad_images: unreadable files; they are not counted.
    """

    images: int
    loss: float
    top1: float
    top5: float
    not_finite: int
    true: Tensor
    predicted: Tensor
    classes: int
    bad_images: list[str]

    def metrics(self, prefix: str = "") -> dict[str, float]:
        names = ("loss", "top1", "top5", *["not_finite"] * (self.not_finite > 0))
        return {f"{prefix}{name}": getattr(self, name) for name in names}

    @property
    def confusion(self) -> Tensor:
        """Number of images by (true, predicted) class."""
        pairs = torch.bincount(self.true * self.classes + self.predicted, minlength=self.classes**2)
        return pairs.view(self.classes, self.classes)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    accelerator: Accelerator,
    progress: Progress,
    answers: Tensor | None = None,
    candidates: Tensor | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a model.

    Args:
        model: images (B, C, H, W) -> logits (B, classes). Left in eval mode.
        loader: prepared by the accelerator, whose padding of the last batches is removed here.
        answers: (labels, n) int64, up to n correct classes for each label of the loader, padded with NO_LABEL; None:
            each label is its own class.
        candidates: (classes,) bool, the classes that may be predicted, including all correct ones; None: all.
        after_batch: called after each batch, on all processes; may raise.

    If several classes are correct, predicting any of them is correct, and the loss is -log of their total probability.
    `true` is then the predicted class if it is correct, else the first correct one. With fewer than five classes, top5
    counts all of them. Images with non-finite logits count as wrong, with a warning.
    """
    model.eval()
    answers, candidates = (None if t is None else t.to(accelerator.device) for t in (answers, candidates))
    bad: set[str] = set()
    loss = torch.zeros((), dtype=torch.float64)
    hits = torch.zeros(2, dtype=torch.int64)
    images, classes, true, predicted = 0, 0, [], []
    with progress.bar("evaluating", len(loader)) as advance:
        for batch, label, unreadable in batches_of(loader):
            bad.update(unreadable)
            with accelerator.autocast():
                logits = model(batch)
            logits = logits.float()
            finite, classes = logits.isfinite().all(1), logits.shape[1]
            if candidates is not None:
                logits = logits.masked_fill(~candidates, -torch.inf)
            right = label[:, None]
            if answers is not None:
                right = answers[label].masked_fill(right == NO_LABEL, NO_LABEL)
            likelihoods = logits.log_softmax(1).gather(1, right.clamp(min=0))
            losses = -likelihoods.masked_fill(right == NO_LABEL, -torch.inf).logsumexp(1)
            ranked = logits.topk(min(5, classes)).indices
            losses = losses.where(finite, torch.nan)
            local = losses, ranked, right, finite
            losses, ranked, right, finite = (t.cpu() for t in accelerator.gather_for_metrics(local))
            labelled = right[:, 0] != NO_LABEL
            loss += losses[labelled].double().sum()
            images += int(labelled.sum())
            ranked, right = ranked[labelled & finite], right[labelled & finite]
            found = (ranked[:, :, None] == right[:, None]).any(2)
            hits += torch.stack([found[:, 0].sum(), found.any(1).sum()])
            true.append(ranked[:, 0].where(found[:, 0], right[:, 0]))
            predicted.append(ranked[:, 0])
            advance("")
            after_batch()
    bad = set().union(*gather_object([bad]))
    not_finite = images - sum(map(len, true))
    if images + len(bad) != len(loader.dataset):  # type: ignore[arg-type]
        raise RunError(f"evaluation counted {images} images of {len(loader.dataset)}")  # type: ignore[arg-type]
    if not images:
        raise DataError(f"no image could be read, for example {min(bad)}" if bad else "no images to evaluate on")
    if not_finite:
        progress.line(f"warning: the logits of {not_finite} of {images} images are not finite; they count as wrong")
    top1, top5 = (100 * hits.double() / images).tolist()
    return Evaluation(
        images,
        loss.item() / images,
        top1,
        top5,
        not_finite,
        torch.cat(true),
        torch.cat(predicted),
        classes,
        sorted(bad),
    )
