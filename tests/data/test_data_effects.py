"""Every field of the sections data and augment does what it says to the batches of a run."""

import math
import multiprocessing
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from image_shards import write_parquet
from PIL import Image

import vim.training.classification
from vim.console.progress import Progress
from vim.data import AugmentConfig, DataConfig, DataError, parquet_shards
from vim.data.loaders import batches_of
from vim.timm_models.accelerator import create_accelerator
from vim.timm_models.config import ModelConfig
from vim.training import TrainConfig
from vim.training.classification import Classification

os.environ["ACCELERATE_USE_CPU"] = "true"
EDGE, SIZE, CLASSES = 60, 20, 4  # pixels of the files and of the model's input
SLOPE = 4  # levels a pixel: red grows with the column, green with the row; blue tells the class
KWARGS = {"img_size": SIZE, "patch_size": 5, "embed_dim": 16, "depth": 1, "num_heads": 1, "dynamic_img_size": True}
STILL = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}


def ramps(label):
    steps = SLOPE * np.arange(EDGE)
    red, green = np.meshgrid(steps, steps)
    return np.stack([red, green, np.full_like(red, 60 * label)], -1).astype(np.uint8)


class Runs:
    """Makes runs that differ in their configuration from one that leaves images as they are."""

    def __init__(self, root):
        self.root = root

    def write(self, split, images, pixels=ramps, root=None):
        for index in range(images):
            folder = (root or self.root) / split / f"class{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(index % CLASSES)).save(folder / f"{index}.png")

    def make(self, data=(), **augment):
        return Classification(
            TrainConfig(
                str(self.root / "run"),
                model=ModelConfig("vit_tiny_patch16_224", kwargs=KWARGS),
                data=DataConfig(
                    **{"root": str(self.root), "batch_size": 32, "num_workers": 0, "crop_pct": 1.0}
                    | {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear"}
                    | dict(data)
                ),
                augment=AugmentConfig(**STILL | augment),
            ),
            create_accelerator("fp32"),
            Progress(False),
        )

    def images(self, epochs=1, data=(), **augment):
        """(B, C, H, W) of the training batches of some epochs, in levels 0..255."""
        run = self.make(data, **augment)
        return torch.cat([images for epoch in range(epochs) for images, *_ in train_batches(run, epoch)]) * 255

    def pixels(self, epochs, pixels, **augment):
        """As `images`, of 32 files with these pixels."""
        self.write("others", 32, lambda label: pixels)
        return self.images(epochs, {"train_split": "others"}, **augment)

    def mixed(self, times, **augment):
        """Blue (B, H, W) and targets (B, classes) of the first batch, mixed so many times; and blue before."""
        run = self.make(**augment)
        ((images, labels, _),) = train_batches(run)
        results = []
        for number in range(times):
            np.random.seed(number)
            mixed, targets = run.mixup(images.clone(), labels)
            results.append((mixed[:, 2] * 255, targets))
        return results, images[:, 2] * 255


def train_batches(run, epoch=0):
    run.train_batches.set_epoch(epoch)
    return list(batches_of(run.train_batches))


@pytest.fixture
def runs(tmp_path):
    made = Runs(tmp_path / "images")
    made.write("train", 32)
    made.write("val", 4)
    return made


def crop(images):
    """Heights and widths of the crops that images show, in pixels of the file, to half a pixel or so."""
    far, near, scale = SIZE - 6, 5, SIZE / SLOPE / (SIZE - 11)
    middle = SIZE // 2
    width = (images[:, 0, middle, far] - images[:, 0, middle, near]) * scale
    height = (images[:, 1, far, middle] - images[:, 1, near, middle]) * scale
    return height.abs(), width.abs()


def shares(changed, wanted):
    """So many of these are true as the probability says, to three standard deviations."""
    assert abs(changed.double().mean() - wanted) < 3 * math.sqrt(wanted * (1 - wanted) / len(changed))


def reaches(values, low, high, slack):
    """Values fill a range, and do not leave it."""
    part = (high - low) / 5
    assert low - slack <= values.min() < low + part
    assert high - part < values.max() <= high + slack


def scale(runs):
    height, width = crop(runs.images(2, scale=(0.2, 0.6)))
    assert (height - width).abs().max() < 2
    reaches(height * width / EDGE**2, 0.2, 0.6, slack=0.03)


def ratio(runs):
    height, width = crop(runs.images(2, scale=(0.2, 0.2), ratio=(0.4, 1.5)))
    assert ((height * width).sqrt() - math.sqrt(0.2) * EDGE).abs().max() < 2
    reaches(width / height, 0.4, 1.5, slack=0.1)


def hflip(runs):
    plain, flipped = runs.images(), runs.images(hflip=1.0)
    assert torch.equal(flipped, plain.flip(-1))
    shares((runs.images(4, hflip=0.25) != runs.images(4)).flatten(1).any(1), 0.25)


def vflip(runs):
    plain, flipped = runs.images(), runs.images(vflip=1.0)
    assert torch.equal(flipped, plain.flip(-2))
    shares((runs.images(4, vflip=0.25) != runs.images(4)).flatten(1).any(1), 0.25)


def dot(runs, row, column, **augment):
    """Where a bright square at some place of the image is moved to; (0, 0) is the centre, in pixels of the input."""
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[row + 9 : row + 11, column + 9 : column + 11] = 255
    images = runs.pixels(4, pixels, **augment)[:, 0]
    coordinates = torch.arange(SIZE) - (SIZE - 1) / 2
    total = images.sum((1, 2))
    return (images.sum(2) @ coordinates) / total, (images.sum(1) @ coordinates) / total


def affine_degrees(runs):
    rows, columns = dot(runs, 0, 6, affine_degrees=40)
    assert (rows.hypot(columns) - 6).abs().max() < 0.3
    reaches(torch.rad2deg(torch.atan2(rows, columns)), -40, 40, slack=2)


def affine_translate(runs):
    for moved in dot(runs, 0, 0, affine_translate=0.3):
        reaches(moved, -0.3 * SIZE, 0.3 * SIZE, slack=0.1)


def affine_scale(runs):
    rows, columns = dot(runs, 0, 6, affine_scale=0.4)
    assert rows.abs().max() < 0.1
    reaches(columns / 6, 0.6, 1.4, slack=0.05)


def affine_shear(runs):
    rows, columns = dot(runs, 6, 0, affine_shear=40)
    assert (rows - 6).abs().max() < 0.1
    reaches(torch.rad2deg(torch.atan2(columns, rows)), -40, 40, slack=2)


def color_jitter(runs):
    grey = np.full((EDGE, EDGE, 3), 100, np.uint8)  # which changes of contrast and saturation leave alone
    reaches(runs.pixels(4, grey, color_jitter=0.4)[:, 0, 0, 0], 60, 140, slack=1)
    red = grey * np.array([1, 0, 0], np.uint8)  # red and nothing else, to any brightness and contrast of a plain image
    assert runs.pixels(1, red, color_jitter=0.4)[:, 1].max() > 10
    policy = {"auto_augment": "rand-m5-n1"}
    assert torch.equal(runs.images(**policy), runs.images(**policy, color_jitter=0.4))


def auto_augment(runs):
    changed = (runs.images(auto_augment="rand-m9-n1-p0.3") != runs.images()).flatten(1).any(1)
    assert 0 < changed.sum() < 20
    assert not torch.equal(runs.images(auto_augment="rand-m9"), runs.images(auto_augment="v0"))


def erasing(runs):
    changed = runs.images(4, erasing=0.3) != runs.images(4)
    shares(changed.flatten(1).any(1), 0.3)
    assert changed.flatten(1).double().mean(1).max() < 0.4


def erasing_mode(runs):
    plain = runs.images()
    for mode, most in (("const", 1), ("rand", 1), ("pixel", SIZE**2)):
        images = runs.images(erasing=1.0, erasing_mode=mode)
        values = [image[1][(image != before).any(0)].unique() for image, before in zip(images, plain, strict=True)]
        assert max(map(len, values)) <= most
        assert (max(map(len, values)) > 4) is (mode == "pixel")
        assert all(v.abs().max() == 0 for v in values) is (mode == "const")


def repeats(runs):
    run = runs.make(repeats=4, scale=(0.1, 1.0))
    ((images, labels, _),) = train_batches(run)
    groups = images.unflatten(0, (8, 4))
    assert torch.equal(labels, labels[::4].repeat_interleave(4))
    assert len({image.numpy().tobytes() for image in groups[0]}) == 4
    assert len({key.image for key in run.sampler.keys(0, 32)}) == 8


def mixup(runs):
    results, blue = runs.mixed(8, mixup=0.2)
    even, _ = runs.mixed(8, mixup=1000.0)
    for mixed, targets in (*results, *even):
        kept = 60 * targets @ torch.arange(CLASSES).double().float()
        torch.testing.assert_close(mixed, kept.view(-1, 1, 1).expand_as(mixed), atol=1e-2, rtol=0)
        assert not torch.equal(mixed, blue) or targets.max(1).values.min() > 0.999
    parts = [torch.cat([targets.max(1).values for _, targets in r]) for r in (results, even)]
    assert parts[1].lt(1).any()
    assert ((parts[1] < 0.56) | (parts[1] > 0.999)).all()  # halves, or both of one class
    assert ((parts[0] > 0.6) & (parts[0] < 0.999)).any()


def cutmix(runs):
    ends = []
    for alpha in (0.2, 1000.0):
        results, blue = runs.mixed(8, cutmix=alpha)
        for mixed, targets in results:
            part = (mixed != blue).flatten(1).double().mean(1)
            pairs = blue[:, 0, 0] != blue.flip(0)[:, 0, 0]
            own = targets[torch.arange(len(blue)), (blue[:, 0, 0] / 60).round().long()]
            torch.testing.assert_close(own[pairs].double(), 1 - part[pairs], atol=1e-5, rtol=0)
            assert torch.equal(mixed, torch.where(mixed != blue, blue.flip(0), blue))
            ends.append((alpha, part.max().item()))
    assert all(part < 0.56 for alpha, part in ends if alpha == 1000)
    assert any(part > 0.6 for alpha, part in ends if alpha == 0.2)


def mix_prob(runs):
    results, blue = runs.mixed(100, mixup=1000.0, mix_prob=0.3)
    shares(torch.tensor([not torch.equal(mixed, blue) for mixed, _ in results]), 0.3)


def mix_switch_prob(runs):
    results, _ = runs.mixed(100, mixup=1000.0, cutmix=1000.0, mix_switch_prob=0.2)
    # An image that CutMix has changed has a border in it.
    shares(torch.tensor([bool((mixed.flatten(1).std(1) > 1).any()) for mixed, _ in results]), 0.2)


def smoothing(runs):
    logits = torch.tensor([3.0, 1.0, 0.0, -2.0])
    log_p = logits.log_softmax(0)
    images, labels = torch.zeros(4, 3, SIZE, SIZE), torch.arange(CLASSES)
    for part in (0.0, 0.2):
        run = runs.make(smoothing=part)
        run.model = lambda images: logits.expand(len(images), -1)
        for label in labels:
            want = -(1 - part) * log_p[label] - part * log_p.mean()
            torch.testing.assert_close(run.batch_loss((images[:1], label[None])), want)
        ((_, targets),), _ = runs.mixed(1, cutmix=1.0, smoothing=part)
        torch.testing.assert_close(targets.min(), torch.tensor(part / CLASSES))


def evaluated(runs, **data):
    """Evaluation images (B, C, H, W)."""
    return torch.cat([images for images, *_ in batches_of(runs.make(data).val_batches)])


def trained(runs, **data):
    return torch.cat([images for images, *_ in train_batches(runs.make(data))])


def root(runs):
    other = runs.root.parent / "other"
    for split in ("train", "val"):
        runs.write(split, 32, lambda label: 255 - ramps(label), other)
    for images in (trained, evaluated):
        assert images(runs, root=str(other))[:, 0].mean() > images(runs)[:, 0].mean()


def train_split(runs):
    runs.write("more", 64)
    assert len(trained(runs, train_split="more")) == 64
    assert len(evaluated(runs, train_split="more")) == 4


def val_split(runs):
    runs.write("more", 36)
    assert len(evaluated(runs, val_split="more")) == 36
    assert len(trained(runs, val_split="more")) == 32


def batch_size(runs):
    run = runs.make({"batch_size": 3})
    assert [len(labels) for _, labels, _ in train_batches(run)] == [3] * 10
    assert [len(labels) for _, labels, _ in batches_of(run.val_batches)] == [3, 1]


def num_workers(runs):
    for wanted in (0, 1):
        run, before = runs.make({"num_workers": wanted}), len(multiprocessing.active_children())
        batches = [batches_of(run.train_batches), batches_of(run.val_batches)]
        for count, each in enumerate(batches, 1):
            next(each)
            assert len(multiprocessing.active_children()) - before == count * wanted
        run.accelerator.free_memory()


def bad_images(runs):
    for split in ("train", "val"):
        (runs.root / split / "class0" / "0.png").write_bytes(b"no image")
    for kind in ("train_batches", "val_batches"):
        with pytest.raises(DataError, match="cannot read image"):
            list(batches_of(getattr(runs.make({"bad_images": "raise"}), kind)))
        found = [bad for *_, bad in batches_of(getattr(runs.make({"bad_images": "skip"}), kind))]
        assert [path for paths in found for path in paths] == [
            str(runs.root / kind.removesuffix("_batches") / "class0" / "0.png")
        ]


def in_shards(runs, monkeypatch):
    """Data of 32 images in four Parquet shards, one a class; and the list of what is asked for ahead."""
    asked = []
    monkeypatch.setattr(vim.training.classification, "FetchAhead", lambda fetch: asked.append)
    monkeypatch.setattr(parquet_shards, "shard_folder", lambda: runs.root / "cache")
    files = [(path, label) for label in range(CLASSES) for path in runs.root.glob(f"train/class{label}/*")]
    (runs.root / "train").rename(runs.root / "tree")
    files = [(runs.root / "tree" / Path(*path.parts[-2:]), label) for path, label in files]
    classes = [f"class{label}" for label in range(CLASSES)]
    write_parquet(files, classes, runs.root, {f"train-{label}.parquet": 8 for label in range(CLASSES)})
    return asked


def window(runs, monkeypatch):
    asked = in_shards(runs, monkeypatch)
    for size in (1, 2):
        (batch,) = train_batches(runs.make({"window": size, "batch_size": 32}))
        turns = [set(part.tolist()) for part in batch[1].split(8 * size)]
        assert [len(turn) for turn in turns] == [size] * (CLASSES // size)
        assert len(asked[-1]) == 2 * size


def cache_gib(runs, monkeypatch):
    in_shards(runs, monkeypatch)
    sizes = []
    for limit in (6_000, None):  # three of four shards
        trained(runs, window=1, cache_gib=limit and limit / 2**30)
        sizes.append(sum(file.stat().st_size for file in (runs.root / "cache").glob("*.arrow")))
    assert 4_000 < sizes[0] <= 6_000 < sizes[1]


def img_size(runs):
    for images in (trained, evaluated):
        assert images(runs, img_size=25).shape[-2:] == (25, 25)
        assert images(runs).shape[-2:] == (SIZE, SIZE)


def mean(runs):
    for images in (trained, evaluated):
        want = images(runs) - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
        torch.testing.assert_close(images(runs, mean=(0.1, 0.2, 0.3)), want)


def std(runs):
    for images in (trained, evaluated):
        want = images(runs) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
        torch.testing.assert_close(images(runs, std=(0.1, 0.2, 0.3)), want)


def crop_pct(runs):
    for part in (1.0, 0.5):
        for edge in crop(evaluated(runs, crop_pct=part) * 255):
            assert (edge - part * EDGE).abs().max() < 1
        assert min(edge.min() for edge in crop(trained(runs, crop_pct=part) * 255)) > EDGE - 1


def interpolation(runs):
    image, methods = Image.fromarray(ramps(0)), Image.Resampling
    edges = np.where(np.asarray(image)[..., :1] // 24 % 2, 255, 0).astype(np.uint8).repeat(3, -1)
    for split in ("train", "val"):
        runs.write(split, 32, lambda label: edges)
    for name in ("nearest", "bilinear", "bicubic", "lanczos"):
        want = np.asarray(Image.fromarray(edges).resize((SIZE, SIZE), methods[name.upper()])).transpose(2, 0, 1)
        for images in (trained, evaluated):
            assert np.abs(images(runs, interpolation=name)[0].numpy() * 255 - want).max() < 2.5


def progressive(runs):
    run = runs.make({"progressive": [(10, 1), (15, 2)]})
    sizes = [train_batches(run, epoch)[0][0].shape[-2:] for epoch in range(4)]
    assert sizes == [(10, 10), (15, 15), (15, 15), (SIZE, SIZE)]
    assert next(batches_of(run.val_batches))[0].shape[-2:] == (SIZE, SIZE)
    small = {"progressive": [(10, 1)]}
    assert torch.equal(runs.images(1, small, hflip=1.0), runs.images(1, small).flip(-1))


AUGMENT_EFFECTS = [
    scale, ratio, hflip, vflip, affine_degrees, affine_translate, affine_scale, affine_shear, color_jitter,
    auto_augment, erasing, erasing_mode, repeats, mixup, cutmix, mix_prob, mix_switch_prob, smoothing,
]  # fmt: skip
DATA_EFFECTS = [
    root, val_split, batch_size, num_workers, bad_images, cache_gib, img_size, mean, std, crop_pct, interpolation,
    train_split, window, progressive,
]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "effects"), [(AugmentConfig, AUGMENT_EFFECTS), (DataConfig, DATA_EFFECTS)], ids=["augment", "data"]
)
def test_every_field_has_an_effect_below(section, effects):
    assert [effect.__name__ for effect in effects] == [field.name for field in fields(section)]


@pytest.mark.parametrize("effect", AUGMENT_EFFECTS + DATA_EFFECTS, ids=lambda effect: effect.__name__)
def test_effect(effect, runs, monkeypatch):
    effect(runs, monkeypatch) if effect in (window, cache_gib) else effect(runs)
