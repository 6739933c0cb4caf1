"""COCO's metrics against pycocotools, the result format, and plots of detections."""

import contextlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from boxes_data import write_boxes
from PIL import Image
from pycocotools import mask as pycoding
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import Subset

from vim.console import RunError
from vim.console.progress import Progress
from vim.detection import CocoData, evaluation, plots, sheet
from vim.detection.evaluation import METRICS, Evaluation, as_results, coco_metrics, evaluate
from vim.detection.loaders import EvalImages, eval_loader


def random_case(seed, images=12, categories=(2, 5, 11), size=200):
    """Ground truth with crowds, empty images and a category without objects; predictions near it and elsewhere."""
    rng = np.random.default_rng(seed)
    truth = {
        "images": [{"id": i, "width": size, "height": size} for i in range(images)],
        "categories": [{"id": c, "name": str(c)} for c in (*categories, 99)],
        "annotations": [],
    }
    predictions = []

    def mask_of(x, y, w, h):
        mask = np.zeros((size, size), np.uint8, order="F")
        mask[round(y) : round(y + h), round(x) : round(x + w * 0.7)] = 1
        code = pycoding.encode(mask)
        return {"size": list(code["size"]), "counts": code["counts"].decode()}, int(mask.sum())

    for image in range(0, images, 2):
        for _ in range(rng.integers(1, 9)):
            w, h = np.exp(rng.uniform(np.log(8), np.log(120), 2))
            x, y = rng.uniform(0, size - w), rng.uniform(0, size - h)
            code, area = mask_of(x, y, w, h)
            category = int(rng.choice(categories))
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": area,
                    "iscrowd": int(rng.random() < 0.1),
                    "segmentation": code,
                }
            )
            for _ in range(rng.integers(0, 3)):
                dx, dy, dw, dh = rng.normal(0, 0.12, 4)
                box = [max(0, x + dx * w), max(0, y + dy * h), w * np.exp(dw), h * np.exp(dh)]
                predictions.append(
                    {
                        "image_id": image,
                        "category_id": category if rng.random() < 0.8 else int(rng.choice(categories)),
                        "bbox": box,
                        "score": float(rng.random()),
                        "segmentation": mask_of(*box)[0],
                    }
                )
    for image in range(1, images, 3):
        box = [10.0, 20.0, 30.0, 40.0]
        predictions.append(
            {"image_id": image, "category_id": 2, "bbox": box, "score": 0.9, "segmentation": mask_of(*box)[0]}
        )
    return truth, predictions


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_those_of_pycocotools(kind, seed):
    truth, predictions = random_case(seed)
    got, per_class = coco_metrics(truth, predictions, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes([dict(row) for row in predictions]), kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert list(got) == list(METRICS)
    assert 0.05 < got["AP"] < 0.95
    np.testing.assert_allclose(list(got.values()), run.stats, atol=1e-6)
    for category in (2, 5, 11, 99):
        with contextlib.redirect_stdout(io.StringIO()):
            run.params.catIds = [category]
            run.evaluate()
            run.accumulate()
            run.summarize()
        np.testing.assert_allclose([per_class[category][name] for name in ("AP", "AP50")], run.stats[:2], atol=1e-6)
    assert per_class[99] == {"AP": -1.0, "AP50": -1.0, "F1": 0.0, "threshold": 0.0}


def test_the_best_f1_and_its_threshold_by_hand():
    """Four objects. Detections with scores 0.9, 0.7 and 0.4 are correct, those with 0.8, 0.35, 0.3 and 0.25 are not."""
    places = [[20 * i, 0, 10, 10] for i in range(4)]
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0}
        for i, box in enumerate(places)
    ]
    truth = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "thing"}], "annotations": annotations}
    scored = [(places[0], 0.9), ([0, 50, 9, 9], 0.8), (places[1], 0.7), (places[2], 0.4)]
    scored += [([0, 50, 9, 9], score) for score in (0.35, 0.3, 0.25)]
    rows = [{"image_id": 1, "category_id": 1, "bbox": box, "score": score} for box, score in scored]
    found = coco_metrics(truth, rows, "bbox")[1][1]
    assert found["threshold"] == pytest.approx(0.4)
    assert found["F1"] == pytest.approx(2 * 0.75 * 0.75 / 1.5)  # recall 3/4, precision 3/4


def test_no_detections_and_no_objects():
    truth, predictions = random_case(0)
    assert coco_metrics(truth, [], "bbox")[0]["AP"] == 0
    empty = truth | {"annotations": []}
    assert set(coco_metrics(empty, [], "bbox")[0].values()) == {-1.0}
    assert set(coco_metrics(empty, predictions, "bbox")[0].values()) == {-1.0}


def test_perfect_predictions_score_one_and_stay_unchanged():
    truth, _ = random_case(1)
    things = [a for a in truth["annotations"] if not a["iscrowd"]]
    predictions = [{key: a[key] for key in ("image_id", "category_id", "bbox", "segmentation")} for a in things]
    predictions = [row | {"score": 0.5} for row in predictions]
    before = [dict(row) for row in predictions]
    for kind in ("bbox", "segm"):
        metrics, _ = coco_metrics(truth, predictions, kind)
        assert metrics["AP"] == pytest.approx(1)
    assert predictions == before


def test_detections_become_results():
    masks = torch.zeros(2, 1, 6, 8)
    masks[0, 0, 1:3, 2:7] = 0.51
    masks[1, 0, 0, 0] = 0.5  # not above the threshold
    detected = {
        "boxes": torch.tensor([[2.0, 1.0, 7.0, 3.0], [0.0, 0.0, 1.0, 1.5]]),
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.75, 0.5]),
        "masks": masks,
    }
    first, second = as_results(detected, 42, [3, 7])
    assert (first["image_id"], first["category_id"], first["score"]) == (42, 7, 0.75)
    assert first["bbox"] == [2, 1, 5, 2]
    assert second["bbox"] == [0, 0, 1, 1.5]
    assert second["category_id"] == 3
    np.testing.assert_array_equal(pycoding.decode(first["segmentation"]), masks[0, 0].numpy() > 0.5)
    assert pycoding.area(second["segmentation"]) == 0


class Perfect(torch.nn.Module):
    """Detects all objects of the images it knows, but masks only for the first class; records its calls."""

    def __init__(self, images, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.known = {image.sum().item(): target for image, target in images}
        self.calls = []

    def forward(self, images):
        self.calls.append((len(images), self.training, torch.is_autocast_enabled("cpu")))
        return [self.found(self.known[image.sum().item()]) for image in images]

    def found(self, target):
        masks = target["masks"][:, None] * (target["labels"] == 1)[:, None, None, None]
        return {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(masks)), "masks": masks}


def test_each_image_counts_once_for_any_number_of_processes(tmp_path, monkeypatch, capsys):
    """Two processes see some images twice, as padding, and in another order than the data."""
    write_boxes(tmp_path, "val", 5, seed=2)
    data = CocoData(tmp_path / "val.json", tmp_path / "val", masks=True)
    images, arrived, steps = EvalImages(data), [], []
    monkeypatch.setattr(evaluation, "gather_object", lambda mine: arrived.extend(mine) or arrived)
    bf16 = SimpleNamespace(autocast=lambda: torch.autocast("cpu", torch.bfloat16))

    def of_process(model, *places):
        loader = eval_loader(Subset(images, places), 2, 0)
        return evaluate(model, loader, data, bf16, Progress(), lambda: steps.append(len(model.calls)))

    with pytest.raises(RunError, match="evaluation saw 2 of 5 images"):
        of_process(Perfect(images, float("nan")), 4, 2)
    assert "warning: the model has non-finite weights and will detect nothing" in capsys.readouterr().out
    steps.clear()
    model = Perfect(images, 1.0)
    result = of_process(model, 3, 1, 0, 4, 1)
    assert "warning" not in capsys.readouterr().out
    assert model.calls == [(2, False, True), (2, False, True), (1, False, True)]
    assert steps == [1, 2, 3]
    assert (result.images, len(result.predictions)) == (5, data.boxes)
    assert [row["image_id"] for row in result.predictions] == [a["image_id"] for a in data.truth()["annotations"]]
    assert {name: result.values[name] for name in ("AP", "APs", "APm")} == pytest.approx({"AP": 1, "APs": 1, "APm": -1})
    scores = {name: (row["AP"], row["mask_AP"]) for name, row in result.per_class.items()}
    assert scores == {"red": pytest.approx((1, 1)), "blue": pytest.approx((1, 0)), "green": (-1, -1)}
    assert result.values["mask_AP"] == pytest.approx(0.5)
    assert result.metrics("ema_")["ema_mask_AP50"] == result.values["mask_AP50"]


def test_pictures_of_detections_show_truth_and_predictions_in_the_colours_of_their_classes(tmp_path, monkeypatch):
    """With category ids that are no indices, 7 and 30. More than 40 boxes are drawn without names."""
    colormaps = pytest.importorskip("matplotlib").colormaps
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, dpi: figures.append(figure))
    truth = [{"category_id": 30, "bbox": [2, 3, 4, 5], "segmentation": [[2, 3, 6, 3, 6, 8, 2, 8]]}]
    found = [{"category_id": 7, "bbox": [1, 0, 9, 6], "score": 0.456}]
    many = [{"category_id": 7, "bbox": [1, 1, 2, 2]} for _ in range(41)]
    image = Image.new("RGB", (20, 12))
    plots.plot_detections([image] * 2, [truth, many], [found, many[:40]], {7: "cat", 30: "dog"}, tmp_path / "x.png")
    (left, right), (crowded, full) = figures[0].axes[:2], figures[0].axes[2:]
    assert [axes.get_title().rsplit(": ")[-1] for axes in figures[0].axes] == ["1", "1", "41", "40"]
    (cat, dog) = (colormaps["tab10"](place) for place in (0, 1))
    for axes, box, colour, text in ((left, (2, 3, 4, 5), dog, "dog"), (right, (1, 0, 9, 6), cat, "cat 0.46")):
        (patch,), (name,) = axes.patches, axes.texts
        assert (*patch.get_xy(), patch.get_width(), patch.get_height()) == box
        assert patch.get_edgecolor() == colour
        assert (name.get_text(), name.get_position()) == (text, box[:2])
    shape = left.images[1].get_array()
    inside = np.zeros((12, 20), bool)
    inside[3:8, 2:6] = True
    np.testing.assert_array_equal(shape[..., 3] > 0, inside)
    np.testing.assert_allclose(shape[3, 2], (*dog[:3], 0.4))
    assert len(right.images) == 1
    assert [(len(axes.patches), len(axes.texts)) for axes in (crowded, full)] == [(41, 0), (40, 40)]


def test_the_learning_curve_plots_every_average_precision(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path, dpi: figures.append(figure))
    names = ("AP", "AP50", "mask_AP", "ema_AP", "ema_AP50", "ema_mask_AP")
    history = [{"epoch": e, "train_loss": 9.0 - e, **{n: i + e / 9 for i, n in enumerate(names)}} for e in (1, 2)]
    plots.plot_learning_curve(history, tmp_path / "x.png")
    loss, precision = figures[0].axes
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[1, 8], [2, 7]]]
    shown = {line.get_label(): line.get_xydata().tolist() for line in precision.lines}
    assert shown == {n: [[1, i + 1 / 9], [2, i + 2 / 9]] for i, n in enumerate(names)}


def test_a_sheet_shows_spread_images_with_the_boxes_from_the_best_f1(tmp_path, monkeypatch):
    """For a class that was never detected: boxes with a score of at least 0.5."""
    content = write_boxes(tmp_path, "val", 5, seed=2)
    data = CocoData(tmp_path / "val.json", tmp_path / "val")
    scores = [(3, 0.2), (3, 0.3), (7, 0.49), (7, 0.5)]
    found = [
        {"image_id": image, "category_id": category, "score": score, "bbox": [image, 0, 1, 1]}
        for image in (14, 12, 11, 10)
        for category, score in scores
    ]
    per_class = {"red": {"F1": 0.4, "threshold": 0.3}, "blue": {"F1": 0.0, "threshold": 0.0}}
    per_class["green"] = per_class["blue"]
    drawn = []
    monkeypatch.setattr(sheet, "plot_detections", lambda *args: drawn.extend(args))
    sheet.write_sheet(data, Evaluation(5, found, {}, per_class), 3, tmp_path / "sheet.png")
    images, truths, shown, names, _ = drawn
    assert [image.size for image in images] == [(64, 64), (90, 50), (48, 80)]
    assert [[row["image_id"] for row in rows][:1] for rows in truths] == [[10], [12], [14]]
    assert sum(map(len, truths)) == sum(a["image_id"] in (10, 12, 14) for a in content["annotations"])
    assert [[(row["image_id"], row["score"]) for row in rows] for rows in shown] == [
        [(image, 0.3), (image, 0.5)] for image in (10, 12, 14)
    ]
    assert names == {3: "red", 7: "blue", 9: "green"}
