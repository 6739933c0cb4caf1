"""Every option of detection has a test that sees its effect."""

import dataclasses
import json
import os

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from boxes_data import write_boxes
from option_effects import Seen
from PIL import Image
from torch.testing import assert_close
from torchvision.ops import box_iou
from torchvision.transforms.functional import pil_to_tensor
from whole_runs import one_thread  # noqa: F401  (the fixture)

import vim  # noqa: F401  (registers the models)
from vim.console.progress import Progress
from vim.data import DataError, SampleKey
from vim.detection import (
    Detection,
    DetectionTrainConfig,
    DetectionValidateConfig,
    Detector,
    DetectorConfig,
    training,
    validate,
)
from vim.detection import validation as validation_module
from vim.detection.loaders import DetectionDataConfig, DetectionEvalDataConfig
from vim.detection.store import StoredDetector, load_detector, save_detector
from vim.detection.transforms import JitterConfig
from vim.experiments import detection_benchmark as benchmark
from vim.experiments.benchmark_config import BenchmarkConfig, Contender, Workload
from vim.experiments.detection_benchmark import DetectionBenchmarkConfig, build_detector_step
from vim.timm_models.accelerator import create_accelerator
from vim.training.config import RunConfig
from vim.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
os.environ["ACCELERATE_USE_CPU"] = "true"
BODY = {"depth": 3, "embed_dim": 16, "class_token": "none", "global_pool": "avg"}
SIZE = 64
sees = Seen()


def test_every_field_has_a_test_that_sees_its_effect():
    """Except fields of `RunConfig` and `BenchmarkConfig`, which other files test."""
    classes = {
        DetectorConfig: None,
        DetectionDataConfig: None,
        JitterConfig: None,
        DetectionEvalDataConfig: None,
        DetectionTrainConfig: RunConfig,
        DetectionValidateConfig: None,
        DetectionBenchmarkConfig: BenchmarkConfig,
    }
    parts = {(DetectionTrainConfig, part) for part in ("model", "data", "augment")} | {
        (DetectionValidateConfig, "data")
    }
    fields = {(each, field.name) for each in classes for field in dataclasses.fields(each)}
    inherited = {(each, field.name) for each, base in classes.items() if base for field in dataclasses.fields(base)}
    assert fields - inherited - parts == sees


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """Five training and three evaluation images with the same file names, all as large as the square."""
    root = tmp_path_factory.mktemp("data")
    write_boxes(root, "train", 5, sizes=((SIZE, SIZE),))
    write_boxes(root, "val", 3, seed=1, sizes=((SIZE, SIZE),))
    return root


def about(kind="fcos", **changes):
    given = {"name": "vim_nano", "kwargs": BODY, "detector": kind, "img_size": SIZE, "channels": 64, "regions": 16}
    return DetectorConfig(**given | changes)


def data_of(boxes, **changes):
    given = {"batch_size": 2, "num_workers": 0, "train_annotations": "train.json", "train_images": "train"}
    return DetectionDataConfig(str(boxes), "val.json", "val", **given | changes)


def task(boxes, model=None, augment=None, run=(), **data):
    """A `Detection` with these sections of its config; run: other fields; data: fields of its data section."""
    config = DetectionTrainConfig(
        model=model or about(),
        data=data_of(boxes, **data),
        augment=augment or JitterConfig((1.0, 1.0), hflip=0.0),
        **dict(run),
    )
    return Detection(config, create_accelerator("fp32"), Progress(False))


def pixels(path):
    with Image.open(path) as image:
        return pil_to_tensor(image) / 255


@sees(DetectorConfig, "name", "kwargs", "channels", "img_size", "regions")
@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade_mask_rcnn"])
def test_a_detector_has_the_sizes_of_its_config(kind):
    model = Detector(about(kind, channels=16, img_size=128, regions=5, kwargs=BODY | {"depth": 4}), 2).train()
    assert len(model.body.model.blocks) == 4
    assert not Detector(about(name="resnet10t", kwargs={}), 2).backbone.plain
    heads = model.network.roi_heads
    maps, pooled = [], []
    model.backbone.register_forward_hook(lambda module, args, output: maps.extend([args[0], *output.values()]))
    first = heads.box_head[0] if kind.startswith("cascade") else heads.box_head
    first.register_forward_hook(lambda module, args, output: pooled.append((args[0].shape[0], output.shape[1])))
    target = {"boxes": torch.tensor([[4.0, 5, 60, 70]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 90, 70, dtype=torch.uint8)
    model([torch.rand(3, 90, 70)], [target])
    sizes = [(16, 128 // stride, 128 // stride) for stride in (4, 8, 16, 32, 64)]
    assert [tuple(m.shape[1:]) for m in maps] == [(3, 128, 128), *sizes]
    assert pooled == [(5, 4 * 16)]
    labels = [torch.cat([torch.ones(300), torch.zeros(300)])]
    drawn = [[mask.sum() for (mask,) in part.fg_bg_sampler(labels)] for part in (heads, model.network.rpn)]
    assert drawn == [[1, 4], [128, 128]]  # at most a quarter of the regions and half of the anchors are positives


@sees(DetectorConfig, "pretrained", "checkpoint")
@pytest.mark.parametrize("given", ["pretrained", "checkpoint", "neither"])
def test_a_backbone_starts_from_the_given_weights(tmp_path, given):
    torch.manual_seed(0)
    first = Detector(about(), 2)
    save_detector(StoredDetector(first, about(), ["a", "b"], [1, 2]), tmp_path)
    weights = first.body.model.state_dict()
    classifier = RunFolder(tmp_path / "run", "tools/train.py")
    classifier.path.mkdir()
    whole = timm.create_model("vim_nano", num_classes=2, img_size=SIZE, **BODY)
    whole.load_state_dict(weights, strict=False)
    torch.save({"model": whole.state_dict()}, tmp_path / "body.pth")
    classifier.export(whole, BODY | {"img_size": SIZE}, {"mean": (0.5,) * 3, "std": (0.2,) * 3}, ["a", "b"])
    changes = {
        "pretrained": {"name": str(classifier.path), "pretrained": True},
        "checkpoint": {"checkpoint": str(tmp_path / "body.pth")},
        "neither": {"name": str(classifier.path), "pretrained": False},
    }[given]
    model = Detector(about(**changes), 2)
    key = "blocks.0.mixer.in_proj.weight"
    assert torch.equal(model.body.model.state_dict()[key], weights[key]) == (given != "neither")
    save_detector(StoredDetector(model, about(**changes), ["a", "b"], [1, 2]), tmp_path / "trained")
    (tmp_path / "body.pth").unlink()
    load_detector(tmp_path / "trained")  # needs no initial weights


KINDS = {
    "faster_rcnn": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"},
    "mask_rcnn": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"},
    "cascade_rcnn": {"loss_objectness", "loss_rpn_box_reg"}
    | {f"loss_{what}_{stage}" for what in ("classifier", "box_reg") for stage in (1, 2, 3)},
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
}
KINDS["cascade_mask_rcnn"] = KINDS["cascade_rcnn"] | {"loss_mask"}


@sees(DetectorConfig, "detector", "score_threshold", "nms_threshold", "max_boxes")
@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_applies_its_thresholds(kind):
    torch.manual_seed(0)
    first = Detector(about(kind), 2)
    if kind == "fcos":  # larger boxes, which overlap their neighbours
        torch.nn.init.constant_(first.network.head.regression_head.bbox_reg.bias, 2.0)
    target = {"boxes": torch.tensor([[4.0, 5, 40, 50]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, SIZE, SIZE, dtype=torch.uint8)
    image = torch.rand(3, SIZE, SIZE)
    assert set(first.train()([image], [target])) == KINDS[kind]

    def found(**changes):
        model = Detector(about(kind, **{"score_threshold": 0.0, "nms_threshold": 0.5, "max_boxes": 30} | changes), 2)
        model.load_state_dict(first.state_dict())
        with torch.no_grad():
            return model.eval()([image])[0]

    def overlap(detected):
        """Largest IoU of two boxes of a class."""
        same = detected["labels"][:, None] == detected["labels"]
        return (box_iou(detected["boxes"], detected["boxes"]) * same).nan_to_num().fill_diagonal_(0).max()

    everything = found()
    assert len(everything["boxes"]) == 30
    assert set(everything["labels"].tolist()) <= {1, 2}  # never the background
    few = found(max_boxes=4)
    assert_close(few["scores"], everything["scores"][:4])
    least = everything["scores"][9:11].mean().item()
    assert_close(found(score_threshold=least)["scores"], everything["scores"][:10])
    assert overlap(found(nms_threshold=0.2)) <= 0.2
    assert 0.2 < overlap(everything) <= 0.5 < overlap(found(nms_threshold=0.9)) <= 0.9


@sees(DetectorConfig, "grad_checkpointing", "compile", "cuda_graph")
@pytest.mark.parametrize("option", ["grad_checkpointing", "compile", "cuda_graph"])
def test_only_the_backbone_is_checkpointed_compiled_or_captured(boxes, monkeypatch, option):
    captured, compiled = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(training, "wants_cuda_graph", lambda model, config, *_: config.cuda_graph)
    monkeypatch.setattr(training, "capture_training", lambda *args: captured.append(args))
    options = {"grad_checkpointing": False, "compile": False, "cuda_graph": False}
    model = task(boxes, about(**options | {option: True})).state.model
    assert {block.grad_checkpointing for block in model.body.model.blocks} == {option == "grad_checkpointing"}
    assert compiled == [model.backbone] * (option == "compile")  # shapes in the heads change with every image
    assert [(part is model.backbone, sample.shape) for part, sample, _ in captured] == (
        [(True, (2, 3, SIZE, SIZE))] if option == "cuda_graph" else []
    )


@sees(DetectionDataConfig, "root", "train_annotations", "train_images", "val_annotations", "val_images")
@sees(DetectionDataConfig, "batch_size", "num_workers", "passes")
def test_training_and_evaluation_read_their_own_images(boxes):
    """Both sets have the same file names; pixels and boxes tell them apart."""
    run = task(boxes, batch_size=2, passes=3)
    assert run.train_batches.dataset.name(SampleKey(0, 1, 0)) == str(boxes / "train" / "001.png")
    for key in (1, 5 + 1, 10 + 1):
        image, target, _ = run.train_batches.dataset[SampleKey(0, key, 0)]
        assert_close(image, pixels(boxes / "train" / "001.png"))
        assert target["image_id"] == 11
    (batch, targets), *_ = run.val_batches
    assert_close(batch[1], pixels(boxes / "val" / "001.png"))
    objects = [a for a in json.loads((boxes / "val.json").read_text())["annotations"] if a["image_id"] == 11]
    assert len(targets[1]["boxes"]) == len(objects)
    assert (len(run.train_batches), len(run.val_batches), run.images_per_epoch) == (7, 2, 14)
    assert [len(images) for images, _ in run.val_batches] == [2, 1]
    assert {len(images) for images, *_ in run.train_batches} == {2}
    for batches in (run.train_batches, run.val_batches):
        assert batches.num_workers == 0
    more = task(boxes, num_workers=2)
    assert [batches.num_workers for batches in (more.train_batches, more.val_batches)] == [2, 2]


def test_the_seed_sets_order_and_augmentation_and_an_epoch_has_whole_updates(boxes):
    jitter = JitterConfig((0.5, 1.5))
    runs = [task(boxes, augment=jitter, run={"seed": seed, "accumulate": 2}, passes=3) for seed in (0, 0, 1)]
    orders = [[t["image_id"] for _, targets, _ in run.train_batches for t in targets] for run in runs]
    sizes = [[run.train_batches.dataset[SampleKey(0, n, 0)][0].shape for n in range(5)] for run in runs]
    for found in (orders, sizes):
        assert found[0] == found[1] != found[2]
    assert [run.images_per_epoch for run in runs] == [12] * 3  # 15, rounded down to whole updates of 4


@sees(DetectionDataConfig, "bad_images")
@pytest.mark.parametrize("bad_images", ["raise", "skip"])
def test_unreadable_images_stop_a_run_or_are_listed(tmp_path, bad_images):
    for split in ("train", "val"):
        write_boxes(tmp_path, split, 4, sizes=((SIZE, SIZE),))
    bad = [tmp_path / "train" / name for name in ("001.png", "002.png")]
    for path in bad:
        path.write_bytes(b"no image")
    batches = task(tmp_path, bad_images=bad_images, batch_size=4).train_batches
    if bad_images == "raise":
        with pytest.raises(DataError, match=r"cannot read image .*001\.png"):
            batches.dataset[SampleKey(0, 1, 0)]
    else:
        ((_, targets, listed),) = batches
        assert set(listed) == set(map(str, bad))
        assert {target["image_id"] for target in targets} == {10, 13}
        instead = [batches.dataset[SampleKey(epoch, 1, 0)][1]["image_id"] for epoch in range(16)]
        assert set(instead) == {10, 13}  # different replacements


def augmented(boxes, number=1, draws=1, **changes):
    """`draws` augmented versions of one training image, with their targets."""
    data = task(boxes, augment=JitterConfig(**{"scale": (1.0, 1.0), "hflip": 0.0} | changes)).train_batches.dataset
    return [data[SampleKey(epoch, number, 0)][:2] for epoch in range(draws)]


@sees(JitterConfig, "hflip", "vflip")
@pytest.mark.parametrize(("flip", "axis"), [("hflip", 2), ("vflip", 1)])
def test_a_flip_mirrors_pixels_and_boxes_along_its_axis_only(boxes, flip, axis):
    ((image, target),), ((plain, want),) = augmented(boxes, **{flip: 1.0}), augmented(boxes)
    assert torch.equal(image, plain.flip(axis))
    moved = want["boxes"].clone()
    low, high = (0, 2) if axis == 2 else (1, 3)
    moved[:, [low, high]] = SIZE - want["boxes"][:, [high, low]]
    assert_close(target["boxes"], moved)
    flipped = [torch.equal(changed, image) for changed, _ in augmented(boxes, draws=40, **{flip: 0.5})]
    assert 8 < sum(flipped) < 32


@sees(JitterConfig, "scale")
def test_scales_are_drawn_from_their_range(boxes):
    edges = [image.shape[1] for image, _ in augmented(boxes, draws=60, scale=(0.25, 0.75))]
    assert 0.25 * SIZE - 1 <= min(edges) < 0.35 * SIZE
    assert 0.65 * SIZE < max(edges) <= 0.75 * SIZE + 1
    grown, ((plain, _),) = augmented(boxes, draws=20, scale=(2.0, 2.0)), augmented(boxes)
    assert {tuple(image.shape) for image, _ in grown} == {(3, SIZE, SIZE)}
    assert len({image.sum().item() for image, _ in grown}) > 10  # random crop positions
    assert all(not torch.equal(image, plain) for image, _ in grown)
    one_more = {image.sum().item() for image, _ in augmented(boxes, draws=40, scale=(1 + 1 / SIZE, 1 + 1 / SIZE))}
    assert len(one_more) == 4  # the crop drops one row and one column, at either end


@sees(JitterConfig, "erasing")
def test_erasing_has_its_probability(boxes):
    ((plain, _),) = augmented(boxes)
    changed = [not torch.equal(image, plain) for image, _ in augmented(boxes, draws=40, erasing=0.5)]
    assert 8 < sum(changed) < 32


@sees(JitterConfig, "color_jitter")
def test_brightness_contrast_and_saturation_change_up_to_the_factor(tmp_path):
    """In an image of two halves, brightness scales the mean; brightness and contrast scale the difference of the
    halves; all three scale the difference of red and green."""
    for split in ("train", "val"):
        write_boxes(tmp_path, split, 2, sizes=((SIZE, SIZE),))
    image = Image.new("RGB", (SIZE, SIZE), (110, 80, 80))
    image.paste((80, 50, 50), (SIZE // 2, 0, SIZE, SIZE))
    image.save(tmp_path / "train" / "001.png")
    grey = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]
    factors = []
    for image, _ in augmented(tmp_path, draws=80, color_jitter=0.5):
        light = (image * grey).sum(0)
        mean, difference = light.mean(), light[:, 0].mean() - light[:, -1].mean()
        chroma = (image[0] - image[1]).mean()
        brightness, contrast = mean / (73.97 / 255), difference / (30 / 255)
        factors.append((brightness, contrast / brightness, chroma / (30 / 255) / contrast))
    for values in torch.tensor(factors).T:
        assert 0.4 < values.min() < 0.65
        assert 1.35 < values.max() < 1.6


@pytest.fixture(scope="module")
def stored(boxes, tmp_path_factory):
    """Folders of two untrained detectors, which detect something everywhere."""
    root = tmp_path_factory.mktemp("stored")
    config = about(score_threshold=0.0, max_boxes=5)
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        (root / name).mkdir()
        save_detector(StoredDetector(Detector(config, 3), config, ["red", "blue", "green"], [3, 7, 9]), root / name)
    return root


@pytest.fixture
def validation(boxes, stored, tmp_path, monkeypatch):
    """validation(changes of data, **other changes): results, predictions and the dataloader that was used."""
    module = validation_module
    loaders, eval_loader = [], module.eval_loader
    monkeypatch.setattr(module, "eval_loader", lambda *args: loaders.append(eval_loader(*args)) or loaders[-1])

    def run(data=(), **changes):
        given = DetectionEvalDataConfig(**{"root": str(boxes), "val_annotations": "val.json", "val_images": "val"}
                                        | {"batch_size": 2, "num_workers": 0} | dict(data))  # fmt: skip
        given = {"model": str(stored / "one"), "data": given, "output": str(tmp_path / "out"), "sheet": 0} | changes
        AcceleratorState._reset_state(True)  # otherwise a process keeps its first precision
        results = validate(DetectionValidateConfig(**given))
        assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
        return results, json.loads((tmp_path / "out" / "predictions.json").read_text()), loaders[-1]

    yield run
    AcceleratorState._reset_state(True)


@sees(DetectionValidateConfig, "model", "checkpoint", "precision", "output", "sheet")
@sees(DetectionEvalDataConfig, "root", "val_annotations", "val_images", "batch_size", "num_workers")
def test_validation_uses_the_model_and_data_of_its_config(validation, boxes, stored, tmp_path):
    results, one, loader = validation()
    assert (results["images"], loader.batch_size, loader.num_workers) == (3, 2, 0)
    assert not (tmp_path / "out" / "detections.png").exists()
    assert {row["image_id"] for row in one} == {10, 11, 12}
    _, other, _ = validation(model=str(stored / "other"), sheet=1)
    assert other != one
    with Image.open(tmp_path / "out" / "detections.png") as sheet:
        assert sheet.size == (12 * 80, 6 * 80)
    weights = str(stored / "other" / "model.safetensors")
    _, taken, loader = validation({"batch_size": 3}, checkpoint=weights)
    assert loader.batch_size == 3
    assert_close([row["score"] for row in taken], [row["score"] for row in other], atol=1e-5, rtol=1e-4)
    _, rounded, _ = validation(precision="bf16")
    assert [row["score"] for row in rounded] != [row["score"] for row in one]
    results, trained, _ = validation({"root": str(boxes.parent), "val_annotations": f"{boxes.name}/train.json"}
                                     | {"val_images": f"{boxes.name}/train"})  # fmt: skip
    assert (results["images"], len({row["image_id"] for row in trained})) == (5, 5)
    _, swapped, _ = validation({"val_images": "train"})
    assert [row for row in swapped if row["score"]] != one


@sees(DetectionBenchmarkConfig, "detector", "kwargs", "classes", "boxes")
def test_a_benchmark_step_follows_its_config(monkeypatch):
    seen, detector = [], benchmark.Detector

    def recorded(config, classes):
        model = detector(config, classes)
        model.forward = lambda images, targets: seen.append((config, classes, model, images, targets)) or {}
        return model

    monkeypatch.setattr(benchmark, "Detector", recorded)
    work = Workload("train", 128, 2)
    config = DetectionBenchmarkConfig(
        ["vim_nano"], [work], "cpu", "fp32", detector="faster_rcnn", kwargs={"vim_nano": BODY}, classes=5, boxes=4
    )
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    build_detector_step(config, Contender("vim_nano"), work, "fp32", torch.device("cpu"))()
    ((about_model, classes, model, images, targets),) = seen
    assert (about_model.detector, classes, len(model.body.model.blocks)) == ("faster_rcnn", 5, 3)
    assert [tuple(image.shape) for image in images] == [(3, 128, 128)] * 2
    assert [len(target["boxes"]) for target in targets] == [4, 4]
    assert max(target["labels"].max() for target in targets) <= 5
    assert model.network.roi_heads.box_predictor.cls_score.out_features == 6
