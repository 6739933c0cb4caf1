"""Reading COCO's format: boxes, masks, ground truth for the evaluators, errors for bad files; and boxes from CSV."""

import contextlib
import io
import itertools
import json
import os
import re
import runpy
import sys
from pathlib import Path

import faster_coco_eval
import numpy as np
import pytest
import torch
from boxes_data import write_boxes
from faster_coco_eval.core import mask as coding
from PIL import Image
from pycocotools.coco import COCO
from torch.testing import assert_close

from vim.console import ConfigError
from vim.data import DataError, ImageFolder
from vim.detection import CocoData, boxes_to_coco, coco_metrics
from vim.detection.training import _record
from vim.training.data_record import names_within, record_data

WIDTH, HEIGHT = 20, 12


def thing(number, box, category=7, image=5, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, **more}


@pytest.fixture
def data(tmp_path):
    """data(annotations, masks=False, **other lists of the file) with images 5 and 2 and categories 7 and 3."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png"):
        Image.new("RGB", (WIDTH, HEIGHT), (10, 20, 30)).save(tmp_path / "images" / name)
    size = {"width": WIDTH, "height": HEIGHT}
    rest = {
        "images": [{"id": 5, "file_name": "a.png", **size}, {"id": 2, "file_name": "deep/b.png", **size}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "bird"}],
    }

    def data(annotations, masks=False, **parts):
        file = tmp_path / "boxes.json"
        file.write_text(json.dumps({**rest, "annotations": annotations, **parts}))
        return CocoData(file, tmp_path / "images", masks=masks)

    return data


def test_order_of_images_and_labels(data):
    boxes = data([thing(1, [1, 2, 3, 4]), thing(2, [0.5, 0, 2, 2], 3, image=2), thing(9, [2, 2, 1, 1], 3)])
    assert (boxes.classes, boxes.category_ids, boxes.image_ids, len(boxes)) == (["bird", "cat"], [3, 7], [5, 2], 2)
    image, target = boxes.load(0)
    assert (image.mode, image.size, target["image_id"]) == ("RGB", (WIDTH, HEIGHT), 5)
    assert_close(target["boxes"], torch.tensor([[1.0, 2, 4, 6], [2, 2, 3, 3]]))
    assert_close(target["labels"], torch.tensor([2, 1]))
    assert "masks" not in target
    assert_close(boxes.load(1)[1]["boxes"], torch.tensor([[0.5, 0, 2.5, 2]]))
    assert boxes.describe() == "2 images, 2 classes, 3 boxes"


def test_boxes_are_clipped_and_those_without_area_dropped(data):
    boxes = data(
        [
            thing(1, [-2, -3, 5, 7]),
            thing(2, [18.5, 10, 10, 10]),
            thing(3, [4, 4, 0, 3]),
            thing(4, [4, 4, 3, 0]),
            thing(5, [WIDTH, 0, 5, 5]),  # touches the image from outside
            thing(6, [0, -5, 5, 5], iscrowd=1),
        ]
    )
    assert_close(boxes.load(0)[1]["boxes"], torch.tensor([[0.0, 0, 3, 4], [18.5, 10, 20, 12]]))
    found = [(a["bbox"], a["area"]) for a in boxes.truth()["annotations"]]
    assert found == [([0, 0, 3, 4], 12), ([18.5, 10, 1.5, 2], 3)]
    assert (boxes.boxes, boxes.dropped) == (2, 4)
    assert boxes.describe() == "2 images, 2 classes, 2 boxes; dropped 4 boxes without area"


def test_only_the_metrics_see_crowds(data):
    rows = [thing(1, [1, 1, 4, 4], iscrowd=1, area=9), thing(2, [2, 2, 5, 5]), thing(3, [8, 2, 5, 5], area=0)]
    rows += [thing(4, [0, 0, 1, 1], iscrowd=True), thing(5, [8, 2, 5, 5], iscrowd=False)]
    rows += [thing(6, [8, 2, 5, 5], iscrowd=None, area=None)]
    boxes = data(rows)
    assert_close(boxes.load(0)[1]["boxes"], torch.tensor([[2.0, 2, 7, 7]] + 3 * [[8, 2, 13, 7]]))
    found = [(a["iscrowd"], a["area"]) for a in boxes.truth()["annotations"]]
    assert found == [(1, 9), (0, 25), (0, 25), (1, 1), (0, 25), (0, 25)]


def test_an_image_without_a_box(data):
    target = data([], masks=True).load(1)[1]
    assert (target["boxes"].shape, target["boxes"].dtype) == ((0, 4), torch.float32)
    assert (target["labels"].shape, target["labels"].dtype) == ((0,), torch.int64)
    assert (target["masks"].shape, target["masks"].dtype) == ((0, HEIGHT, WIDTH), torch.uint8)


def test_the_digest_changes_with_the_annotations(data):
    first = thing(1, [1, 1, 4, 4])
    changes = [{"bbox": [1, 1, 4, 5]}, {"category_id": 3}, {"image_id": 2}, {"iscrowd": 1}, {"area": 11.0}]
    digests = [data([first | change]).digest() for change in ({}, *changes)]
    assert len(set(digests)) == 6
    assert data([first]).digest() == digests[0]


def test_both_evaluators_read_the_truth(tmp_path):
    content = write_boxes(tmp_path, "val", 9)
    content["annotations"][0]["area"] = 33.5
    content["annotations"][1]["iscrowd"] = 1
    (tmp_path / "val.json").write_text(json.dumps(content))
    truth = CocoData(tmp_path / "val.json", tmp_path / "val").truth()
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        readers = COCO(str(tmp_path / "truth.json")), faster_coco_eval.COCO(truth)
    for reader in readers:
        assert len(reader.getImgIds()) == 9
        assert reader.getCatIds() == [3, 7, 9]
        crowds = reader.getAnnIds(iscrowd=True)
        assert [a["bbox"] for a in reader.loadAnns(crowds)] == [content["annotations"][1]["bbox"]]
        assert sum(a["area"] for a in reader.loadAnns(reader.getAnnIds())) == sum(
            a["area"] for a in content["annotations"]
        )


def test_an_object_with_the_id_0_counts(data):
    """Evaluators use the id 0 for "no object": without renumbering, the precision would be 0."""
    found = {"image_id": 5, "category_id": 7, "bbox": [1, 1, 6, 6], "score": 0.9}
    assert coco_metrics(data([thing(0, [1, 1, 6, 6])]).truth(), [found], "bbox")[0]["AP"] == pytest.approx(1)


def rectangle(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    return mask


def polygon(x1, y1, x2, y2):
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def compressed(mask):
    return {"size": [HEIGHT, WIDTH], "counts": bytes(coding.encode(mask)["counts"]).decode()}


def uncompressed(mask):
    """Lengths of the runs of 0, 1, 0 ... in column-major order."""
    flat = mask.flatten(order="F")
    ends = [*(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    counts = np.diff([0, *ends]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": [0, *counts] if flat[0] else counts}


def test_masks_of_polygons_and_run_length_codes(data):
    notched = rectangle(2, 3, 9, 8) | rectangle(0, 0, 2, 2)
    shapes = {
        "polygon": ([polygon(2, 3, 9, 8)], rectangle(2, 3, 9, 8)),
        "two": ([polygon(2, 3, 9, 8), polygon(0, 0, 2, 2)], notched),
        "beyond the image": ([polygon(15, 8, 16 * WIDTH, 40)], rectangle(15, 8, WIDTH, HEIGHT)),
        # Decoders would take the four numbers in front as a box and ignore the rest.
        "with a line": ([[1, 1, 5, 5], polygon(2, 3, 9, 8)], rectangle(2, 3, 9, 8)),
        "compressed": (compressed(notched), notched),
        "uncompressed": (uncompressed(notched), notched),
    }
    rows = [thing(n, [0, 0, 9, 9], segmentation=shape) for n, (shape, _) in enumerate(shapes.values())]
    rows.insert(2, thing(99, [0, 0, 9, 9], segmentation=compressed(rectangle(5, 5, 6, 6)), iscrowd=1))
    boxes = data(rows, masks=True)
    masks = boxes.load(0)[1]["masks"]
    assert masks.dtype == torch.uint8
    for name, got, (_, want) in zip(shapes, masks, shapes.values(), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)
    assert len(boxes.truth()["annotations"]) == 7
    perfect = [
        {"image_id": 5, "category_id": 7, "segmentation": compressed(mask), "score": 0.5} for _, mask in shapes.values()
    ]
    assert coco_metrics(boxes.truth(), perfect, "segm")[0]["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({}, "no usable segmentation"),
        ({"segmentation": []}, "no usable segmentation"),
        ({"segmentation": [[1, 1, 5, 5]]}, "no usable segmentation"),
        ({"segmentation": polygon(2, 3, 9, 8)}, "no usable segmentation"),
        ({"segmentation": [[1, 1, 5, 5, 3, 7, 2]]}, "no usable segmentation"),
        ({"segmentation": [[1, 1, 5, 5, 3, float("nan")]]}, "no usable segmentation"),
        ({"segmentation": [[1, 1, 5, 5, 3, "7"]]}, "no usable segmentation"),
        ({"segmentation": [[1, 1, 5, 5, 3, 10**400]]}, "no usable segmentation"),
        ({"segmentation": [[1, 1, 5, 5, 3, 1e9]]}, "no usable segmentation"),  # decoding would take gigabytes
        ({"segmentation": [[1, 1, 5, 5, 3, 16 * WIDTH + 1]]}, "no usable segmentation"),
        ({"segmentation": [[1, 1, 5, 5, 3, -1e9]]}, "no usable segmentation"),
        ({"segmentation": [{}]}, "no usable segmentation"),
        ({"segmentation": "1,1,5,5,3,7"}, "no usable segmentation"),
        ({"segmentation": {"size": [HEIGHT, WIDTH]}}, "no usable segmentation"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": ["240"]}}, "no usable segmentation"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [[240]]}}, "no usable segmentation"),
        (
            {"segmentation": {"size": [WIDTH, HEIGHT], "counts": [240]}},
            r"a segmentation of size \[20, 12\], want \[12, 20\]",
        ),
    ],
)
def test_masks_need_shapes(data, shape, message):
    rows = [thing(4, [1, 1, 4, 4], **shape)]
    assert len(data(rows)) == 2
    with pytest.raises(DataError, match=f"annotation 4 of a.png has {message}.*train a detector without masks"):
        data(rows, masks=True)


@pytest.mark.parametrize("crowd", [0, 1])
@pytest.mark.parametrize("counts", [[10], [200, 200], [-5, 245], [10**30], "xyz", "\u4e2d"])
def test_a_damaged_run_length_code(data, counts, crowd):
    shape = {"size": [HEIGHT, WIDTH], "counts": counts}
    boxes = data([thing(4, [1, 1, 4, 4], segmentation=shape, iscrowd=crowd)], masks=True)
    with pytest.raises(DataError, match=r"annotation 4 of a\.png has a segmentation that cannot be decoded"):
        boxes.load(0)


def test_masks_without_their_package_say_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    data([])
    with pytest.raises(DataError, match=r"pip install 'vim-mamba\[detection\]'"):
        data([], masks=True)


CAT = {"id": 7, "name": "cat"}
PICTURE = {"id": 5, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"annotations": [thing(8, [1, 2, 3])]}, r"annotation 8 of a.png has the box \[1, 2, 3\]; want x, y, width"),
        ({"annotations": [thing(8, [1, 2, 3, float("nan")])]}, r"annotation 8 of a.png has the box \[1, 2, 3, nan\]"),
        ({"annotations": [thing(8, [1, 2, float("inf"), 4])]}, r"annotation 8 of a.png has the box \[1, 2, inf, 4\]"),
        ({"annotations": [thing(8, [1, 2, 3, "4"])]}, r"annotation 8 of a.png has the box \[1, 2, 3, '4'\]"),
        ({"annotations": [thing(8, [1, 2, -3, 4])]}, r"annotation 8 of a.png has the box \[1, 2, -3, 4\]"),
        ({"annotations": [thing(8, [1, 2, True, 4])]}, r"annotation 8 of a.png has the box \[1, 2, True, 4\]"),
        ({"annotations": [thing(8, [1, 2, 3, 10**400])]}, r"annotation 8 of a.png has the box \[1, 2, 3, 1000"),
        ({"annotations": [thing(8, None)]}, "an entry of annotations has None for bbox, want list: id 8"),
        (
            {"annotations": [{"segmentation": 99 * [0]} | thing(8, [1, 2, 3, 4], "7")]},
            "an entry of annotations has '7' for category_id, want int: id 8",
        ),
        ({"annotations": [thing(8, [1, 2, 3, 4], True)]}, "has True for category_id, want int: id 8"),
        ({"annotations": [thing(8.0, [1, 2, 3, 4])]}, r"an entry of annotations has 8\.0 for id, want int: id 8\.0"),
        ({"annotations": [thing(2**63, [1, 2, 3, 4])]}, f"has {2**63} for id, want a 64-bit integer"),
        ({"annotations": [thing(10**400, [1, 2, 3, 4])]}, "has an integer of more than 100 digits for id"),
        *[
            (
                {"annotations": [thing(8, [1, 2, 3, 4], iscrowd=v)]},
                f"annotation 8 of a.png has iscrowd {v!r}; want 0 or",
            )
            for v in ("0", "1", 2, -1, 0.0, 1.0, "false")
        ],
        ({"annotations": [thing(8, [1, 2, 3, 4], iscrowd=[])]}, r"annotation 8 of a.png has iscrowd \[\]; want 0 or 1"),
        *[
            ({"annotations": [thing(8, [1, 2, 3, 4], area=v)]}, f"annotation 8 of a.png has area {v!r}; want pixels")
            for v in ("12", -1, float("nan"), True)
        ],
        ({"annotations": [thing(8, [1, 2, 3, 4], image=1)]}, "annotation 8 has image_id 1, which is not in"),
        ({"annotations": [thing(8, [1, 2, 3, 4], 9)]}, "annotation 8 has category_id 9, which is not in"),
        ({"annotations": [thing(8, [1, 2, 3, 4]), thing(8, [1, 2, 3, 5])]}, "annotation id 8 occurs twice"),
        (
            {"annotations": [{"id": 1, "image_id": 5, "bbox": [0, 0, 1, 1]}]},
            "an entry of annotations has no category_id",
        ),
        ({"annotations": None}, "not in COCO's format: it has no list of annotations"),
        ({"categories": [CAT, CAT]}, "category id 7 occurs twice"),
        ({"categories": [CAT, {"id": "3", "name": "bird"}]}, "an entry of categories has '3' for id, want int"),
        ({"categories": [CAT, {"id": 3, "name": "cat"}]}, "category name cat occurs twice"),
        ({"categories": []}, "has 2 images and 0 categories; want at least one"),
        ({"images": []}, "has 0 images and 2 categories; want at least one"),
        ({"images": [PICTURE, PICTURE]}, "image id 5 occurs twice"),
        ({"images": [5]}, "an entry of images has no id: 5"),
        ({"images": [{"id": 5, "file_name": "a.png"}]}, "an entry of images has no width"),
        ({"images": [PICTURE | {"file_name": 5000 * "a"}]}, "1 of 1 images of .* are not in .*, the first is aaaa"),
        ({"images": [PICTURE | {"width": 0}]}, "an entry of images has 0 for width, want pixels: id 5"),
        ({"images": [PICTURE | {"height": 10**400}]}, "has an integer of more than 100 digits for height, want pixels"),
        ({"images": [PICTURE | {"width": 20.0}]}, r"an entry of images has 20\.0 for width, want int: id 5"),
        ({"images": [PICTURE | {"file_name": "../a.png"}]}, r"file name '../a\.png' leaves the folder"),
        ({"images": [PICTURE | {"file_name": "b/../../a.png"}]}, r"file name 'b/\.\./\.\./a\.png' leaves the"),
        ({"images": [PICTURE | {"file_name": "/a.png"}]}, r"file name '/a\.png' leaves the folder"),
        (
            {"images": [PICTURE, PICTURE | {"id": 1, "file_name": "x.png"}, PICTURE | {"id": 2, "file_name": "y.png"}]},
            r"2 of 3 images of .*boxes\.json are not in .*images, the first is x\.png",
        ),
    ],
)
def test_an_inconsistent_file(data, parts, message):
    with pytest.raises(DataError, match=rf"boxes\.json.*{message}" if message[0] not in "12" else message):
        data(**{"annotations": [], **parts})


HOSTILE = [None, True, 1, -1, 2.5, 1e308, float("nan"), 10**30, 2**63, "", "1", "\ud800", "a\nb\0", 5000 * "a"]
HOSTILE += [[], {}, [None], [[1, 2]], [[1e300] * 6], [0, 0, 10**400, 1], {"size": [HEIGHT, WIDTH], "counts": "PPPP0"}]
HOSTILE += [{"size": [HEIGHT, WIDTH], "counts": [-1, 241]}, {"size": [HEIGHT, WIDTH], "counts": [2**32, 240]}]


def test_any_value_is_accepted_or_refused_in_one_line(data):
    shape = {"size": [HEIGHT, WIDTH], "counts": [10, 20, 210]}
    rows = [thing(1, [1, 1, 4, 4], segmentation=[polygon(2, 3, 9, 8)], area=9), thing(2, [1, 1, 4, 4], iscrowd=1)]
    rows[1]["segmentation"] = shape
    whole = {"annotations": rows, "images": [PICTURE], "categories": [CAT]}
    taken, messages = 0, []
    cases = [(part, row, key) for part, rows in whole.items() for row in rows for key in row]
    for (part, row, key), value in itertools.product(cases, HOSTILE):
        changed = [other | {key: value} if other is row else other for other in whole[part]]
        try:
            boxes = data(**whole | {part: changed}, masks=True)
            boxes.load(0)
            json.dumps(boxes.truth(), allow_nan=False)
            taken += 1
        except DataError as error:
            messages.append(str(error))
    assert taken > 10
    assert len(messages) > 200
    assert [text for text in messages if len(text) > 1000 or len(text.splitlines()) > 1] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\xff", "is not JSON"),
        (b"[]", "is not in COCO's format: want images, annotations and categories"),
        (b"[" * 200_000, "is not in COCO's format: it is nested too deeply"),
        (b'{"images": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (None, "no annotation file .*; give a JSON file in COCO's format"),
    ],
)
def test_a_file_that_is_not_in_coco_format(tmp_path, content, message):
    if content is not None:
        (tmp_path / "boxes.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        CocoData(tmp_path / "boxes.json", tmp_path)


def test_images_that_contradict_the_annotations(data, tmp_path):
    boxes = data([])
    path = tmp_path / "images" / "a.png"
    Image.new("RGB", (HEIGHT, WIDTH)).save(path)
    with pytest.raises(DataError, match=re.escape(f"image {path} has 12 x 20 pixels, ")):
        boxes.load(0)
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=re.escape(f"cannot read image {path}: ")):
        boxes.load(0)


def test_exif_orientation_is_ignored(data, tmp_path):
    """COCO's boxes refer to the stored pixels, whatever the EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "images" / "a.png", exif=exif)
    image, _ = data([]).load(0)
    assert (image.size, image.mode) == ((WIDTH, HEIGHT), "RGB")


@pytest.mark.parametrize("name", ["plain", "x\ny", "\udcff\\n"])
def test_image_names_do_not_contain_their_folder(tmp_path, name):
    """The image folder, whatever its name, may be renamed before a run is resumed."""
    content = write_boxes(tmp_path, "boxes", 2)
    content["annotations"][0]["area"] += 1
    (tmp_path / "others.json").write_text(json.dumps(content))
    (tmp_path / name).mkdir()
    folder = (tmp_path / "boxes").rename(tmp_path / name / "a")
    boxes, classified = CocoData(tmp_path / "boxes.json", folder), ImageFolder(tmp_path, name)
    assert list(names_within(classified.path, classified)) == ["a/000.png", "a/001.png"]
    want = record_data([], {"training": ["000.png", "001.png"]})["splits"]["training"]["hash"]
    record = _record(boxes, boxes)
    assert [split["hash"] for split in record["splits"].values()] == [want, want]
    assert record["classes"] == ["red (id 3)", "blue (id 7)", "green (id 9)"]
    other = CocoData(tmp_path / "others.json", folder)
    splits = _record(boxes, other)["splits"]
    annotations = [splits[name]["annotations"] for name in ("training", "evaluation")]
    assert annotations == [boxes.digest(), other.digest()]
    assert boxes.digest() != other.digest()


HEADER = "image_path,xmin,ymin,xmax,ymax,label,score\n"


@pytest.fixture
def table(tmp_path):
    """table(rows): write a CSV file beside two images, one of them in a subfolder."""
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 40)).save(tmp_path / "deep" / "b.png")

    def table(rows, header=HEADER):
        path = tmp_path / "boxes.csv"
        path.write_text(header + rows, encoding="utf-8-sig")
        return path

    return table


def test_boxes_from_a_csv_file(table, tmp_path, monkeypatch, capsys):
    file = table("a.png,1,2,4,6,Oak,0.9\ndeep/b.png,,,,,,,,\na.png,0.5,0,2,2,Ash,1\n")
    tool = Path(__file__).parents[2] / "tools" / "boxes_to_coco.py"
    monkeypatch.setattr(sys, "argv", [tool.name, str(file), str(tmp_path), str(tmp_path / "new" / "boxes.json")])
    runpy.run_path(str(tool), run_name="__main__")
    assert "2 images, 2 annotations, 2 categories" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["boxes.json"]
    content = json.loads((tmp_path / "new" / "boxes.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "Ash"}, {"id": 2, "name": "Oak"}]
    boxes = CocoData(tmp_path / "new" / "boxes.json", tmp_path)
    assert [i["file_name"] for i in boxes.truth()["images"]] == ["a.png", "deep/b.png"]
    assert_close(boxes.load(0)[1]["boxes"], torch.tensor([[1.0, 2, 4, 6], [0.5, 0, 2, 2]]))
    assert_close(boxes.load(0)[1]["labels"], torch.tensor([2, 1]))
    assert [a["area"] for a in content["annotations"]] == [12, 3]
    assert len(boxes.load(1)[1]["boxes"]) == 0


def test_a_row_of_zeros_is_an_image_without_boxes(table, tmp_path):
    content = boxes_to_coco(table("a.png,0,0,0,0,Oak,\ndeep/b.png,1,1,2,2,Oak,\n"), tmp_path, tmp_path / "boxes.json")
    assert [(len(content["images"]), a["image_id"]) for a in content["annotations"]] == [(2, 2)]


def test_classes_are_sorted_by_name(table, tmp_path):
    rows = "".join(f"a.png,1,1,2,2,{label},\n" for label in "ecfadb")
    content = boxes_to_coco(table(rows), tmp_path, tmp_path / "boxes.json")
    assert content["categories"] == [{"id": place, "name": name} for place, name in enumerate("abcdef", 1)]
    assert [a["category_id"] for a in content["annotations"]] == [5, 3, 6, 1, 4, 2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.png,1,2,x,6,Oak,", r"line 4: want xmin < xmax and ymin < ymax in pixels, got 1, 2, x, 6"),
        ("a.png,1,2,,6,Oak,", r"line 4: want xmin < xmax"),
        ("a.png,4,2,4,6,Oak,", r"line 4: want xmin < xmax"),
        ("a.png,1,6,4,2,Oak,", r"line 4: want xmin < xmax"),
        ("a.png,1,2,nan,6,Oak,", r"line 4: want xmin < xmax"),
        ("a.png,1,2,4,6", r"line 4: the box has no label"),
        ("a.png,1,2,4,6,Oak,1,red", r"line 4: more values than the header has columns"),
        ("a.png,1,2,1_0,6,Oak,", r"line 4: want xmin < xmax"),
        ("pipe.png,1,2,4,6,Oak,", r"line 4: cannot read image .*pipe\.png: no such file"),
        (f"{5000 * 'a'},1,2,4,6,Oak,", r"line 4: cannot read image .*aaa: no such file"),
        ("c.png,1,2,4,6,Oak,", r"line 4: cannot read image .*c\.png"),
        ("../a.png,1,2,4,6,Oak,", r"line 4: want an image_path inside .*, got '\.\./a\.png'"),
        ("deep/../../a.png,1,2,4,6,Oak,", r"line 4: want an image_path inside .*, got 'deep/"),
        (",1,2,4,6,Oak,", r"line 4: want an image_path inside .*, got ''"),
    ],
)
def test_a_bad_csv_row(table, tmp_path, row, message):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=rf"boxes\.csv, {message}"):
        boxes_to_coco(table(f"a.png,1,2,4,6,Oak,\n\n{row}\n"), tmp_path, tmp_path / "boxes.json")
    assert not (tmp_path / "boxes.json").exists()


def test_an_output_that_cannot_be_written(table, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write to .*a\.png: File exists; choose another output"):
        boxes_to_coco(table("a.png,1,2,4,6,Oak,\n"), tmp_path, tmp_path / "a.png" / "boxes.json")


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            "image_path,xmin,ymin,xmax,label\n",
            "a.png,1,2,4,Oak\n",
            r"has no column 'ymax'; want a header with image_path",
        ),
        (HEADER, "", "has no rows"),
        (f"label,{HEADER}", "Ash,a.png,1,2,4,6,Oak,\n", "has the column 'label' twice"),
        (HEADER, "a.png,,,,,,\n", "has no box, only images without boxes"),
    ],
)
def test_an_unusable_csv_file(table, tmp_path, header, rows, message):
    with pytest.raises(DataError, match=message):
        boxes_to_coco(table(rows, header), tmp_path, tmp_path / "boxes.json")


def test_a_missing_or_binary_csv_file(tmp_path):
    with pytest.raises(DataError, match=r"no file .*boxes\.csv; give a CSV file of boxes"):
        boxes_to_coco(tmp_path / "boxes.csv", tmp_path, tmp_path / "boxes.json")
    (tmp_path / "boxes.csv").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"cannot read .*boxes\.csv: .*; want comma-separated text in UTF-8"):
        boxes_to_coco(tmp_path / "boxes.csv", tmp_path, tmp_path / "boxes.json")
