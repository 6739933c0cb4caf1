"""Random sampling of the boxes that enter the loss."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class BalancedSampler:
    """Draw `count` boxes per image uniformly without replacement, at most `positive_fraction` of them positives.

    Replaces torchvision's BalancedPositiveNegativeSampler, which took 25 of 143 ms of a Faster R-CNN forward pass (16
    images of 512 pixels, H100). This one handles all images at once and does not synchronise with the GPU.
    """

    def __init__(self, count: int, positive_fraction: float):
        self.count, self.positives = count, int(count * positive_fraction)

    def __call__(self, labels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks (n,), uint8, of the drawn positives and of the drawn negatives of each image.

        Args:
            labels: (n,) for each image: above 0 for positives, 0 for negatives, below 0 for boxes never to draw.
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
    """Mask of the first `count` candidates of each row by `order`; of all candidates if there are fewer.

    Args:
        candidates: (B, n), a mask.
        order: (B, n), 0..1.
        count: for all rows, or (B, 1); at most bound.
    """
    found, places = torch.where(candidates, order, 2.0).topk(min(bound, candidates.shape[1]), largest=False)
    drawn = (found <= 1) & (torch.arange(found.shape[1], device=order.device) < count)
    return torch.zeros_like(candidates, dtype=torch.uint8).scatter_(1, places, drawn.byte())
