"""Evaluation counts each image once, whatever the batch size and the number of processes."""

import math
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from processes import outputs
from torch.utils.data import DataLoader

from vim.console import RunError
from vim.console.progress import Progress
from vim.data.loaders import NO_LABEL, collate
from vim.training.evaluation import evaluate

os.environ["ACCELERATE_USE_CPU"] = "true"


def scores(images, classes):
    """Random logits and labels, different for every image."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, classes, generator=generator), torch.randint(classes, (images,), generator=generator)


def evaluated(images, classes, batch_size, answers=None, candidates=None):
    accelerator = Accelerator()
    loader = accelerator.prepare(
        DataLoader([(*pair, []) for pair in zip(*scores(images, classes), strict=True)], batch_size, collate_fn=collate)
    )
    return evaluate(torch.nn.Identity(), loader, accelerator, Progress(False), answers, candidates)


def check(result, images, classes):
    logits, labels = scores(images, classes)
    order = logits.argsort(1, descending=True)
    assert result.images == images
    assert result.top1 == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert result.top5 == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    want = torch.zeros(classes, classes, dtype=torch.int64)
    for true, predicted in zip(labels.tolist(), order[:, 0].tolist(), strict=True):
        want[true, predicted] += 1
    assert torch.equal(result.confusion, want)


@pytest.mark.parametrize(("images", "batch_size"), [(23, 4), (24, 4), (3, 8), (1, 1)])
@pytest.mark.parametrize("classes", [3, 11])
def test_one_process(images, batch_size, classes):
    check(evaluated(images, classes, batch_size), images, classes)


def check_several_right(images, classes, batch_size):
    """Labels with several correct classes; class 0 may not be predicted. Expected values image by image."""
    sets = [[1 + (label + i) % (classes - 1) for i in range(1 + label % 3)] for label in range(classes)]
    answers = torch.tensor([right + [NO_LABEL] * (3 - len(right)) for right in sets])
    result = evaluated(images, classes, batch_size, answers, candidates=torch.arange(classes) > 0)
    losses, top1, top5 = [], [], []
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for logits, label in zip(*scores(images, classes), strict=True):
        right = sets[label]
        order = [c for c in logits.argsort(descending=True).tolist() if c != 0]
        top1.append(order[0] in right)
        top5.append(bool(set(order[:5]) & set(right)))
        losses.append(-logits[1:].softmax(0)[[c - 1 for c in right]].sum().log().item())
        confusion[order[0] if top1[-1] else right[0], order[0]] += 1
    assert result.images == images
    assert result.top1 == pytest.approx(100 * sum(top1) / images)
    assert result.top5 == pytest.approx(100 * sum(top5) / images)
    assert result.loss == pytest.approx(sum(losses) / images, rel=1e-5)
    assert torch.equal(result.confusion, confusion)


def test_several_right_classes():
    check_several_right(images=50, classes=11, batch_size=8)


def test_an_image_with_a_non_finite_logit_is_wrong():
    """Even if its largest logit is that of the correct class."""
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[0, 2, 1], [0, inf, 1], [0, nan, 1], [-inf, 1, 0], [2, 0, 1]])
    loader = DataLoader([(row, label, []) for row, label in zip(logits, [1] * 5, strict=True)], 2, collate_fn=collate)
    result = evaluate(torch.nn.Identity(), Accelerator().prepare(loader), Accelerator(), Progress(False))
    assert (result.images, result.not_finite, result.top1, result.top5) == (5, 3, 20, 40)
    assert math.isnan(result.loss)
    assert result.confusion.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_a_loader_that_loses_images_is_an_error():
    images = [(*pair, []) for pair in zip(*scores(23, 3), strict=True)]
    loader = Accelerator().prepare(DataLoader(images, 4, collate_fn=collate, drop_last=True))
    with pytest.raises(RunError, match="evaluation counted 20 images of 23"):
        evaluate(torch.nn.Identity(), loader, Accelerator(), Progress(False))


TWO_PROCESSES = """
import test_training_evaluation as t
for images, batch_size in ((23, 4), (5, 4), (24, 3), (1, 2)):
    t.check(t.evaluated(images, 7, batch_size), images, 7)
    t.check_several_right(images, 11, batch_size)
assert t.Accelerator().num_processes == 2
t.Accelerator().end_training()
"""


def test_two_processes():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    common["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = []
    for rank in range(2):
        env = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", TWO_PROCESSES]
        processes.append(subprocess.Popen(command, env=env))
    outputs(*processes)
    assert [process.returncode for process in processes] == [0, 0]
