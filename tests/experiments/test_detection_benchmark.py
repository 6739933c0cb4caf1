"""The detection benchmark times a training step of the configured detector."""

from pathlib import Path

import pytest
import torch

import vim  # noqa: F401  (registers the models)
from vim.console import ConfigError, ConfigParser
from vim.experiments import detection_benchmark as benchmark
from vim.experiments.benchmark_config import Contender, Workload
from vim.experiments.detection_benchmark import DetectionBenchmarkConfig, build_detector_step

CPU, WORK = torch.device("cpu"), Workload("train", 64, 1)


def test_a_step_trains_the_detector(monkeypatch):
    config = DetectionBenchmarkConfig(
        ["vim_nano"], [WORK], "cpu", "bf16", detector="fcos", kwargs={"vim_nano": {"depth": 3, "embed_dim": 16}}
    )
    built, detector = [], benchmark.Detector
    monkeypatch.setattr(benchmark, "Detector", lambda *a: built.append(detector(*a)) or built[-1])
    step = build_detector_step(config, Contender("vim_nano", ("checkpoint",)), WORK, "bf16", CPU)
    (model,) = built
    assert model.body.model.blocks[0].grad_checkpointing
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [step() for _ in range(2)]
    assert all(loss.isfinite() and loss.shape == () for loss in losses)
    assert losses[0] != losses[1]
    assert all(p.grad is None for p in model.parameters())  # gradients do not accumulate over steps
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == len(before)


def test_objects_lie_in_the_image_and_masks_fill_their_boxes():
    torch.manual_seed(0)
    objects = benchmark._objects(DetectionBenchmarkConfig(boxes=5, classes=3), 100, CPU)
    assert objects["masks"].shape == (5, 100, 100)
    assert set(objects["labels"].tolist()) <= {1, 2, 3}
    for box, mask in zip(objects["boxes"].long().tolist(), objects["masks"], strict=True):
        x1, y1, x2, y2 = box
        assert 0 <= x1 < x2 <= 100
        assert 0 <= y1 < y2 <= 100
        assert mask[y1:y2, x1:x2].all()
        assert mask.sum() == (x2 - x1) * (y2 - y1)


def test_the_configuration_parses():
    path = Path(__file__).parents[2] / "configs" / "benchmark_detection.yaml"
    config, _ = ConfigParser(DetectionBenchmarkConfig, "").parse_config(["--config", str(path)])
    assert {contender.model for _, contender in config.plan()} == {"vim_tiny", "deit_tiny_patch16_224"}
    assert set(config.kwargs) <= {contender.model for _, contender in config.plan()}


def test_inference_is_refused():
    with pytest.raises(ConfigError, match=r"mode must be train"):
        DetectionBenchmarkConfig(workloads=[Workload("inference", 64, 1)])
    with pytest.raises(ConfigError, match=r"boxes must be at least 1, got 0"):
        DetectionBenchmarkConfig(boxes=0)
