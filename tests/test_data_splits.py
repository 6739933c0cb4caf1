"""Image folder trees dealt out to parts, and the tree of the solar cells."""

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
            Image.new("L", (2, 2), index).save(folder / f"{index:02}.png")
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


def test_the_seed_decides(tree):
    for part, seed in (("one", 0), ("two", 0), ("three", 1)):
        split_folder(tree, "all", {part: 0.5, f"rest-{part}": 0.5}, seed)
    assert names(tree, "one") == names(tree, "two") != names(tree, "three")


def test_what_a_split_refuses(tree):
    with pytest.raises(DataError, match="shares must be above 0 and add up to 1"):
        split_folder(tree, "all", {"train": 0.6, "val": 0.2})
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
    with pytest.raises(DataError, match="elpv exists"):
        write_elpv(tmp_path / "elpv", 64, source)
    with pytest.raises(DataError, match=r"size must be 1 .. 300 pixels, got 301"):
        write_elpv(tmp_path / "other", 301, source)
