"""Evaluation counts each image once, whatever the batch size and the number of processes."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader

from vim.data.loaders import collate
from vim.training.evaluation import evaluate
from vim.training.progress import Progress

os.environ["ACCELERATE_USE_CPU"] = "true"


def scores(images, classes):
    """Logits and labels that no two images share."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, classes, generator=generator), torch.randint(classes, (images,), generator=generator)


def evaluated(images, classes, batch_size):
    accelerator = Accelerator()
    loader = accelerator.prepare(
        DataLoader([(*pair, []) for pair in zip(*scores(images, classes), strict=True)], batch_size, collate_fn=collate)
    )
    return evaluate(torch.nn.Identity(), loader, accelerator, Progress(False))


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


TWO_PROCESSES = """
import test_training_evaluation as t
for images, batch_size in ((23, 4), (5, 4), (24, 3), (1, 2)):
    t.check(t.evaluated(images, 7, batch_size), images, 7)
assert t.Accelerator().num_processes == 2
t.Accelerator().end_training()
"""


def test_two_processes():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    processes = []
    for rank in range(2):
        env = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", TWO_PROCESSES]
        processes.append(subprocess.Popen(command, env=env, cwd=os.path.dirname(__file__)))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
