"""The sampler against torchvision's: counts, kinds, and equal chances."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from vim.detection.sampling import BalancedSampler

IMAGES = [[1] * 30 + [0] * 50 + [-1] * 20, [0] * 7 + [3, 5] + [-1] * 4, [-1] * 5, [2] * 40, [0] * 60, []]


@pytest.mark.parametrize(("count", "fraction"), [(16, 0.25), (16, 0.5), (8, 0.0), (500, 0.25), (1, 0.5)])
def test_counts_equal_torchvisions(count, fraction):
    labels = [torch.tensor(of_image, dtype=torch.float32) for of_image in IMAGES]
    mine = BalancedSampler(count, fraction)(labels)
    theirs = BalancedPositiveNegativeSampler(count, fraction)(labels)
    for kind, (masks, wanted) in enumerate(zip(mine, theirs, strict=True)):
        for mask, want, of_image in zip(masks, wanted, labels, strict=True):
            assert mask.dtype == torch.uint8
            assert mask.shape == of_image.shape
            assert mask.sum() == want.sum()
            drawn = of_image[mask.bool()]
            assert (drawn > 0).all() if kind == 0 else (drawn == 0).all()


def test_each_candidate_has_the_same_chance():
    """4,000 equal images, 3 of 10 positives and 5 of 20 negatives drawn; tolerance: five standard deviations."""
    torch.manual_seed(0)
    labels = [torch.tensor([0, 1, 0] * 10)] * 4000
    positives, negatives = BalancedSampler(8, 0.375)(labels)
    for masks, chance, size in ((positives, 0.3, 10), (negatives, 0.25, 20)):
        rate = torch.stack(masks).double().mean(0)
        deviation = (chance * (1 - chance) / 4000) ** 0.5
        assert_close(rate[rate > 0], torch.full((size,), chance).double(), atol=5 * deviation, rtol=0)
