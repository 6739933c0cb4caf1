"""How much a classifier without training of the model can read out of features: nearest neighbours, linear probe."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.data import derive_seed

CHUNK = 1024  # queries at a time: of 1.3 million neighbours' similarities 5 GB in fp32


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(similarities, positions in the bank), (Q, k) each, of the k nearest by cosine, nearest first.

    bank: (N, D). queries: (Q, D).
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
        temperature: a vote weighs exp(similarity / temperature), as DINO has it with 0.07 (Caron et al. 2021, arXiv
            2104.14294, appendix F.1); None: all weigh the same.
    """
    labels = neighbour_labels[:, :k]
    # Against the nearest: the same proportions, and nothing overflows.
    votes = torch.ones_like(similarities[:, :k])
    if temperature is not None:
        votes = ((similarities[:, :k] - similarities[:, :1]) / temperature).exp()
    return torch.zeros(len(labels), classes, dtype=votes.dtype, device=votes.device).scatter_add_(1, labels, votes)


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and top5 in percent; among equal scores the first class counts as higher."""
    ranks = scores.argsort(dim=1, descending=True, stable=True)[:, :5]
    right = ranks == labels[:, None]
    return {"top1": 100 * right[:, 0].double().mean().item(), "top5": 100 * right.any(1).double().mean().item()}


def few_shot(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Positions of `shots` images of each class, drawn by the seed, in ascending order; all of a smaller class."""
    rng = np.random.RandomState(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class Probe:
    """One linear classifier of a grid: which inputs it reads, and its learning rate (for 256 images an update)."""

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
    """Train a linear classifier for every input and learning rate, all of them in one pass over the data.

    By SGD with momentum 0.9 and a cosine to zero, learning rates times batch_size / 256 (Caron et al. 2021; Oquab et
    al. 2023, arXiv 2304.07193). Inputs are standardised by the training images' mean and deviation, so that a grid of
    learning rates fits any model. Decay of the weights is 1 / images: where training ends, it is at the optimum of
    logistic regression with a penalty of half the squared weights beside the summed loss, as scikit-learn's default.

    Args:
        train, held_out: name -> features (images, D).
        saved: a state to go on from; what follows is, on a CPU, as if nothing had come between.
        after_update: called after each update with a function that gives the state: tensors and numbers, with `epoch`,
            the epochs that are done.
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
    for head in heads.values():  # on the CPU, which draws the same numbers for any device
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
