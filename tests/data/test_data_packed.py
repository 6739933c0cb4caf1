"""Images that are handed over as bytes become, on the device, the tensors that timm's own transforms make."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from vim.data import AugmentConfig, train_transform
from vim.data.packed import Augmented, PackedImages

MODES = {1: "L", 3: "RGB"}


def photographs(channels, count, size=(40, 31)):
    """Smooth, with some grain."""
    draw = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = draw.normal(0, 5, (*size[::-1], 3))
        yield Image.fromarray((coarse + grain).clip(0, 255).astype(np.uint8)).convert(MODES[channels])


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def data_config(channels, interpolation, size=(18, 24)):
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    return {"input_size": (channels, *size), "mean": mean, "std": std, "interpolation": interpolation}


def ours_and_timms(augment, config, images):
    """The same images by our transform, as a batch, and by timm's, each from the same seed."""
    transform = train_transform(augment, config)
    theirs = create_transform(
        **config, is_training=True, scale=augment.scale, ratio=augment.ratio, hflip=augment.hflip, color_jitter=None,
        auto_augment=augment.auto_augment, re_prob=augment.erasing, re_mode=augment.erasing_mode,
    )  # fmt: skip
    augmented, want = [], []
    for number, image in enumerate(images):
        seed(number)
        augmented.append(transform(image))
        seed(number)
        want.append(theirs(image))
    packed = PackedImages.pack(augmented, transform.mean, transform.std)
    return pickle.loads(pickle.dumps(packed)).to("cpu"), torch.stack(want)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_a_batch_is_timms_to_the_last_bit(channels, mode):
    """Where Pillow scales: everything else is the same."""
    augment = AugmentConfig(auto_augment="rand-m5-mstd0.5-inc1", erasing=0.6, erasing_mode=mode)
    ours, want = ours_and_timms(augment, data_config(channels, "nearest"), photographs(channels, 24))
    assert torch.equal(ours, want)
    assert ours.is_contiguous()
    plain, _ = ours_and_timms(
        AugmentConfig(auto_augment="rand-m5-mstd0.5-inc1"), data_config(channels, "nearest"), photographs(channels, 24)
    )
    erased = (ours != plain).flatten(1).any(1).sum()
    assert 5 < erased < 24  # some images are, others are not


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(18, 24), (90, 70)], ids=["smaller", "larger"])
def test_crops_are_timms_and_scaled_as_by_pillow(channels, interpolation, size):
    config = data_config(channels, interpolation, size)
    ours, want = ours_and_timms(AugmentConfig(), config, photographs(channels, 24))
    levels = (ours - want).abs() * torch.tensor(config["std"]).view(1, -1, 1, 1) * 255
    assert levels.max() < 2.01
    # Older torch has fewer bits for the weights: 8 % of values are one level off with 2.11, 0.4 % with 2.14.
    assert (levels > 0.5).float().mean() < 0.1
    assert (ours - want).mean().abs() < 1e-3


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos"])
def test_pillow_scales_what_torch_cannot(interpolation):
    ours, want = ours_and_timms(AugmentConfig(), data_config(3, interpolation), photographs(3, 8))
    assert torch.equal(ours, want)


def test_a_crop_of_the_size_wanted_is_not_changed():
    config = data_config(3, "bicubic", (31, 40))
    transform = train_transform(AugmentConfig(scale=(1, 1), ratio=(40 / 31, 40 / 31), hflip=0), config)
    (image,) = photographs(3, 1)
    assert np.array_equal(transform(image).pixels, np.asarray(image))


def test_nothing_to_erase_is_no_special_case():
    pixels = torch.randint(256, (2, 4, 5, 3), dtype=torch.uint8)
    images = PackedImages.pack([Augmented(p) for p in pixels], (0.0,) * 3, (1.0,) * 3).to("cpu")
    assert torch.equal(images, pixels.permute(0, 3, 1, 2) / 255)


@pytest.mark.gpu
def test_a_gpu_makes_what_a_cpu_makes():
    transform = train_transform(AugmentConfig(erasing=0.6), data_config(3, "bicubic"))
    seed(0)
    packed = PackedImages.pack([transform(image) for image in photographs(3, 24)], transform.mean, transform.std)
    got = packed.pin_memory().to("cuda", non_blocking=True)
    torch.testing.assert_close(got.cpu(), packed.to("cpu"), atol=1e-6, rtol=1e-6)
