"""ThreeAugment (`auto_augment: 3a`) as DeiT III defines it: grey, solarise or blur, at equal rates; then colour jitter.

Source: Touvron, Cord & Jegou 2022, arXiv 2204.07118, section 3; facebookresearch/deit, augment.py.
"""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from vim.data import AugmentConfig, train_transform

EDGE = 24
NOISE = np.random.RandomState(0).randint(0, 256, (EDGE, EDGE, 3)).astype(np.uint8)
STILL = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}


def drawn(pixels, seeds, **augment):
    """The pixels (H, W, C) augmented with each seed: (len(seeds), H, W, C)."""
    channels = 1 if pixels.ndim == 2 else 3
    inputs = {"input_size": (channels, EDGE, EDGE), "interpolation": "bicubic"}
    transform = train_transform(
        AugmentConfig(**STILL | augment), inputs | {"mean": (0.5,) * channels, "std": (0.2,) * channels}
    )
    results = []
    for seed in seeds:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        results.append(transform(Image.fromarray(pixels)).pixels.numpy())
    return np.stack(results)


def grey(pixels):
    """Luma of ITU-R 601-2 in all three channels, rounded as Pillow does."""
    luma = (pixels.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000) >> 16
    return np.repeat(luma[..., None], 3, -1)


def solarised(pixels):
    return np.where(pixels < 128, pixels, 255 - pixels)


def blurred(pixels, radius):
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


@pytest.mark.parametrize("bound", [0, 1], ids=["smallest radius", "largest radius"])
def test_each_image_is_grey_solarised_or_blurred_at_equal_rates(monkeypatch, bound):
    monkeypatch.setattr(random, "uniform", lambda *bounds: bounds[bound])  # of the radius: 0.1 .. 2
    wanted = np.stack([grey(NOISE), solarised(NOISE), blurred(NOISE, (0.1, 2.0)[bound])])
    found = drawn(NOISE, range(900), auto_augment="3a")
    equal = (found[:, None] == wanted).all(axis=(2, 3, 4))
    assert (equal.sum(1) == 1).all()
    assert np.abs(equal.sum(0) - 300).max() < 64  # 4.5 standard deviations


def test_the_radius_of_the_blur_varies():
    found = drawn(NOISE, range(60), auto_augment="3a")
    assert len(np.unique(found.reshape(60, -1), axis=0)) > 10


@pytest.mark.parametrize("shape", [(EDGE, EDGE), (EDGE, EDGE, 3)], ids=["grey images", "colour images"])
def test_colour_jitter_follows_the_three(shape):
    """A plain image of level 200 becomes 55 when solarised; only after that, both vary by up to 30 %."""
    found = drawn(np.full(shape, 200, np.uint8), range(400), auto_augment="3a", color_jitter=0.3)
    assert found.shape == (400, EDGE, EDGE, 1 if len(shape) == 2 else 3)
    levels = found[:, 0, 0, 0].astype(int)
    dark = levels < 100
    assert 100 < dark.sum() < 167
    for values, level in ((levels[dark], 55), (levels[~dark], 200)):
        low, high = 0.7 * level, min(1.3 * level, 255)
        assert low - 1 <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high + 1


def test_grey_images_are_solarised_blurred_or_unchanged():
    found = drawn(NOISE[..., 0], range(60), auto_augment="3a")[..., 0]
    kinds = [(found == wanted).all((1, 2)) for wanted in (NOISE[..., 0], solarised(NOISE[..., 0]))]
    blurs = ~(kinds[0] | kinds[1])
    assert min(kinds[0].sum(), kinds[1].sum(), blurs.sum()) > 6
    assert found[blurs].std((1, 2)).max() < NOISE[..., 0].std()


@pytest.mark.parametrize(
    ("policy", "on"), [("rand-m9-mstd0.5-inc1", False), ("v0", False), ("augmix-m3", False), ("rand-m9-t3a", True)]
)
def test_which_policies_keep_colour_jitter(policy, on):
    plain, jittered = (drawn(NOISE, range(4), auto_augment=policy, color_jitter=jitter) for jitter in (0.0, 0.3))
    assert np.array_equal(plain, jittered) != on
