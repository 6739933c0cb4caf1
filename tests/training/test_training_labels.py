"""ImageNet's other test sets, on hand-made trees and a model that reads its answer from the pixels."""

import json
import os
import pkgutil

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet

from vim.console import ConfigError
from vim.data import EvalDataConfig
from vim.training import ValidateConfig, validate, validation

os.environ["ACCELERATE_USE_CPU"] = "true"

WNIDS = ImageNetInfo().label_names()
INDICES = {
    kind: [int(i) for i in pkgutil.get_data("timm.data", f"_info/imagenet_{kind}_indices.txt").split()] for kind in "ar"
}
REAL = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))


def paint(path, first, second=0):
    """An image that tells the model its first and its second choice, each below 1024."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (first % 256, second % 256, first // 256 + second // 256 * 16)
    Image.new("RGB", (4, 4), colour).save(path, format="PNG")


def known_logits(first, second, classes=1000):
    """2 for the first choice, 1 for the second, then ever less from class 0 on."""
    logits = torch.arange(classes) * -1e-3
    logits[second] = 1.0
    logits[first] = 2.0
    return logits


class Reader(torch.nn.Module):
    def __init__(self, classes, names=None):
        super().__init__()
        self.num_classes = classes
        self.pretrained_cfg = {
            "input_size": (3, 4, 4),
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "crop_pct": 1.0,
            "label_names": names,
        }

    def forward(self, images):
        red, green, blue = (images[:, :, 0, 0] * 255).round().long().unbind(1)
        choices = zip(red + blue % 16 * 256, green + blue // 16 * 256, strict=True)
        return torch.stack([known_logits(first, second, self.num_classes) for first, second in choices])


@pytest.fixture
def results(tmp_path, monkeypatch):
    """results(labels, classes, names): of a Reader on tmp_path/val."""

    def results(labels="folder", classes=1000, names=None):
        monkeypatch.setattr(validation, "load_model", lambda config: Reader(classes, names))
        data = EvalDataConfig(str(tmp_path), num_workers=0)
        return validate(ValidateConfig("reader", data=data, labels=labels, output=str(tmp_path / "v.json")))

    return results


@pytest.mark.parametrize("names", [None, WNIDS, WNIDS[::-1]])
def test_folders_of_imagenet_v2_are_numbers(tmp_path, results, names):
    """Also for a model that has the classes in another order."""
    for number in range(1000):
        place = number if names is None else names.index(WNIDS[number])
        paint(tmp_path / "val" / str(number) / "x.png", first=(place + 1) % 1000 if number == 10 else place)
    found = results("imagenet-v2", names=names)
    assert (found["images"], found["top1"]) == (1000, 99.9)
    assert found["labels"] == "imagenet-v2"


def real_val(tmp_path, count, place):
    """The first images of ImageNet's val, with answers of all kinds; (name, logits) of each.

    Args:
        place: of ImageNet's classes among the model's.
    """
    images = []
    for number, right in enumerate(REAL[:count], 1):
        last, wrong = (right or [5])[-1], 2 + number % 3
        first, second = [(last, wrong), (wrong, last), (wrong, 999), (last, (right or [5])[0])][number % 4]
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        paint(tmp_path / "val" / WNIDS[number * 7 % 20] / name, place[first], place[second])
        images.append((name, known_logits(place[first], place[second])[place]))
    return images


@pytest.mark.parametrize("names", [None, WNIDS[::-1]])
def test_real_labels_count_as_timm_counts_them(tmp_path, results, names):
    images = real_val(tmp_path, count=60, place=[(names or WNIDS).index(wnid) for wnid in WNIDS])
    (tmp_path / "first.json").write_text(json.dumps(REAL[:60]))
    timms = RealLabelsImagenet([name for name, _ in images], real_json=tmp_path / "first.json")
    logits = torch.stack([logits for _, logits in images])
    timms.add_result(logits)
    counted = [i for i in range(60) if REAL[i]]
    assert len(counted) < 60
    assert max(len(REAL[i]) for i in counted) == 3
    found = results("imagenet-real", names=names)
    assert found["images"] == len(counted)
    assert (found["top1"], found["top5"]) == pytest.approx((timms.get_accuracy(1), timms.get_accuracy(5)))
    assert 20 < found["top1"] < found["top5"] < 90
    loss = [-logits[i].softmax(0)[REAL[i]].sum().log().item() for i in counted]
    assert found["loss"] == pytest.approx(sum(loss) / len(loss), rel=1e-5)


def test_real_labels_name_the_images_that_are_not_of_imagenets_val(tmp_path, results):
    real_val(tmp_path, count=4, place=range(1000))
    others = "dog.png", "ILSVRC2012_val_00000000.JPEG", "ILSVRC2012_val_00050001.JPEG"
    for name in (*others, "ILSVRC2012_val_00050000.JPEG"):
        paint(tmp_path / "val" / WNIDS[0] / name, 0)
    named = r", \S+".join(others)
    with pytest.raises(ConfigError, match=rf"3 of 8 images of \S+val are others: \S+{named}$"):
        results("imagenet-real")


@pytest.mark.parametrize("kind", "ar")
@pytest.mark.parametrize("names", [None, WNIDS[::-1]])
def test_only_the_200_classes_of_a_and_r_take_part(tmp_path, results, kind, names):
    """One class that is not of the set comes first for all images; without it the second choice counts."""
    place = (names or WNIDS).index
    other = place(next(wnid for i, wnid in enumerate(WNIDS) if i not in INDICES[kind]))
    for index in INDICES[kind]:
        wrong = index == INDICES[kind][3]
        second = place(WNIDS[INDICES[kind][100] if wrong else index])
        paint(tmp_path / "val" / WNIDS[index] / "x.png", other, second)
    found = results(f"imagenet-{kind}", names=names)
    assert (found["images"], found["top1"]) == (200, 99.5)
    inside = sorted(place(WNIDS[i]) for i in INDICES[kind])
    losses = []
    for number, index in enumerate(INDICES[kind]):
        logits = known_logits(other, place(WNIDS[INDICES[kind][100] if number == 3 else index]))
        losses.append(logits[inside].logsumexp(0) - logits[place(WNIDS[index])])
    assert found["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert results("folder", names=names)["top1"] == 0


def test_folders_that_are_not_of_the_set_are_counted_and_named(tmp_path, results):
    for index in INDICES["a"][2:]:
        paint(tmp_path / "val" / WNIDS[index] / "x.png", 0)
    paint(tmp_path / "val" / "n99999999" / "x.png", 0)
    missing = ", ".join(WNIDS[i] for i in INDICES["a"][:2])
    with pytest.raises(ConfigError, match=rf"1 of its folders .* \(n99999999\), 2 are missing \({missing}\)"):
        results("imagenet-a")
    with pytest.raises(ConfigError, match=r"not imagenet-v2, of 1000 .* and 194 more\), 1000 are missing \(0, 1, 10, "):
        results("imagenet-v2")


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        (3, None, "for models of ImageNet's classes; reader has 3"),
        (2, ["a", "b"], "reader does not know 200 of the 200"),
    ],
)
def test_imagenets_sets_need_a_model_of_its_classes(tmp_path, results, classes, names, message):
    for index in INDICES["a"]:
        paint(tmp_path / "val" / WNIDS[index] / "x.png", 0)
    with pytest.raises(ConfigError, match=message):
        results("imagenet-a", classes, names)


def test_a_split_may_have_some_of_the_models_classes(tmp_path, results, capsys):
    for place in (7, 500, 998):
        paint(tmp_path / "val" / WNIDS[place] / "right.png", place)
        paint(tmp_path / "val" / WNIDS[place] / "wrong.png", 0, place)  # a class without a folder may be predicted
    found = results()
    assert (found["images"], found["top1"], found["top5"]) == (6, 50, 100)
    assert "has 3 of 1000 classes; the others may be predicted too" in capsys.readouterr().out


def test_folders_are_found_by_name_where_the_model_has_names_and_by_order_where_it_has_none(tmp_path, results):
    paint(tmp_path / "val" / "b" / "x.png", 0)
    paint(tmp_path / "val" / "c" / "x.png", 1)
    assert results(classes=2)["top1"] == 100
    assert results(classes=3, names=["b", "c", "d"])["top1"] == 100
    assert results(classes=3, names=["c", "b", "a"])["top1"] == 0
    with pytest.raises(ConfigError, match=r"reader does not know 1 of the 2 classes of \S+val: c; it has 2: a, b"):
        results(classes=2, names=["a", "b"])
    with pytest.raises(ConfigError, match=r"reader has 1000 classes, \S+val has 2"):
        results(classes=1000)
