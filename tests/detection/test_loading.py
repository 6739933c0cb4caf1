"""Augmentation: boxes and masks follow the pixels, images fit the square, a key reproduces its image."""

import numpy as np
import pytest
import torch
from boxes_data import COLOURS, write_boxes
from PIL import Image
from torch.testing import assert_close

from vim.data import SampleKey
from vim.detection.coco import CocoData
from vim.detection.loaders import EvalImages, TrainImages
from vim.detection.transforms import JitterConfig, train_transform

SIZE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of 64 x 64, 48 x 80 and 90 x 50 pixels with one coloured rectangle each."""
    root = tmp_path_factory.mktemp("data")
    write_boxes(root, "train", 24, boxes=(1, 1))
    return CocoData(root / "train.json", root / "train", masks=True)


def images(data, augment, passes=1, seed=0):
    return TrainImages(data, train_transform(augment, SIZE), seed, passes)


def coloured(image, label):
    """Mask of the pixels in the colour of a class."""
    colour = torch.tensor(list(COLOURS.values())[label - 1]) / 255
    return (image - colour[:, None, None]).abs().sum(0) < 0.35


@pytest.mark.parametrize(
    ("augment", "tolerance"),
    [
        (JitterConfig((1.0, 1.0), hflip=0.0), 1.5),
        (JitterConfig((1.0, 1.0), hflip=1.0), 1.5),
        (JitterConfig((1.0, 1.0), hflip=0.0, vflip=1.0), 1.5),
        (JitterConfig((0.5, 2.0), hflip=0.5, vflip=0.5), 2.5),
    ],
)
def test_boxes_and_masks_follow_the_pixels(data, augment, tolerance):
    transformed = images(data, augment)
    compared = 0
    for number in range(len(data)):
        image, target, _ = transformed[SampleKey(0, number, 0)]
        assert image.shape[0] == 3
        assert max(image.shape[1:]) <= SIZE
        assert image.dtype == torch.float32
        assert 0 <= image.min() < image.max() <= 1
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        assert target["masks"].shape[1:] == image.shape[1:]
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            if (box[2:] - box[:2]).min() < 6:
                continue  # a sliver left by the crop, all blurred edge
            inside = coloured(image, label)
            rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
            found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])[:, None].flatten()
            assert (box - found).abs().max() <= tolerance
            assert (mask.bool() & inside).sum() > 0.75 * (mask.bool() | inside).sum()
            compared += 1
    assert compared > 10


def test_scales_span_their_range(data):
    """In square images that are not cropped, the size gives the factor."""
    transformed = images(data, JitterConfig((0.25, 0.75)), passes=10)
    squares = [number for number in range(0, len(transformed), 3) if number % 24 % 3 == 0]
    edges = [transformed[SampleKey(0, number, 0)][0].shape[-1] for number in squares]
    assert 0.25 * SIZE - 1 <= min(edges) < 0.35 * SIZE
    assert 0.65 * SIZE < max(edges) <= 0.75 * SIZE + 1


def test_a_key_gives_the_same_image_for_any_generator_state(data):
    everything = JitterConfig((0.3, 2.0), vflip=0.5, color_jitter=0.4, erasing=0.5)
    first = images(data, everything)[SampleKey(3, 5, 0)]
    torch.manual_seed(7)
    np.random.seed(7)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    again = images(data, everything)[SampleKey(3, 5, 0)]
    assert_close(torch.rand(1), drawn, atol=0, rtol=0)  # the global generator is unchanged
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1]["boxes"], again[1]["boxes"])
    for other in (images(data, everything)[SampleKey(4, 5, 0)], images(data, everything, seed=1)[SampleKey(3, 5, 0)]):
        assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


def test_passes_repeat_the_images_with_other_augmentation(data):
    transformed = images(data, JitterConfig((0.5, 2.0)), passes=3)
    assert len(transformed) == 3 * len(data)
    one, other = (transformed[SampleKey(0, number, 0)] for number in (2, 2 + len(data)))
    assert one[1]["image_id"] == other[1]["image_id"]
    assert one[0].shape != other[0].shape or not torch.equal(one[0], other[0])


def test_erasing_hides_pixels_and_takes_hidden_boxes_with_it(data):
    plain, erased = (images(data, JitterConfig((1.0, 1.0), hflip=0.0, erasing=p), passes=8) for p in (0.0, 1.0))
    gone = kept = coloured = 0
    for number in range(len(plain)):
        (image, target, _), (changed, left, _) = (each[SampleKey(0, number, 0)] for each in (plain, erased))
        hidden = (image != changed).all(0)
        rows, columns = hidden.any(1).nonzero(), hidden.any(0).nonzero()
        top, bottom, start, end = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        patch = changed[:, top:bottom, start:end]
        assert_close(patch, patch[:, :1, :1].expand_as(patch), atol=0, rtol=0)  # a rectangle of one colour
        coloured += (patch[:, 0, 0].max() - patch[:, 0, 0].min() > 0.2).item()
        assert_close(hidden.sum(), (bottom - top) * (end - start))
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            width, height = (min(box[2], end) - max(box[0], start)), (min(box[3], bottom) - max(box[1], top))
            share = max(width, 0) * max(height, 0) / ((box[2] - box[0]) * (box[3] - box[1]))
            if share > 0.5:
                assert len(left["boxes"]) == 0
                gone += 1
            else:
                assert_close(left["boxes"], box[None])
                assert torch.equal(left["masks"][0], mask * ~hidden)
                kept += 1
    assert coloured > len(plain) / 2
    assert gone > 5
    assert kept > 20


def test_boxes_thinner_than_a_pixel_are_dropped_with_their_labels_and_masks():
    boxes = torch.tensor([[9.0, 9, 9.9, 30], [9, 9, 10.1, 30], [9, 9, 30, 9.9], [9, 9, 30, 10.1], [60, 9, 70, 30]])
    target = {
        "boxes": boxes,
        "labels": torch.arange(1, 6),
        "masks": torch.arange(5).byte()[:, None, None].repeat(1, 64, 64),
    }
    _, left = train_transform(JitterConfig((1.0, 1.0), hflip=0.0), SIZE)(Image.new("RGB", (SIZE, SIZE)), target)
    assert left["labels"].tolist() == [2, 4, 5]
    assert left["masks"][:, 0, 0].tolist() == [1, 3, 4]
    assert left["boxes"][-1].tolist() == [60, 9, 64, 30]  # clipped


def test_evaluation_images_are_unchanged(data):
    for number in range(4):
        image, target = EvalImages(data)[number]
        pixels, _ = data.load(number)
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
        assert target["image_id"] == data.image_ids[number]
