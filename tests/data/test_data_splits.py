"""Image folder trees dealt out to parts, and the tree of the solar cells."""

import os
import random
import shutil

import numpy as np
import pytest
from PIL import Image

from vim.data import DataError, ImageFolder
from vim.data.elpv import write_elpv
from vim.data.splits import split_folder


@pytest.fixture
def tree(tmp_path):
    for label, count in (("a", 10), ("b", 25)):
        folder = tmp_path / "data" / "all" / label
        folder.mkdir(parents=True)
        for index in range(count):
            Image.new("L", (2, 2), index).save(folder / f"{index}.png")
    return tmp_path / "data"


def names(root, split):
    return {"/".join(path.split("/")[-2:]) for path, _ in ImageFolder(root, split).samples}


def test_each_image_is_in_one_part_and_each_class_in_its_share(tree):
    counts = split_folder(tree, "all", {"train": 0.6, "val": 0.2, "test": 0.2})
    assert counts == {"train": 6 + 15, "val": 2 + 5, "test": 2 + 5}
    parts = [names(tree, part) for part in counts]
    assert sum(map(len, parts)) == 35
    assert set.union(*parts) == names(tree, "all")
    assert sum(name.startswith("a/") for name in parts[0]) == 6


def test_shares_that_do_not_divide_a_class_lose_no_image(tree):
    assert split_folder(tree, "all", dict.fromkeys("xyz", 1 / 3)) == {"x": 3 + 8, "y": 4 + 9, "z": 3 + 8}


@pytest.mark.parametrize("seed", [0, 3])
def test_the_seed_the_class_and_the_names_decide_and_nothing_else(tree, seed):
    """Written down: another choice would silently change every result on images that were held out."""
    split_folder(tree, "all", {"train": 0.4, "val": 0.6}, seed)
    want = set()
    for label, count, share in (("a", 10, 4), ("b", 25, 10)):
        files = sorted(f"{label}/{index}.png" for index in range(count))
        random.Random(f"{seed} {label}".encode()).shuffle(files)
        want |= set(files[:share])
    assert names(tree, "train") == want


@pytest.mark.parametrize("links", [True, False])
def test_parts_are_for_everybody_and_outlive_the_split(tree, monkeypatch, links):
    """Hard links, or copies on a file system without them."""

    def refuse(*_):
        raise PermissionError("no links here")

    def synchronise(descriptor):
        folder = os.readlink(f"/proc/self/fd/{descriptor}")
        synchronised.append((folder, sorted(path.name for path in tree.iterdir() if path.name[0] != ".")))

    synchronised = []
    monkeypatch.setattr(os, "fsync", synchronise)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    split_folder(tree, "all", {"train": 0.4, "val": 0.6})
    assert synchronised == [(str(tree), ["all", "train"]), (str(tree), ["all", "train", "val"])]
    before = names(tree, "all")
    shutil.rmtree(tree / "all")
    assert names(tree, "train") | names(tree, "val") == before
    for part in ("train", "val"):
        assert (tree / part).stat().st_mode & 0o777 == 0o755
        folder = ImageFolder(tree, part)
        for index, (path, _) in enumerate(folder.samples):
            assert f"/{folder.load(index, 1)[0].getpixel((0, 0))}.png" in path


@pytest.mark.parametrize("shares", [(0.6, 0.2), (0.8, 0.4), (1.2, -0.2), (1.0, 0.0)])
def test_shares_are_parts_of_a_whole(tree, shares):
    with pytest.raises(DataError, match="shares must be above 0 and add up to 1"):
        split_folder(tree, "all", dict(zip(("train", "val"), shares, strict=True)))


def test_what_a_split_refuses(tree):
    with pytest.raises(DataError, match=r"class 'a' has 10 images, too few for a share of 0.01 in 'val'"):
        split_folder(tree, "all", {"train": 0.99, "val": 0.01})
    with pytest.raises(DataError, match="all exists"):
        split_folder(tree, "all", {"train": 0.5, "all": 0.5})
    assert [path.name for path in tree.iterdir()] == ["all"]


def test_solar_cells(tmp_path):
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    for index in range(4):
        Image.new("L", (300, 300), 60 * index).save(source / "images" / f"cell{index}.png")
    stripes = np.tile(np.array([0, 255], np.uint8), (300, 150))
    Image.fromarray(stripes).save(source / "images" / "cell0.png")
    probabilities = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")
    lines = [f"images/cell{i}.png  {p}   mono" for i, p in enumerate(probabilities)]
    (source / "labels.csv").write_text("\n".join(lines))
    write_elpv(tmp_path / "elpv", 64, source)
    folder = ImageFolder(tmp_path / "elpv", "all")
    assert folder.classes == ["defective", "functional"]
    assert [(path[-9:], label) for path, label in folder.samples] == [
        ("cell2.png", 0), ("cell3.png", 0), ("cell0.png", 1), ("cell1.png", 1),
    ]  # fmt: skip
    image, _ = folder.load(1, 1)
    assert np.array_equal(np.asarray(image), np.full((64, 64), 180))
    between = np.asarray(folder.load(2, 1)[0])[:, 3:-3]
    assert np.abs(between.astype(int) - 127).max() < 20  # finer than a pixel of the small image
    with pytest.raises(DataError, match="elpv exists"):
        write_elpv(tmp_path / "elpv", 64, source)
    with pytest.raises(DataError, match=r"size must be 1 .. 300 pixels, got 301"):
        write_elpv(tmp_path / "other", 301, source)
