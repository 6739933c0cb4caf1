"""Image folder trees: labels, channels, and a clear message for each way that a tree can be wrong."""

import re

import pytest
from image_tree import write_image_tree
from PIL import Image

from vim.data import DataError, ImageFolder, ImageSource, check_same_classes


@pytest.fixture
def tree(tmp_path):
    return write_image_tree(tmp_path / "images", {"train": 6, "val": 4})


def test_labels_are_positions_in_the_natural_order_of_names(tmp_path):
    for name in ("10", "9", "1"):
        path = tmp_path / "train" / name / "x.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (2, 2), int(name)).save(path)
    folder = ImageFolder(tmp_path, "train")
    assert folder.classes == ["1", "9", "10"]
    for index in range(3):
        image, label = folder.load(index, in_chans=1)
        assert image.getpixel((0, 0)) == int(folder.classes[label])


@pytest.mark.parametrize(("in_chans", "mode"), [(1, "L"), (3, "RGB")])
def test_images_get_the_models_channels(tree, in_chans, mode):
    assert ImageFolder(tree, "train").load(0, in_chans)[0].mode == mode


def test_hidden_folders_are_no_classes_and_the_first_process_tells_of_them(tree, monkeypatch, caplog):
    (tree / "train" / ".checkpoints").mkdir()
    Image.new("L", (2, 2)).save(tree / "train" / ".checkpoints" / "x.png")
    for rank, told in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        folder = ImageFolder(tree, "train")
        assert (len(folder), folder.classes) == (6, ["a", "b"])
        assert len(caplog.messages) == told


def test_links_to_folders_and_images_are_followed(tree, tmp_path):
    Image.new("L", (2, 2), 7).save(tmp_path / "7.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").symlink_to(tmp_path / "7.png")
    (tree / "train" / "c").symlink_to(tmp_path / "elsewhere")
    folder = ImageFolder(tree, "train")
    assert (len(folder), folder.classes) == (7, ["a", "b", "c"])
    image, label = folder.load(6, 1)
    assert (image.getpixel((0, 0)), label) == (7, 2)


def test_a_tilde_is_the_home_folder(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    assert ImageFolder("~/images", "val").path == tree / "val"
    assert len(ImageSource("~/images/val")) == 4


def test_missing_root(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"no data set folder {tmp_path / 'nowhere'}; set data.root")):
        ImageFolder(tmp_path / "nowhere", "train")


def test_missing_split_says_what_is_there(tree):
    want = re.escape(f"no split 'test' in {tree}: want the folder {tree / 'test'}, found train, val")
    with pytest.raises(DataError, match=want):
        ImageFolder(tree, "test")


def test_no_image_at_all(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=re.escape(f"no images in {tmp_path / 'train'}")):
        ImageFolder(tmp_path, "train")


def test_class_with_no_image(tree):
    (tree / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=re.escape(f"no image in class folder {tree / 'train' / 'empty'};")):
        ImageFolder(tree, "train")


@pytest.mark.parametrize("place", ["stray.png", "a/deeper/stray.png"])
def test_image_outside_a_class_folder(tree, place):
    path = tree / "train" / place
    path.parent.mkdir(exist_ok=True)
    Image.new("L", (2, 2)).save(path)
    with pytest.raises(DataError, match=re.escape(f"image {path} is not directly in a class folder")):
        ImageFolder(tree, "train")


def test_splits_with_different_classes(tree):
    (tree / "val" / "b").rename(tree / "val" / "c")
    with pytest.raises(DataError, match=f"class 'b' is in {tree / 'train'} but not in {tree / 'val'}"):
        check_same_classes(ImageFolder(tree, "train"), ImageFolder(tree, "val"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_unreadable_image(tree, damage):
    folder = ImageFolder(tree, "train")
    path = tree / "train" / "a" / "0.png"
    content = {"truncated": path.read_bytes()[:70], "empty": b"", "text": b"no image"}[damage]
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"cannot read image {path}: ")):
        folder.load(0)
