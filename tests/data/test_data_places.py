"""--images and data.root take the same places: lists as splits, Parquet shards as images."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_shards import local_hub, parquet_table, write_parquet
from image_tree import samples, write_image_tree
from PIL import Image

from vim.data import DataConfig, DataError, EvalImages, image_names, open_images, open_split, parquet_shards
from vim.data.sources import load_labelled
from vim.training.classification_data import ClassificationData

SIZES = {"train-0.parquet": 5, "train-1.parquet": 3, "train-2.parquet": 4}


@pytest.fixture
def tree(tmp_path):
    """Twelve images of the classes a, b, c."""
    return write_image_tree(tmp_path / "images", {"val": 12}, classes=3) / "val"


@pytest.fixture
def files(tree):
    return [(tree / label / f"{index}.png", "abc".index(label)) for index, label in enumerate("abcabcabcabc")]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_shards, "shard_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def pixels(source):
    return [source.load(index, 1).tobytes() for index in range(len(source))]


def write_list(file, files, separator="\t"):
    """Paths relative to the list."""
    file.write_text("".join(f"{path.relative_to(file.parent)}{separator}{label}\n" for path, label in files))


@pytest.mark.parametrize("suffix", [".txt", ".tsv"])
def test_a_list_is_a_split(tree, files, suffix):
    write_list(tree.parent / f"train{suffix}", files[::-1])
    source = open_split(tree.parent, "train")
    assert (source.path, source.shards) == (tree.parent / f"train{suffix}", None)
    assert samples(source) == [(f"val/{path.parent.name}/{path.name}", label) for path, label in files[::-1]]
    assert source.classes == ["0", "1", "2"]
    assert pixels(source) == pixels(open_images(tree.parent / f"train{suffix}"))
    assert load_labelled(source, 0, 1)[0].tobytes() == load_labelled(open_split(tree.parent, "val"), 11, 1)[0].tobytes()
    (tree.parent / "classnames.txt").write_text("a\nb\nc\nnever seen\n")
    named = open_split(tree.parent, "train")
    assert named.classes == open_images(tree.parent / f"train{suffix}").classes == ["a", "b", "c", "never seen"]


def test_a_run_on_lists_is_bound_to_their_paths(tree, files):
    root = tree.parent
    (root / "classnames.txt").write_text("a\nb\nc\n")
    write_list(root / "train.txt", files[:8])
    write_list(root / "test.txt", files[8:])
    record = ClassificationData(DataConfig(str(root), val_split="test")).record()
    assert record["classes"] == ["a", "b", "c"]
    before = {split: record["splits"][split]["hash"] for split in ("train", "test")}
    moved = root.rename(root.parent / "elsewhere")
    again = ClassificationData(DataConfig(str(moved), val_split="test")).record()
    assert {split: again["splits"][split]["hash"] for split in before} == before
    write_list(moved / "train.txt", [(moved / path.relative_to(root), label) for path, label in files[1:9]])
    assert ClassificationData(DataConfig(str(moved), val_split="test")).record()["splits"]["train"]["hash"] not in (
        before.values()
    )


def test_a_list_counts_only_without_a_tree_or_shards(tree, files, caplog):
    """ImageNet's val.txt, for example, comes with the tree and has spaces instead of tabs."""
    write_list(tree.parent / "val.txt", files, separator=" ")
    assert open_split(tree.parent, "val").path == tree
    flat = tree.parent / "flat"
    flat.mkdir()
    for path, _ in files:
        (flat / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"image .*flat/0.png is not directly in a class folder"):
        open_split(tree.parent, "flat")
    write_list(tree.parent / "flat.txt", [(flat / path.name, label) for path, label in files])
    assert samples(open_split(tree.parent, "flat"))[1] == ("flat/1.png", 1)


def test_lists_that_are_no_split(tree, files):
    root = tree.parent
    with pytest.raises(DataError, match=r"no split 'train' in .*; nor are there shards .*, or a list train.txt or tra"):
        open_split(root, "train")
    write_list(root / "train.txt", files, separator=" ")
    with pytest.raises(DataError, match=r"train.txt, line 1: no label after 'val/a/0.png 0'; want a path, a tab and"):
        open_split(root, "train")
    write_list(root / "train.txt", files)
    write_list(root / "train.tsv", files)
    with pytest.raises(DataError, match=r"'train' is there more than once: .*train.txt and .*train.tsv; leave one"):
        open_split(root, "train")
    (root / "train.tsv").unlink()
    (root / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"image val/c/.*.png has the label 2, .*classnames.txt has 2 names"):
        open_split(root, "train")


@pytest.mark.parametrize("place", ["", "/train-*.parquet"])
def test_parquet_shards_are_images(tmp_path, files, cache, place):
    write_parquet(files, list("abc"), tmp_path / "a set", SIZES)
    write_parquet(files[:2], list("abc"), tmp_path / "a set" / "deeper", {"other.parquet": 2})
    source = open_images(f"{tmp_path}/a set{place}")
    names = [f"{name}/{row}" for name, size in SIZES.items() for row in range(size)]
    assert samples(source) == [(name, label) for name, (_, label) in zip(names, files, strict=True)]
    assert source.classes == ["a", "b", "c"]
    assert not cache.exists()  # no image was read for the labels
    assert pixels(source) == pixels(open_split(tmp_path / "a set", "train"))
    assert samples(source) == samples(open_split(tmp_path / "a set", "train"))  # from open shards, too
    one = open_images(tmp_path / "a set" / "train-1.parquet")
    assert (image_names(one), pixels(one)) == (names[5:8], pixels(source)[5:8])


def test_each_shard_is_opened_once_in_order(tmp_path, files, cache, monkeypatch):
    write_parquet(files, list("abc"), tmp_path / "set", SIZES)
    opened, open_shard = [], parquet_shards.ShardCache.open
    monkeypatch.setattr(
        parquet_shards.ShardCache, "open", lambda *args: opened.append(args[1][:7]) or open_shard(*args)
    )
    source = open_images(tmp_path / "set")
    pixels(source)
    samples(source)
    assert opened == ["train-0", "train-1", "train-2"]


def test_labels_in_parquet_files_are_optional(tmp_path, files, cache):
    contents = [path.read_bytes() for path, _ in files[:3]]
    images = pa.array(contents, pa.binary())

    def opened(table):
        pq.write_table(table, tmp_path / "some.parquet", row_group_size=2)
        source = open_images(tmp_path / "some.parquet")
        assert pixels(source) == pixels_of_files
        return source.classes, [label for _, label in samples(source)]

    pixels_of_files = [Image.open(path).tobytes() for path, _ in files[:3]]
    assert opened(pa.table({"image": images})) == ([], [None] * 3)
    assert opened(pa.table({"image": images, "id": pa.array([10**9, 7, 8])})) == ([], [None] * 3)
    assert opened(pa.table({"image": images, "labels": pa.array([2, 0, 1])})) == (["0", "1", "2"], [2, 0, 1])
    assert opened(parquet_table(contents, [-1, 1, None], "ab")) == (["a", "b"], [None, 1, None])
    pq.write_table(parquet_table(contents, [-1, 1, 2], "ab"), tmp_path / "val.parquet")
    with pytest.raises(DataError, match=r"row val.parquet/2 has the label 2, want 0 to 1; remove it"):
        samples(open_images(tmp_path / "val.parquet"))
    split = open_split(tmp_path, "val")
    for _ in ("closed", "open"):
        with pytest.raises(DataError, match=r"row val.parquet/0 has the label -1, want 0 to 1; remove it"):
            split.label(0)
        split.load(0)
    assert EvalImages(split, np.asarray, bad_images="skip")[0][2] == ["val.parquet/0"]


def test_a_tree_with_parquet_files_beside_its_images_stays_a_tree(tree, tmp_path, files, cache, caplog):
    write_parquet(files, list("abc"), tree, {"labels.parquet": 12})
    assert len(open_images(tree)) == 12
    assert open_images(tree).name(0) == "a/0.png"
    assert caplog.messages == [f"{tree}: files left out, hidden or not images: 1 (labels.parquet)"]
    with pytest.raises(DataError, match=r"no images at .*train-\*.parquet: it does not exist; give a folder, a list"):
        open_images(tree / "train-*.parquet")
    (tmp_path / "mixed").mkdir()
    for name in ("x.tar", "x.parquet"):
        (tmp_path / "mixed" / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"mixed/x\* is neither a folder, a list .* nor a .tar or .parquet file"):
        open_images(tmp_path / "mixed" / "x*")


def test_images_on_the_hub(tmp_path, files, cache, monkeypatch):
    rng, noise = np.random.default_rng(0), tmp_path / "noise.bin"
    noise.write_bytes(rng.bytes(2 << 20))  # no image, but as large as one
    rows = [(path, label) for path, label in files[:5]] + [(noise, 1)]
    write_parquet(rows, list("abc"), tmp_path / "hub" / "data", {"train-0.parquet": 1, "train-1.parquet": 5})
    write_parquet(files[:2], list("abc"), tmp_path / "hub" / "data", {"test-0.parquet": 2})
    with local_hub(tmp_path / "hub", monkeypatch) as hub:
        source = open_images("hf://datasets/org/name/data/train-*.parquet")
        assert source.path == f"hf://datasets/org/name@{hub.commit}/data/train-*.parquet"
        hub.sent = 0
        names = ["train-0.parquet/0", *(f"train-1.parquet/{row}" for row in range(5))]
        assert samples(source) == list(zip(names, [0, 1, 2, 0, 1, 1], strict=True))
        assert hub.sent < 1 << 20  # labels alone
        assert source.load(1, 1).tobytes() == open_images(files[1][0].parent).load(0, 1).tobytes()
        assert len(open_images("hf://datasets/org/name/data")) == 8
        assert len(open_images("hf://datasets/org/name/data/test-0.parquet")) == 2
        with pytest.raises(DataError, match=r"no Parquet shards at hf://.*: want a .parquet file, .*, found data"):
            open_images("hf://datasets/org/name")
        with pytest.raises(DataError, match=r"cannot open images hf://datasets/org/nobody: "):
            open_images("hf://datasets/org/nobody")
