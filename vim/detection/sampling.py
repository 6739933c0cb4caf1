"""The boxes of a step that its losses count."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class BalancedSampler:
    """Draw `count` boxes of each image, at most `positive_fraction` of them positives, uniformly without replacement.

    Does what torchvision's BalancedPositiveNegativeSampler does, in its place, for all images at once and without
    reading anything back from the GPU. (Of 143 ms that a forward pass of Faster R-CNN took with 16 images of 512
    pixels, on an H100, torchvision's took 25.)
    """

    def __init__(self, count: int, positive_fraction: float):
        self.count, self.positives = count, int(count * positive_fraction)

    def __call__(self, labels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks (n,), uint8, of the positives and the negatives drawn, for the labels (n,) of each image.

        labels: above 0 for a positive, 0 for a negative, below for what must not be drawn.
        """
        sizes = [len(of_image) for of_image in labels]
        padded = pad_sequence(list(labels), batch_first=True, padding_value=-1)
        order = torch.rand(padded.shape, device=padded.device)
        positive = _draw(padded > 0, order, self.positives, self.positives)
        negative = _draw(padded == 0, order, self.count - positive.sum(1, keepdim=True), self.count)

        def of_images(mask: Tensor) -> list[Tensor]:
            return [row[:size] for row, size in zip(mask, sizes, strict=True)]

        return of_images(positive), of_images(negative)


def _draw(candidates: Tensor, order: Tensor, count: Tensor | int, bound: int) -> Tensor:
    """Mask of the `count` candidates of each row that come first in `order`; of all, if there are fewer.

    Args:
        candidates (B, n): mask. order (B, n): 0..1. count: a number, or (B, 1) of them, none above bound.
    """
    found, places = torch.where(candidates, order, 2.0).topk(min(bound, candidates.shape[1]), largest=False)
    drawn = (found <= 1) & (torch.arange(found.shape[1], device=order.device) < count)
    return torch.zeros_like(candidates, dtype=torch.uint8).scatter_(1, places, drawn.byte())
