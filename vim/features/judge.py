"""Classifiers on frozen features: k nearest neighbours and linear probes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.data import derive_seed

CHUNK = 1024  # queries per step: with a bank of 1.3 million images, 5 GB of fp32 similarities


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest rows of the bank by cosine similarity, nearest first.

    Args: bank: (N, D). queries: (Q, D).

    Returns: similarities and positions in the bank, (Q, k) each.
    """
    bank = F.normalize(bank, dim=1)
    found = [(F.normalize(chunk, dim=1) @ bank.T).topk(k, dim=1) for chunk in queries.split(CHUNK)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def knn_scores(
    similarities: Tensor, neighbour_labels: Tensor, classes: int, k: int, temperature: float | None
) -> Tensor:
    """Votes (Q, classes) of the first k neighbours.

    Args:
        similarities, neighbour_labels: (Q, K), nearest first, K >= k.
        temperature: a vote weighs exp(similarity / temperature); None: equal weights.

    Source: Caron et al. 2021 (DINO), arXiv 2104.14294, appendix F.1, with temperature 0.07.
    """
    labels = neighbour_labels[:, :k]
    # Relative to the nearest: the proportions are the same, and exp does not overflow.
    votes = torch.ones_like(similarities[:, :k])
    if temperature is not None:
        votes = ((similarities[:, :k] - similarities[:, :1]) / temperature).exp()
    return torch.zeros(len(labels), classes, dtype=votes.dtype, device=votes.device).scatter_add_(1, labels, votes)


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and top5 in percent. Ties go to the first class."""
    ranks = scores.argsort(dim=1, descending=True, stable=True)[:, :5]
    right = ranks == labels[:, None]
    return {"top1": 100 * right[:, 0].double().mean().item(), "top5": 100 * right.any(1).double().mean().item()}


def few_shot(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Ascending positions of `shots` images per class, drawn with the seed; all images of a smaller class."""
    rng = np.random.RandomState(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class Probe:
    """One linear classifier of the grid: the input that it reads, and its learning rate for a batch of 256."""

    inputs: str
    lr: float


def linear_probe(
    train: dict[str, Tensor],
    train_labels: Tensor,
    held_out: dict[str, Tensor],
    classes: int,
    *,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
    saved: dict[str, Any] | None = None,
    after_update: Callable[[Callable[[], dict[str, Any]]], None] = lambda state: None,
    advance: Callable[[str], None] = lambda news: None,
) -> dict[Probe, Tensor]:
    """Train a linear classifier for every input and learning rate, all in one pass over the data.

    SGD with momentum 0.9 and a cosine schedule to zero. Learning rates are scaled by batch_size / 256 (Caron et al.
    2021; Oquab et al. 2023, arXiv 2304.07193). Inputs are standardised with the training images' mean and standard
    deviation, so one grid of learning rates fits all models. Weight decay is 1 / images: training converges to the
    optimum of logistic regression with a penalty of half the squared weights on the summed loss, scikit-learn's
    default.

    Args:
        train, held_out: name -> features (images, D).
        saved: state to resume from. On a CPU the result is the same as without the interruption.
        after_update: called after each update with a function that returns the state: tensors and numbers, among them
            `epoch`, the number of finished epochs.
        advance: called after each epoch.

    Returns: logits (images, classes) of the held-out images.
    """
    device = train_labels.device
    scaled = {name: _standardised(features, held_out[name]) for name, features in train.items()}
    heads = {
        Probe(name, lr): nn.Linear(features.shape[1], classes)
        for name, (features, _) in scaled.items()
        for lr in learning_rates
    }
    generator = torch.Generator().manual_seed(derive_seed("probe weights", seed))
    for head in heads.values():  # on the CPU: the same numbers for any device
        nn.init.normal_(head.weight, std=0.01, generator=generator)
        nn.init.zeros_(head.bias)
    together = nn.ModuleList(heads.values()).to(device)
    groups: list[dict] = []
    for probe, head in heads.items():
        lr = probe.lr * batch_size / 256
        groups.append({"params": [head.weight], "lr": lr, "weight_decay": 1 / len(train_labels)})
        groups.append({"params": [head.bias], "lr": lr})
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    per_epoch, update = math.ceil(len(train_labels) / batch_size), 0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    parts: dict[str, Any] = {"heads": together, "optimizer": optimizer, "schedule": schedule}
    if saved is not None:
        update = saved["update"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    def state() -> dict[str, Any]:
        position = {"update": update, "epoch": update // per_epoch}
        return position | {name: part.state_dict() for name, part in parts.items()}

    for epoch in range(update // per_epoch, epochs):
        generator.manual_seed(derive_seed("probe order", seed, epoch))
        order = torch.randperm(len(train_labels), generator=generator).to(device)
        for batch in order.split(batch_size)[update % per_epoch :]:
            inputs = {name: features[batch] for name, (features, _) in scaled.items()}
            losses = [F.cross_entropy(h(inputs[probe.inputs]), train_labels[batch]) for probe, h in heads.items()]
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(losses)  # each head gets the gradient of its own loss alone
            optimizer.step()
            schedule.step()
            update += 1
            after_update(state)
        advance("")
    with torch.no_grad():
        return {probe: head(scaled[probe.inputs][1]) for probe, head in heads.items()}


def _standardised(train: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    mean, deviation = train.mean(0), train.std(0, correction=0)
    deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, 1.0)  # constant in training
    return (train - mean) / deviation, (held_out - mean) / deviation
