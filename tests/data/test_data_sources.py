"""Images from trees, lists and tar shards."""

import io
import tarfile

import numpy as np
import pytest
from image_tree import write_image_tree
from PIL import Image

from vim.data import DataError, ImageSource


@pytest.fixture
def tree(tmp_path):
    return write_image_tree(tmp_path / "images", {"val": 12}, classes=3) / "val"


def pixels(source, index):
    return np.asarray(source.load(index, 1))


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_a_tree_of_classes_in_natural_order(tree):
    source = ImageSource(tree)
    assert [entry.path for entry in source.entries][:5] == ["a/0.png", "a/3.png", "a/6.png", "a/9.png", "b/1.png"]
    assert [entry.label for entry in source.entries] == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(pixels(source, 4), np.asarray(Image.open(tree / "b" / "1.png")))
    assert source.load(0).mode == "RGB"


def test_a_tree_of_another_depth_has_no_labels(tree):
    (tree / "deep" / "er").mkdir(parents=True)
    (tree / "b" / "10.png").rename(tree / "deep" / "er" / "10.png")
    source = ImageSource(tree)
    assert len(source) == 12
    for other in (source, ImageSource(tree / "a")):
        assert ({entry.label for entry in other.entries}, other.classes) == ({None}, [])


def test_a_list_with_and_without_labels(tree):
    names = tree.parent / "some.txt"
    names.write_text("val/b/1.png\t7\n\nval/a/0.png\n")
    source = ImageSource(names)
    assert [(entry.path, entry.label) for entry in source.entries] == [("val/b/1.png", 7), ("val/a/0.png", None)]
    assert np.array_equal(pixels(source, 1), np.asarray(Image.open(tree / "a" / "0.png")))


def test_tar_shards_in_webdataset_form(tree, tmp_path):
    for shard in (1, 0):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for i in (2, 1):
                add(tar, f"set/{i}.png", (tree / "abc"[i] / f"{i + 3 * shard}.png").read_bytes())
                add(tar, f"set/{i}.json", b"{}")
                if shard:
                    add(tar, f"set/{i}.cls", str(i).encode())
    (tmp_path / "._shard-0.tar").write_bytes(b"a Mac's notes about it")
    source = ImageSource(tmp_path)
    names = ["shard-0.tar/set/2.png", "shard-0.tar/set/1.png", "shard-1.tar/set/2.png", "shard-1.tar/set/1.png"]
    assert [entry.path for entry in source.entries] == names
    assert [entry.label for entry in source.entries] == [None, None, 2, 1]
    assert np.array_equal(pixels(source, 2), np.asarray(Image.open(tree / "c" / "5.png")))
    assert len(ImageSource(tmp_path / "shard-1.tar")) == 2


def test_numbers_in_tar_shards_have_the_names_beside_them(tree, tmp_path, caplog):
    shards = tmp_path / "set" / "train"
    shards.mkdir(parents=True)
    for file in (shards / "0.tar", tmp_path / "alone.tar"):
        with tarfile.open(file, "w") as tar:
            add(tar, "x.png", (tree / "a" / "0.png").read_bytes())
            add(tar, "x.cls", b"1")
    (shards.parent / "classnames.txt").write_text("cat\ndog\n")
    assert ImageSource(shards).classes == ImageSource(shards / "0.tar").classes[:2] == ["cat", "dog"]
    assert ImageSource(tmp_path / "alone.tar").classes == ["0", "1"]
    (shards / "classnames.txt").write_text("cat\nbird\n")
    (shards / "more.png").write_bytes(b"")
    assert ImageSource(shards).classes == ["cat", "bird"]
    assert caplog.messages == [f"{shards}: files left out, hidden or no images: 1 (more.png)"]


def test_clear_errors(tree, tmp_path):
    with pytest.raises(DataError, match=r"no images at .*nowhere: it does not exist; give a folder"):
        ImageSource(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images in .*empty: want files as"):
        ImageSource(tmp_path / "empty")
    other = tmp_path / "images.zip"
    other.write_bytes(b"")
    with pytest.raises(DataError, match="neither a folder, a list"):
        ImageSource(other)
    names = tmp_path / "names.tsv"
    names.write_text("a.png\t0\nb.png\tcat\n")
    with pytest.raises(DataError, match=r"names.tsv, line 2: a label is a number from 0 up, got 'cat'"):
        ImageSource(names)
    (tmp_path / "bad.tar").write_bytes(b"garbage" * 100)
    with pytest.raises(DataError, match=r"cannot read .*bad.tar: .*; shards are plain tar files"):
        ImageSource(tmp_path / "bad.tar")
    with tarfile.open(tmp_path / "gone.tar", "w") as tar:
        add(tar, "x.png", b"x")
    gone = ImageSource(tmp_path / "gone.tar")
    (tmp_path / "gone.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read image gone.tar/x.png: .*No such file"):
        gone.load(0)
    (tree / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read image a/0.png: .*; repair or remove it"):
        ImageSource(tree).load(0)
    (tree / "a" / "0.png").unlink()
    names.write_text("images/val/a/0.png\n")
    with pytest.raises(DataError, match=r"cannot read image images/val/a/0.png: .*No such file"):
        ImageSource(names).load(0)
