"""The trees data set: positions of tiles, their boxes, and that it is complete or absent."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vim.data import DataError
from vim.detection import CocoData, trees, write_trees
from vim.detection.trees import boxes_in_tile, tile_starts

TOOL = Path(__file__).parents[2] / "tools" / "prepare_trees.py"


@pytest.mark.parametrize(
    ("length", "step", "want"),
    [
        (1249, 400, [0, 283, 566, 849]),
        (1035, 400, [0, 318, 635]),
        (1000, 200, [0, 200, 400, 600]),
        (800, 400, [0, 400]),
        (401, 400, [0, 1]),
        (400, 200, [0]),
        (90, 200, [0]),
    ],
)
def test_tiles_cover_an_edge_and_stay_inside(length, step, want):
    assert tile_starts(length, step) == want


@pytest.mark.parametrize("step", [200, 400])
def test_tiles_are_as_few_as_possible(step):
    for length in range(401, 2600, 37):
        starts = tile_starts(length, step)
        gaps = np.diff(starts)
        assert (starts[0], starts[-1]) == (0, length - 400)
        assert gaps.max() <= step
        assert len(gaps) == -(-(length - 400) // step)
        assert gaps.max() - gaps.min() <= 1  # evenly spread


def test_a_tile_keeps_boxes_that_are_at_least_half_visible():
    tile = (100, 200, 500, 600)
    boxes = [
        (110.0, 220.0, 130.0, 250.0),  # inside
        (90.0, 200.0, 110.0, 230.0),  # half to the left
        (89.0, 200.0, 110.0, 230.0),  # more than half
        (480.0, 590.0, 510.0, 605.0),  # two thirds of its width and of its height: 4/9
        (480.0, 580.0, 505.0, 605.0),  # 4/5 of each: 16/25
        (500.0, 300.0, 520.0, 320.0),  # touches
        (0.0, 0.0, 1000.0, 1000.0),  # larger than the tile: 16/100
    ]
    assert boxes_in_tile(boxes, tile) == [(10, 20, 20, 30), (0, 0, 10, 30), (380, 380, 20, 20)]


SIZES = {"2019_YELL_2_528000_4978000_image_crop2": (620, 450), "OSBS_029": (90, 70)}
SIZES |= {"2019_YELL_2_541000_4977000_image_crop": (810, 400)}
BOX = "<object><name>Tree</name><bndbox>{}</bndbox></object>"


def voc(*boxes):
    corners = ("".join(f"<{n}>{v}</{n}>" for n, v in zip(trees.CORNERS, box, strict=True)) for box in boxes)
    return f"<annotation>{''.join(BOX.format(c) for c in corners)}</annotation>"


@pytest.fixture
def source(tmp_path):
    """A folder like that of the package, with small pictures whose colours encode pixel positions."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, (width, height) in SIZES.items():
        y, x = np.mgrid[:height, :width]
        Image.fromarray(np.stack([x % 256, y % 256, x // 256], 2).astype(np.uint8)).save(
            folder / f"{name}.png", compress_level=1
        )
        (folder / f"{name}.xml").write_text(voc((10, 20, 40, 50), (width - 30, height - 20, width, height)))
    return folder


def test_tiles_and_their_boxes(tmp_path, source):
    root = tmp_path / "new" / "trees"
    assert write_trees(root, source)
    assert sorted(p.name for p in root.iterdir()) == ["train", "train.json", "val", "val.json"]
    assert [p.name for p in root.parent.iterdir()] == ["trees"]  # no temporary folder left
    splits = {split: CocoData(root / f"{split}.json", root / split) for split in ("train", "val")}
    # 620 x 450: 3 x 2 tiles, starts 0, 110, 220 and 0, 50. 90 x 70: one. 810 x 400: 3, starts 0, 205, 410.
    assert [d.describe() for d in splits.values()] == ["7 images, 1 classes, 4 boxes", "3 images, 1 classes, 2 boxes"]
    assert splits["val"].classes == ["Tree"]
    places = {}
    for data in splits.values():
        for index, entry in enumerate(data.truth()["images"]):
            image, target = data.load(index)
            stem, left, top = entry["file_name"].removesuffix(".png").rsplit("_", 2)
            assert image.size == (min(400, SIZES[stem][0]), min(400, SIZES[stem][1]))
            assert image.getpixel((7, 3)) == ((int(left) + 7) % 256, int(top) + 3, (int(left) + 7) // 256)
            places[entry["file_name"]] = target["boxes"].tolist()
    first, small, val = SIZES
    assert places[f"{first}_0_0.png"] == [[10, 20, 40, 50]]
    assert places[f"{first}_110_50.png"] == []
    assert places[f"{first}_220_50.png"] == [[370, 380, 400, 400]]
    assert places[f"{small}_0_0.png"] == [[10, 20, 40, 50], [60, 50, 90, 70]]
    assert places[f"{val}_410_0.png"] == [[370, 380, 400, 400]]
    assert {name for name in places if name.startswith(val)} == {f"{val}_{x}_0.png" for x in (0, 205, 410)}


def test_an_existing_folder_is_kept_or_refused(tmp_path, source):
    root = tmp_path / "trees"
    write_trees(root, source)
    tile = next((root / "val").glob("*.png"))
    tile.write_bytes(b"mine")
    assert not write_trees(root, source)
    assert tile.read_bytes() == b"mine"
    (root / "train" / "more.png").touch()
    with pytest.raises(DataError, match=r"want train\.json and its tiles in train/"):
        write_trees(root, source)
    (root / "train" / "more.png").unlink()
    tile.unlink()
    with pytest.raises(
        DataError, match=r"exists and is not this data set: want val\.json and its tiles in val/; remove"
    ):
        write_trees(root, source)
    with pytest.raises(DataError, match=r"want train\.json and its tiles in train/"):
        write_trees(tmp_path, source)
    other = {"images": [{"file_name": "dog.png"}]}
    (root / "train.json").write_text(json.dumps(other))
    for path in (root / "train").iterdir():
        path.unlink()
    (root / "train" / "dog.png").touch()
    with pytest.raises(DataError, match=r"want train\.json and its tiles in train/"):
        write_trees(root, source)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".png", None, r"no .*OSBS_029\.png; want the data folder of deepforest"),
        (".xml", None, r"no .*OSBS_029\.xml; want the data folder of deepforest"),
        (".png", "x", r"cannot read image .*OSBS_029\.png: .*reinstall deepforest"),
        (".xml", "<annotation>", r"cannot read the boxes of .*OSBS_029\.xml: no element found"),
        (".xml", voc((4, 1, 4, 9)), r"cannot read the boxes of .*OSBS_029\.xml: a box from 4, 1 to 4, 9"),
        (".xml", voc((1, 1, "inf", 9)), r"cannot read the boxes of .*OSBS_029\.xml: a box from 1, 1 to inf, 9"),
        (".xml", voc((1, 1, "nan", 9)), r"cannot read the boxes of .*OSBS_029\.xml: a box from 1, 1 to nan, 9"),
    ],
)
def test_a_failure_leaves_nothing(tmp_path, source, suffix, content, message):
    file = source / f"OSBS_029{suffix}"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=message):
        write_trees(tmp_path / "new" / "trees", source)
    assert list((tmp_path / "new").iterdir()) == []


def run_tool(monkeypatch, root):
    monkeypatch.setattr(sys, "argv", [TOOL.name, str(root)])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_the_tool_says_what_it_wrote_or_what_to_install(tmp_path, source, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        run_tool(monkeypatch, tmp_path / "trees")
    assert exit_.value.code == 1
    assert "pip install --no-deps deepforest" in capsys.readouterr().err
    monkeypatch.setattr(trees, "_package_data", lambda: source)
    run_tool(monkeypatch, tmp_path / "trees")
    assert "val: 3 images, 1 classes, 2 boxes" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("deepforest") is None, reason="needs: pip install --no-deps deepforest")
def test_the_real_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda image, path: Path(path).touch())  # encoding takes seconds
    assert write_trees(tmp_path / "trees")
    assert "deepforest" not in sys.modules
    for split, tiles, boxes in (("train", 133, 2281), ("val", 12, 414)):
        data = CocoData(tmp_path / "trees" / f"{split}.json", tmp_path / "trees" / split)
        assert (len(data), data.boxes, data.dropped) == (tiles, boxes, 0)
        per_tile = np.unique([a["image_id"] for a in data.truth()["annotations"]], return_counts=True)[1]
        assert per_tile.max() <= 100  # the most that COCO's metric counts
