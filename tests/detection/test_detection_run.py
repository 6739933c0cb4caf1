"""Whole runs of a tiny detector with masks: training, resuming, loading, evaluation, predictions, errors."""

import contextlib
import dataclasses
import io
import json
import os

import pytest
import timm
import torch
from boxes_data import write_boxes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.testing import assert_close
from whole_runs import interrupt, one_thread, timeless  # noqa: F401  (the fixture)

import vim  # noqa: F401  (registers the models)
from vim.checkpoint import load_checkpoint
from vim.console import ConfigError, InterruptedRunError, RunError
from vim.detection import METRICS, Detection, DetectionTrainConfig, DetectionValidateConfig, load_detector, validate
from vim.detection.detector import Detector, DetectorConfig
from vim.detection.loaders import DetectionDataConfig, DetectionEvalDataConfig
from vim.detection.transforms import JitterConfig
from vim.training import train
from vim.training.averaging import EmaConfig
from vim.training.optim import OptimConfig, ScheduleConfig
from vim.training.run_folder import RunFolder

os.environ["ACCELERATE_USE_CPU"] = "true"  # runs are bit-identical on a CPU
BODY = {"depth": 3, "embed_dim": 32, "patch_size": 8, "class_token": "none", "global_pool": "avg"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """17 training and 6 evaluation images of three sizes, some without boxes; one class has no objects."""
    root = tmp_path_factory.mktemp("data")
    write_boxes(root, "train", 17)
    write_boxes(root, "val", 6, seed=1)
    return root


def config(boxes, run_dir, **changes):
    """A run with every source of randomness (jitter, erasing, box sampling, drop path), and with EMA."""
    defaults = {
        "run_dir": str(run_dir),
        "model": DetectorConfig(
            "vim_nano",
            kwargs=BODY | {"drop_path_rate": 0.2},
            img_size=64,
            channels=16,
            regions=16,
            max_boxes=20,
            score_threshold=0.0,
        ),
        "data": DetectionDataConfig(str(boxes), "val.json", "val", 4, 0, "train.json", "train", passes=6),
        "augment": JitterConfig((0.5, 1.5), color_jitter=0.2, vflip=0.5, erasing=0.5),
        "optim": OptimConfig(lr=3e-3, clip_grad=1.0, layer_decay=0.9),
        "schedule": ScheduleConfig(epochs=2, warmup_epochs=0.5),
        "ema": EmaConfig(0.9),
        "accumulate": 2,
    }
    return DetectionTrainConfig(**defaults | changes)


def validation(boxes, model, output, **changes):
    data = DetectionEvalDataConfig(str(boxes), "val.json", "val", batch_size=3, num_workers=0)
    return DetectionValidateConfig(str(model), data=data, output=str(output), **changes)


@pytest.fixture(scope="module")
def finished(boxes, tmp_path_factory):
    """The folder and the summary of a run of two epochs."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return run_dir, train(config(boxes, run_dir), task=Detection)


def test_the_folder_holds_what_it_should(finished):
    run_dir, summary = finished
    assert {path.name for path in run_dir.iterdir()} == {
        "checkpoints", "config.json", "config.yaml", "detections.png", "ema", "learning_curve.png", "log.jsonl",
        "model.safetensors", "predictions.json", "starts.jsonl", "summary.json",
    }  # fmt: skip
    assert {path.name for path in (run_dir / "ema").iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert summary["updates"] == 2 * (6 * 17 // 8)
    assert summary["val_images"] == 6
    assert set(summary["per_class"]) == {"red", "blue", "green"}
    assert summary["per_class"]["green"]["mask_AP"] == -1
    losses = [json.loads(line)["train_loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_predictions_file_scores_like_the_summary(finished, boxes, kind):
    run_dir, summary = finished
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(boxes / "val.json"))
        run = COCOeval(coco, coco.loadRes(str(run_dir / "predictions.json")), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    prefix = "mask_" if kind == "segm" else ""
    assert_close([summary[prefix + name] for name in METRICS], run.stats.tolist(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("folder", "prefix"), [("", ""), ("ema", "ema_")])
def test_a_run_folder_evaluates_like_the_training_run(finished, boxes, folder, prefix, tmp_path):
    run_dir, summary = finished
    weights = load_checkpoint(run_dir / "checkpoints" / "last.pt")["model_ema" if folder else "model"]
    stored = load_detector(run_dir / folder)
    assert (stored.classes, stored.category_ids) == (["red", "blue", "green"], [3, 7, 9])
    for name, value in stored.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    results = validate(validation(boxes, run_dir / folder, tmp_path / "out"))
    for name in ("AP", "AR100", "mask_AP", "mask_AP50"):  # another batch size changes rounding
        assert results[name] == pytest.approx(summary[prefix + name], abs=1e-3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json", "predictions.json", "detections.png",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_a_checkpoint_evaluates_with_its_averaged_weights(finished, boxes, tmp_path):
    run_dir, summary = finished
    last = str(run_dir / "checkpoints" / "last.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "detections.png").write_bytes(b"of another evaluation")
    results = validate(validation(boxes, run_dir, tmp_path / "out", checkpoint=last, sheet=0))
    assert results["AR100"] == pytest.approx(summary["ema_AR100"], abs=1e-3)
    assert not (tmp_path / "out" / "detections.png").exists()


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(finished, boxes, tmp_path, monkeypatch):
    run_dir = tmp_path / "cut"
    interrupt(monkeypatch, Detection, 14)
    with pytest.raises(InterruptedRunError, match=r"stopped by SIGINT; resume with: python tools/train_detection.py"):
        train(config(boxes, run_dir), task=Detection)
    monkeypatch.undo()
    torch.manual_seed(99)  # the state of the global generator must not matter
    train(config(boxes, run_dir), resume=True, task=Detection)
    whole, cut = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (finished[0], run_dir))
    assert timeless(whole["history"]) == timeless(cut["history"])
    for part in ("model", "model_ema"):
        for name, weight in whole[part].items():
            assert torch.equal(weight, cut[part][name]), name
    assert (run_dir / "predictions.json").read_text() == (finished[0] / "predictions.json").read_text()


def test_a_detector_overfits_eight_images(boxes, tmp_path):
    """Without augmentation, evaluated on the training images."""
    content = json.loads((boxes / "train.json").read_text())
    content["images"] = [image for image in content["images"] if image["id"] % 4 != 1][:8]  # only images with boxes
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (boxes / "eight.json").write_text(json.dumps(content))
    learning = config(
        boxes,
        tmp_path / "run",
        model=DetectorConfig("vim_nano", kwargs=BODY, detector="fcos", img_size=64, channels=64),
        data=DetectionDataConfig(str(boxes), "eight.json", "train", 8, 0, "eight.json", "train", passes=85),
        augment=JitterConfig((1.0, 1.0), hflip=0.0),
        optim=OptimConfig(lr=4e-3, weight_decay=0.0, clip_grad=1.0),
        ema=EmaConfig(),
        accumulate=1,
    )
    summary = train(learning, task=Detection)
    assert summary["AP"] > 0.9


def test_what_does_not_fit_is_refused(finished, boxes, tmp_path):
    run_dir = finished[0]
    with pytest.raises(RunError, match=r"run folder .* exists; resume it: python tools/train_detection.py"):
        train(config(boxes, run_dir), task=Detection)
    content = json.loads((boxes / "val.json").read_text())
    content["categories"][0]["name"] = "rot"
    (boxes / "renamed.json").write_text(json.dumps(content))
    other = config(boxes, tmp_path / "no")
    other.data.val_annotations = "renamed.json"
    with pytest.raises(ConfigError, match=r"train.json and renamed.json have different categories: .*red.* and .*rot"):
        train(other, task=Detection)
    assert not (tmp_path / "no").exists()
    wrong = validation(boxes, run_dir, tmp_path / "no")
    wrong.data.val_annotations = "renamed.json"
    with pytest.raises(ConfigError, match=r"was trained on the categories .*red.* has .*rot"):
        validate(wrong)
    with pytest.raises(ConfigError, match=r"cannot write to .*val\.json: File exists; choose another output"):
        validate(validation(boxes, run_dir, boxes / "val.json"))
    with pytest.raises(RunError, match=r"no detector in .*; give the folder of a finished run"):
        load_detector(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vim_nano"}')
    with pytest.raises(RunError, match=r"the model in .* is not a detector; train one with tools/train_detection.py"):
        load_detector(tmp_path)
    about = json.loads((run_dir / "config.json").read_text())
    about["classes"].append("more")
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"does not fit the model of .*: \d+ have another shape"):
        load_detector(tmp_path, str(run_dir / "model.safetensors"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("changes", [{}, {"class_token": "none", "global_pool": "avg"}])
def test_a_classifiers_run_folder_serves_as_backbone(tmp_path, changes):
    torch.manual_seed(0)
    kwargs = BODY | {"img_size": 32, "class_token": "middle", "global_pool": "token"}
    classifier = timm.create_model("vim_nano", num_classes=5, **kwargs)
    run = RunFolder(tmp_path / "run", "tools/train.py")
    run.path.mkdir()
    run.export(classifier, kwargs, {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}, list("abcde"))
    about = DetectorConfig(str(run.path), pretrained=True, kwargs=changes, img_size=64, channels=16)
    detector = Detector(about, 2)
    body, weights = detector.body.model, classifier.state_dict()
    for name, weight in body.blocks.state_dict().items():
        assert torch.equal(weight, weights[f"blocks.{name}"]), name
    assert body.pos_embed.shape == (1, 64 + (not changes), 32)
    assert_close(detector.network.transform.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))


def test_an_official_checkpoint_serves_as_backbone(golden, tmp_path):
    """Golden weights under the official names: patches of 16, images of 64 pixels."""
    state = golden("g1_midcls_p16_img64", "state_dict.")
    torch.save({"model": state}, tmp_path / "official.pth")
    kwargs = {"depth": 3, "embed_dim": 48, "class_token": "none", "global_pool": "avg"}
    about = DetectorConfig("vim_tiny", checkpoint=str(tmp_path / "official.pth"), kwargs=kwargs, img_size=128)
    body = Detector(about, 2).body.model
    assert_close(body.blocks[2].mixer.in_proj.weight, state["layers.2.mixer.in_proj.weight"])
    assert body.pos_embed.shape[1] == 8 * 8


def test_the_folder_keeps_the_config(finished):
    stored = load_detector(finished[0])
    assert dataclasses.asdict(stored.config)["regions"] == 16
    assert not stored.model.training
