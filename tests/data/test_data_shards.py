"""Images in tar and Parquet shards: the same as in folders, fetched when wanted, and clear when something is wrong."""

import json
import pickle
import re
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import fsspec
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_shards import add, local_hub, parquet_table, write_parquet
from image_tree import write_image_tree
from PIL import Image

from vim.data import (
    AugmentConfig,
    DataConfig,
    DataError,
    EvalImages,
    FetchAhead,
    ImageFolder,
    KeyedSampler,
    SampleKey,
    TrainImages,
    check_same_classes,
    derive_seed,
    eval_transform,
    open_images,
    parquet_shards,
    train_loader,
    train_transform,
)
from vim.data.errors import ShardError
from vim.data.tar_shards import TarImages

GREY = {"input_size": (1, 12, 12), "mean": (0.2,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}
AUGMENT = AugmentConfig(affine_degrees=20, auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5)
STILL = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
SHARDS = {"train-00000-of-00003.parquet": 8, "train-00001-of-00003.parquet": 6, "train-00002-of-00003.parquet": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ImageFolder(write_image_tree(tmp_path_factory.mktemp("tree"), {"train": 21}, classes=3), "train")


@pytest.fixture(scope="module")
def files(folder):
    return [(Path(path), label) for path, label in folder.samples]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of fetched shards."""
    monkeypatch.setattr(parquet_shards, "shard_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def parquet(files, folder, tmp_path, cache):
    write_parquet(files, folder.classes, tmp_path / "set" / "data", SHARDS)
    return tmp_path / "set"


def fetched(cache):
    return sorted(path.name.split("-of-")[0] for path in cache.glob("*.arrow"))


def write_tars(files, root, members):
    """Two shards; members(path, label, number) gives the (name, content) pairs of an image."""
    root.mkdir(parents=True)
    for shard, part in enumerate((files[:10], files[10:])):
        with tarfile.open(root / f"train-{shard:04}.tar", "w") as tar:
            for number, (path, label) in enumerate(part):
                for name, content in members(path, label, number):
                    add(tar, name, content)


def in_folders(path, label, number):
    return [(f"./{path.parent.name}/{path.name}", path.read_bytes())]


def with_numbers(path, label, number):
    return [
        (f"{number:06}.cls", str(label).encode()),
        (f"{number:06}.png", path.read_bytes()),
        (f"{number:06}.json", b"{}"),
    ]


def assert_same_images(source, folder, classes):
    assert (len(source), source.classes) == (len(folder), classes)
    got, want = (TrainImages(s, train_transform(AUGMENT, GREY), 0, in_chans=1) for s in (source, folder))
    for index in (0, 3, 9, 10, 13, 14, 20):
        key = SampleKey(1, index, 0)
        (image, label, _), (image_, label_, _) = got[key], want[key]
        assert torch.equal(image.pixels, image_.pixels)
        assert label == label_
    labels = [EvalImages(s, eval_transform(GREY), 1)[20][1] for s in (source, folder)]
    assert labels[0] == labels[1]


@pytest.mark.parametrize("place", ["train", ""])
def test_tar_files_of_class_folders(files, folder, tmp_path, place):
    write_tars(files, tmp_path / "tars" / place, in_folders)
    source = open_images(DataConfig(str(tmp_path / "tars")), "train")
    assert_same_images(source, folder, folder.classes)
    assert source.shards is None
    assert source.name(10) == "train-0001.tar/./b/10.png"
    (tmp_path / "tars" / "train" / ".cache").mkdir(parents=True)
    for name in ("train/._train-0000", "training-0", "pretrain"):  # of a Mac, and of other splits
        (tmp_path / "tars" / f"{name}.tar").write_bytes(b"")
    assert len(open_images(DataConfig(str(tmp_path / "tars")), "train")) == 21


@pytest.mark.parametrize("names", [None, ["cat", "sparrow hawk", "dog", "none has it"]])
def test_tar_files_in_webdataset_form(files, folder, tmp_path, names):
    write_tars(files, tmp_path / "tars", with_numbers)
    if names:
        (tmp_path / "tars" / "classnames.txt").write_text("\n".join(names) + "\n")
    source = open_images(DataConfig(str(tmp_path / "tars")), "train")
    assert_same_images(source, folder, names or ["0", "1", "2"])


def test_classes_of_folders_in_tar_files_stand_in_natural_order(files, tmp_path):
    write_tars(files, tmp_path / "tars", lambda path, label, number: [(f"{label + 8}/{number}.png", path.read_bytes())])
    assert open_images(DataConfig(str(tmp_path / "tars")), "train").classes == ["8", "9", "10"]


@pytest.mark.parametrize("place", ["", "train", "data"])
def test_parquet_files(files, folder, tmp_path, cache, place):
    write_parquet(files, folder.classes, tmp_path / "set" / place, SHARDS)
    source = open_images(DataConfig(str(tmp_path / "set")), "train")
    assert_same_images(source, folder, folder.classes)
    assert source.shards.lengths == [8, 6, 7]
    assert source.name(13) == "train-00001-of-00003.parquet/5"


def test_a_shard_is_fetched_when_its_first_image_is_wanted_and_then_kept(parquet, cache):
    source = open_images(DataConfig(str(parquet)), "train", window=2)
    assert fetched(cache) == []
    source.load(9)
    source.load(10)
    assert fetched(cache) == ["train-00001"]
    for file in (parquet / "data").iterdir():
        file.write_bytes(b"")  # whatever is read from now on was kept
    assert source.load(13, 1)[1] == 1
    with pytest.raises(ShardError, match=r"cannot fetch file://.*train-00000-of-00003.parquet into .*cache: "):
        source.load(0)


def test_a_changed_shard_is_fetched_anew(parquet, files, folder, cache):
    before = open_images(DataConfig(str(parquet)), "train").load(0, 1)[0]
    write_parquet(files[::-1], folder.classes, parquet / "data", SHARDS)
    after = open_images(DataConfig(str(parquet)), "train").load(0, 1)[0]
    assert not np.array_equal(before, after)
    assert np.array_equal(after, folder.load(20, 1)[0])


def test_a_shard_that_changes_while_it_is_in_use_is_told(parquet, files, folder, cache):
    source = open_images(DataConfig(str(parquet)), "train")
    write_parquet(files[:5], folder.classes, parquet / "data", {next(iter(SHARDS)): 5})
    with pytest.raises(ShardError, match=r"train-00000-of-00003.parquet has 5 rows now, and had 8; start again"):
        source.load(0)
    assert fetched(cache) == []


def test_what_was_fetched_of_other_columns_is_not_taken(tmp_path, cache, files, monkeypatch):
    """As another version of the project may choose them."""
    image, zero = pa.array([files[0][0].read_bytes()]), pa.array([0])
    pq.write_table(pa.table({"image": image, "label": zero, "labels": pa.array([1])}), tmp_path / "val.parquet")
    data = DataConfig(str(tmp_path))
    assert open_images(data, "val").load(0)[1] == 0
    monkeypatch.setattr(parquet_shards, "LABEL_NAMES", ("labels",))
    assert open_images(data, "val").load(0)[1] == 1


def test_each_shard_of_a_window_is_opened_once_and_closed_after_it(parquet, cache, monkeypatch):
    opened, open_shard = [], parquet_shards.ShardCache.open

    def noted(*args):
        opened.append(args[1].split("-of-")[0])
        return open_shard(*args)

    monkeypatch.setattr(parquet_shards.ShardCache, "open", noted)
    source = open_images(DataConfig(str(parquet)), "train", window=2)
    for index in (0, 9, 1, 10, 20, 11, 19):  # rows of the shards 0, 1, 0, 1, 2, 1, 2
        source.load(index)
    assert opened == ["train-00000", "train-00001", "train-00002"]
    mapped = re.findall(rf"{cache}/(.+)-of-", Path("/proc/self/maps").read_text())
    assert sorted(mapped) == ["train-00001", "train-00002"]


def test_a_shard_that_is_gone_is_no_bad_image(parquet):
    source = open_images(DataConfig(str(parquet)), "train")
    (parquet / "data" / "train-00000-of-00003.parquet").unlink()
    with pytest.raises(ShardError, match="cannot fetch"):
        TrainImages(source, train_transform(AUGMENT, GREY), 0, 1, bad_images="skip")[SampleKey(0, 0, 0)]
    with pytest.raises(ShardError, match="cannot fetch"):
        EvalImages(source, eval_transform(GREY), 1, bad_images="skip")[0]


def test_loading_processes_read_shards(parquet, folder):
    source = open_images(DataConfig(str(parquet)), "train", window=2)
    source.load(0)
    assert len(pickle.dumps(source)) < 3000  # what is mapped stays behind when a process is spawned
    assert pickle.loads(pickle.dumps(source)).load(9)[1] == 1
    images = TrainImages(source, train_transform(AUGMENT, GREY), 0, in_chans=1)
    loader = train_loader(images, KeyedSampler(21, 0, multiple_of=7), 7, num_workers=1)
    labels = torch.cat([labels for _, labels, _ in loader]).tolist()
    assert labels == [folder.samples[key.image][1] for key in loader.sampler]


def test_the_order_of_folders_and_tar_files_is_the_permutation_that_it_always_was():
    for epoch in (0, 5):
        sampler = KeyedSampler(50, seed=3, multiple_of=8)
        sampler.set_epoch(epoch)
        want = torch.randperm(50, generator=torch.Generator().manual_seed(derive_seed("order", 3, epoch)))
        assert [key.image for key in sampler] == want.tolist()[:48]


@pytest.mark.parametrize("window", [1, 3, 20])
def test_the_order_of_streamed_shards_has_few_of_them_open_at_a_time(window):
    shards = [5, 1, 17, 30, 4, 2, 25, 16]
    sampler = KeyedSampler(100, seed=0, shards=shards, window=window)
    first, second = [], []
    for epoch, order in enumerate((first, second)):
        sampler.set_epoch(epoch)
        order += [key.image for key in sampler]
        assert sorted(order) == list(range(100))
    shard_of = np.repeat(np.arange(8), shards)
    for order in (first, second):
        places = [np.flatnonzero(shard_of[order] == shard) for shard in range(8)]
        open_at = [sum(p[0] <= at <= p[-1] for p in places) for at in range(100)]
        assert max(open_at) <= window
        largest = order[places[3][0] : places[3][-1] + 1]
        assert largest != sorted(largest)
        changes = np.count_nonzero(np.diff(shard_of[order]))
        assert changes == 7 if window == 1 else changes > 30  # those of a window are mixed with each other
    turns = [list(dict.fromkeys(shard_of[order])) for order in (first, second)]
    assert turns[0] != turns[1]


def test_repeats_and_whole_updates_of_streamed_shards():
    keys = list(KeyedSampler(21, 0, repeats=3, multiple_of=6, shards=[8, 6, 7], window=2))
    assert len(keys) == len(set(keys)) == 18
    assert [key.repeat for key in keys] == [0, 1, 2] * 6
    assert len({key.image for key in keys}) == 6


@pytest.mark.parametrize(("window", "repeats", "start"), [(1, 1, 0), (3, 1, 40), (2, 3, 0), (20, 1, 8)])
def test_a_shard_is_asked_for_a_window_before_it_is_wanted(window, repeats, start):
    shards = [5, 1, 17, 30, 4, 2, 25, 16]
    asked, wanted = [], []
    sampler = KeyedSampler(100, 0, repeats, 4, shards, window, ahead=lambda shards: asked.append((len(wanted), shards)))
    shard_of = np.repeat(np.arange(8), shards)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        sampler.start_at(start if epoch == 0 else 0)
        for key in sampler:
            wanted.append(shard_of[key.image])
            assert wanted[-1] in asked[-1][1]
    for (_, shards), (at, following) in pairwise(asked):
        assert len(shards) <= 2 * window
        assert set(wanted[at:]) <= set(range(8))
        assert wanted[at] in shards[len(shards) // 2 :] or window >= 8  # when the next window began, it was asked for
        assert set(following) != set(shards) or window >= 8


def test_what_is_fetched_ahead_waits_for_nobody(parquet, cache):
    source = open_images(DataConfig(str(parquet)), "train", window=2)
    (parquet / "data" / "train-00001-of-00003.parquet").write_bytes(b"damaged")
    ahead = FetchAhead(source.shards.fetch)
    ahead([1, 2])
    ahead([0])
    deadline = time.monotonic() + 120
    while len(fetched(cache)) < 2 and ahead.process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fetched(cache) == ["train-00000", "train-00002"]  # and what is damaged is for those to tell who want it
    process = ahead.process
    del ahead
    process.join()


def test_the_hub(files, folder, tmp_path, cache, monkeypatch):
    """Its own client, and a server on this machine."""
    write_parquet(files, folder.classes, tmp_path / "hub" / "data", SHARDS)
    constants = huggingface_hub.constants
    with local_hub(tmp_path / "hub") as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
        source = open_images(DataConfig("hf://datasets/org/name"), "train")
        assert source.path == f"hf://datasets/org/name@{hub.commit}/data/train*.parquet"
        hub.asked.clear()
        hub.failures = 2
        assert_same_images(source, folder, folder.classes)
        resolve = f"/datasets/org/name/resolve/{hub.commit}/data/"
        assert sorted(set(hub.asked)) == [resolve + name for name in SHARDS]
        assert hub.failures == 0
        with pytest.raises(
            DataError, match=r"no Parquet shards of split 'val' in .*: want val-\*.parquet, found data;"
        ):
            open_images(DataConfig("hf://datasets/org/name"), "val")
        with pytest.raises(DataError, match=r"cannot open data.root hf://datasets/org/nobody: "):
            open_images(DataConfig("hf://datasets/org/nobody"), "train")
        hub.commit = "89ef" * 10  # in which these files are the same
        source = open_images(DataConfig("hf://datasets/org/name"), "train")
        hub.asked.clear()
        source.load(0)
        assert hub.asked == []
        hub.tags["v2"] = "4567" * 10
        write_parquet(files[:5], folder.classes, tmp_path / "hub" / "more", {"train.parquet": 5})
        tagged = open_images(DataConfig("hf://datasets/org/name@v2/more"), "train")
        assert (len(tagged), tagged.path) == (5, f"hf://datasets/org/name@{hub.tags['v2']}/more/train*.parquet")
        for file in cache.iterdir():
            file.unlink()
        source = open_images(DataConfig("hf://datasets/org/name"), "train")
    with pytest.raises(ShardError, match=r"cannot fetch hf://datasets/org/name@.*parquet into .*: .*refused"):
        source.load(0)


def test_another_file_system(files, folder, cache):
    fs = fsspec.filesystem("memory")
    for name, part in zip(("train", "more-train-of-it"), (files[:5], files[5:]), strict=True):
        with fs.open(f"/set/{name}.parquet", "wb") as file:
            pq.write_table(parquet_table([p.read_bytes() for p, _ in part], [n for _, n in part], "abc"), file)
    try:
        source = open_images(DataConfig("memory://set"), "train")
        assert source.shards.lengths == [16, 5]  # more-train-of-it, train
        assert source.load(16, 1)[0].tobytes() == folder.load(0, 1)[0].tobytes()
        with fs.open("/set/val-0.tar", "wb") as file:
            file.write(b"")
        with pytest.raises(DataError, match="tar shards must lie on a local disk"):
            open_images(DataConfig("memory://set"), "val")
    finally:
        fs.rm("/set", recursive=True)


def test_a_cache_that_is_too_small_says_what_it_needs(parquet, cache):
    want = (
        r"data.cache_gib 1e-09 does not hold the 2 shards of .* at a time; give at least .*e-06, or lower data.window"
    )
    with pytest.raises(DataError, match=want) as refused:
        open_images(DataConfig(str(parquet), cache_gib=1e-9), "train", window=2)
    sizes = []
    for path in (parquet / "data").iterdir():
        columns = [c for group in pq.read_metadata(path).to_dict()["row_groups"] for c in group["columns"]]
        sizes.append(sum(c["total_uncompressed_size"] for c in columns if c["path_in_schema"] != "image.path"))
    needed = float(re.search("at least (.*),", str(refused.value))[1])
    assert needed == pytest.approx(sum(sorted(sizes)[1:]) / 2**30, rel=5e-3)
    two = DataConfig(str(parquet), cache_gib=5e-6)  # 5,400 bytes; a shard has some 2,000
    source = open_images(two, "train", window=1)
    for index in (0, 9, 20, 0):
        source.load(index)
    assert fetched(cache) == ["train-00000", "train-00002"]


def test_a_split_must_be_there_once(parquet, files, folder, tmp_path):
    with pytest.raises(
        DataError, match=r"no split 'val' in .*set: want the folder .*; nor are there shards val-\*.tar"
    ):
        open_images(DataConfig(str(parquet)), "val")
    write_tars(files, parquet / "train", in_folders)
    with pytest.raises(
        DataError, match=r"split 'train' is there more than once: .*train/\*.tar and .*data/train\*.parq"
    ):
        open_images(DataConfig(str(parquet)), "train")
    root = folder.path.parent
    (root / "train-0.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"is there more than once: .*train/<class> and .*/train\*.tar; leave one"):
        open_images(DataConfig(str(root)), "train")
    (root / "train-0.tar").unlink()


def test_classes_must_stand_in_one_order(parquet, files, folder):
    write_parquet(files, folder.classes[::-1], parquet / "data", {"val.parquet": 21})
    data = DataConfig(str(parquet))
    with pytest.raises(
        DataError, match=r"label 0 is 'a' in .*train\*.parquet and 'c' in .*val\*.parquet; give both one"
    ):
        check_same_classes(open_images(data, "train"), open_images(data, "val"))


def tar_error(files, tmp_path, members, match):
    write_tars(files, tmp_path / "tars", members)
    with pytest.raises(DataError, match=match):
        open_images(DataConfig(str(tmp_path / "tars")), "train")


def test_tar_files_that_cannot_be_used(files, tmp_path):
    def some(path, label, number):
        return with_numbers(path, label, number)[number == 3 :]

    tar_error(files, tmp_path / "1", some, r"image train-0000.tar/000003.png has no .cls file beside it, others have")
    tar_error(
        files, tmp_path / "2", lambda path, label, n: [(path.name, b"x")], r"image .*0.png has no class: want a .cls"
    )
    tar_error(files, tmp_path / "3", lambda path, label, n: [("a/x.txt", b"x")], r"no images in .*/train\*.tar: want")
    for number, label in enumerate((b"-1", b"cat", b"9" * 5000, b"\xff"), 4):
        wrong = [("x.png", b"x"), ("x.cls", label)]
        tar_error(
            files, tmp_path / str(number), lambda *_, w=wrong: w, r"train-0000.tar/x.cls: a label is a number from 0"
        )
    large = [("x.png", b"x"), ("x.cls", b"99999999999")]
    tar_error(
        files, tmp_path / "8", lambda *_: large, r"has the label 99999999999; labels are numbers from 0 up, below"
    )
    (tmp_path / "8" / "tars" / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"x.png has the label 99999999999, .*classnames.txt has 2 names, from 0 up"):
        open_images(DataConfig(str(tmp_path / "8" / "tars")), "train")


def test_names_of_classes_are_lines_of_any_bytes(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "classnames.txt").write_bytes(b"caf\xe9\r\nno\xc2\x85line\r\n")
    write_tars([(Path("x"), 0)], tmp_path / "tars", lambda *_: [("x.png", b""), ("x.cls", b"1")])
    source = TarImages([tmp_path / "tars" / "train-0000.tar"], tmp_path / "set", "")
    assert source.classes == [r"caf\xe9", r"no\x85line"]
    (tmp_path / "set" / "classnames.txt").write_text("crane\ncrane\ncrane\n")
    thrice = TarImages([tmp_path / "tars" / "train-0000.tar"], tmp_path / "set", "thrice")
    (tmp_path / "set" / "classnames.txt").write_text("crane\ncrane\n")
    twice = TarImages([tmp_path / "tars" / "train-0000.tar"], tmp_path / "set", "twice")
    check_same_classes(twice, twice)
    with pytest.raises(DataError, match="the same classes; there are 3 in thrice and 2 in twice, some of one name"):
        check_same_classes(thrice, twice)


def test_a_tar_file_that_ends_early(files, tmp_path):
    write_tars(files, tmp_path / "tars", in_folders)
    tar = tmp_path / "tars" / "train-0001.tar"
    whole = tar.read_bytes()
    entry = TarImages([tar], tmp_path, "").entries[4]
    damaged = whole[: entry.offset - 500] + b"?" + whole[entry.offset - 499 :]  # in a header
    early = [whole[: entry.offset + end] for end in (20, -200, -512)]  # in an image, in a header, before one
    for content in (*early, damaged):
        tar.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot read .*train-0001.tar: .*; shards are plain tar files"):
            open_images(DataConfig(str(tmp_path / "tars")), "train")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_file_with_a_size_that_no_file_has(tmp_path, kind):
    member = tarfile.TarInfo("a/x.png")
    member.size, member.type = 2**70, kind
    (tmp_path / "train.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match=r"cannot read .*train.tar: .*; shards are plain tar files"):
        open_images(DataConfig(str(tmp_path)), "train")


def test_a_parquet_file_that_ends_early_or_is_damaged(parquet, cache):
    shard = parquet / "data" / "train-00001-of-00003.parquet"
    whole = shard.read_bytes()
    for content in (whole[:-20], b""):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot read file://.*train-00001-of-00003.parquet: "):
            open_images(DataConfig(str(parquet)), "train")
    shard.write_bytes(whole[:4] + b"\xff" * 400 + whole[404:])
    source = open_images(DataConfig(str(parquet)), "train")
    source.load(0)
    with pytest.raises(ShardError, match=r"cannot fetch file://.*train-00001-of-00003.parquet into .*: "):
        source.load(9)
    assert fetched(cache) == ["train-00000"]


@pytest.mark.parametrize("content", [b"", b"damaged" * 100, None])
def test_a_shard_that_is_damaged_in_the_cache_is_fetched_anew(parquet, cache, folder, content):
    want = open_images(DataConfig(str(parquet)), "train").load(9, 1)[0]
    (kept,) = cache.glob("*.arrow")
    kept.write_bytes(kept.read_bytes()[:-100] if content is None else content)
    assert np.array_equal(open_images(DataConfig(str(parquet)), "train").load(9, 1)[0], want)


def test_rows_that_cannot_be_used(tmp_path, cache, files):
    good = files[0][0].read_bytes()
    table = parquet_table([good, None, good, good, b"no image"], [0, 0, -1, None, 1], ["a", "b"])
    pq.write_table(table, tmp_path / "val.parquet")
    source = open_images(DataConfig(str(tmp_path)), "val")
    source.load(0)
    for row, match in (
        (1, "row val.parquet/1 has no image bytes; remove it"),
        (2, "row val.parquet/2 has the label -1, want 0 to 1"),
        (3, "row val.parquet/3 has the label None, want 0 to 1"),
        (4, "cannot read image val.parquet/4: "),
    ):
        with pytest.raises(DataError, match=match):
            source.load(row)
        assert EvalImages(source, eval_transform(GREY), 1, "skip")[row][2] == [f"val.parquet/{row}"]


def test_columns(tmp_path, cache, files):
    table = parquet_table([files[0][0].read_bytes()] * 3, [2, 0, 1], "abc")
    image, label = table["image"], table["label"]

    def opened(**columns):
        features = {name: {"names": list("xyz")} for name in columns if name.endswith("label")}
        described = pa.table(columns).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        pq.write_table(described, tmp_path / "val.parquet")
        source = open_images(DataConfig(str(tmp_path)), "val")
        return source.columns.image, source.columns.label, source.classes, source.load(0)[1]  # type: ignore[attr-defined]

    zero, about = pa.array([0, 0, 0]), pa.array([{"width": 12}] * 3)
    assert opened(about=about, photo=image, number=label)[:2] == ("photo", "number")
    assert opened(img=image, number=label) == ("img", "number", ["0", "1", "2"], 2)
    assert opened(img=image, fine_label=label, coarse_label=zero) == ("img", "fine_label", ["x", "y", "z"], 2)
    assert opened(img=image, a_label=label, label_id=zero)[1:3] == ("a_label", ["x", "y", "z"])
    assert opened(image=image, image_id=zero, label=label)[1] == "label"
    columns = re.escape("Its columns: photo (struct<bytes: binary, path: string>), a (int64), b (int64)")
    with pytest.raises(DataError, match=rf"several columns of labels \(whole numbers\): a, b; want one, .*{columns}"):
        opened(photo=image, a=label, b=zero)
    with pytest.raises(
        DataError, match=r"no column of images \(a structure with bytes, or bytes\); want one, or one called image"
    ):
        opened(number=label)
    unnamed = pa.table({"image": image, "label": label})
    pq.write_table(unnamed, tmp_path / "val.parquet", write_statistics=False)
    with pytest.raises(DataError, match="column 'label' has neither names of classes nor a highest value"):
        open_images(DataConfig(str(tmp_path)), "val")
    pq.write_table(table.replace_schema_metadata({"huggingface": "{"}), tmp_path / "val.parquet")
    with pytest.raises(DataError, match="its description by Hugging Face cannot be read"):
        open_images(DataConfig(str(tmp_path)), "val")


def test_numbers_of_classes_are_counted_over_all_row_groups_and_shards(tmp_path, cache, files):
    """The highest label is in the first row group of the second of three shards, of which the last is empty."""
    content = files[0][0].read_bytes()
    for shard, labels in enumerate(([0, 1, 1, 0, 2], [5, 0, 0, 1], [2], [])):
        table = pa.table(
            {"image": pa.array([content] * len(labels), pa.binary()), "label": pa.array(labels, pa.int64())}
        )
        pq.write_table(table, tmp_path / f"val-{shard}.parquet", row_group_size=2)
    source = open_images(DataConfig(str(tmp_path)), "val")
    assert source.classes == ["0", "1", "2", "3", "4", "5"]
    assert source.shards.lengths == [5, 4, 1]
    assert [source.load(index)[1] for index in range(10)] == [0, 1, 1, 0, 2, 5, 0, 0, 1, 2]
    assert [source.name(index) for index in (4, 5, 8, 9)] == [
        "val-0.parquet/4", "val-1.parquet/0", "val-1.parquet/3", "val-2.parquet/0",
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_unequal_sizes_give_each_image_once(tmp_path, cache, files, folder, workers):
    """A large one among some of one image."""
    sizes = dict(zip(("train-0", "train-1", "train-2"), (1, 19, 1), strict=True))
    write_parquet(files, folder.classes, tmp_path, {f"{name}.parquet": size for name, size in sizes.items()})
    source = open_images(DataConfig(str(tmp_path)), "train", window=2)
    images = TrainImages(source, train_transform(AugmentConfig(**STILL), GREY), 0, in_chans=1)
    loader = train_loader(images, KeyedSampler(21, 0, shards=source.shards.lengths, window=2), 4, workers)
    seen = [
        (image.tobytes(), label)
        for packed, labels, _ in loader
        for image, label in zip(packed.pixels.squeeze(-1).numpy(), labels.tolist(), strict=True)
    ]
    want = [(folder.load(index, 1)[0].tobytes(), folder.samples[index][1]) for index in range(21)]
    assert sorted(seen) == sorted(want)


@pytest.mark.parametrize("numbered", [False, True])
def test_tar_files_of_unequal_sizes_and_classes(tmp_path, files, numbered):
    """Classes that only one shard has, one of them the last in the first shard; and images of many sizes."""
    shards = (["c", "b"], ["a"], ["b", "a", "b", "a"])
    want = []
    for number, names in enumerate(shards):
        with tarfile.open(tmp_path / f"val-{number}.tar", "w") as tar:
            for index, name in enumerate(names):
                path = files[len(want)][0]
                add(tar, f"{index}.png" if numbered else f"{name}/{index}.png", path.read_bytes())
                if numbered:
                    add(tar, f"{index}.cls", str("abc".index(name)).encode())
                want.append(("abc".index(name), path))
    source = open_images(DataConfig(str(tmp_path)), "val")
    assert source.classes == (["0", "1", "2"] if numbered else ["a", "b", "c"])
    for index, (label, path) in enumerate(want):
        image, got = source.load(index, 1)
        assert (got, image.tobytes()) == (label, Image.open(path).tobytes())


def test_shards_must_be_of_one_kind(parquet, files):
    write_parquet(files, ["a", "b", "x"], parquet / "data", {"train-00003-of-00003.parquet": 21})
    with pytest.raises(
        DataError, match=r"train-00000-of-00003.parquet and .*train-00003-of-.* differ in columns or cl"
    ):
        open_images(DataConfig(str(parquet)), "train")


def test_without_pyarrow_it_says_what_to_install(parquet, monkeypatch):
    monkeypatch.setitem(sys.modules, "vim.data.parquet_shards", None)
    with pytest.raises(DataError, match=r"Parquet shards need pyarrow: pip install 'vim-mamba\[features\]'"):
        open_images(DataConfig(str(parquet)), "train")


def one_tar(tmp_path, *members):
    tmp_path.mkdir()
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return open_images(DataConfig(str(tmp_path)), "train")


def test_a_key_in_a_tar_file_ends_at_the_first_dot_of_the_name(tmp_path):
    source = one_tar(
        tmp_path / "1",
        ("v1.0/x.input.jpg", b""),
        ("v1.0/x.cls", b"2"),
        ("y.CLS", b"0"),
        ("./y.png", b""),
        ("y.a.json", b""),
    )
    assert (source.classes, source.labels.tolist()) == (["0", "1", "2"], [2, 0])
    folders = one_tar(tmp_path / "2", ("cat/cat.1.jpg", b""), ("cat/cat.2.jpg", b""), ("dog/dog.1.jpg", b""))
    assert (folders.classes, folders.labels.tolist()) == (["cat", "dog"], [0, 0, 1])


def test_classes_in_tar_files_are_the_nearest_folders_and_nothing_hidden(tmp_path):
    names = "set/1/x.png", "set/0/y.png", "set/.cache/z.png", ".cache/0/z.png", "set/0/._y.png"
    source = one_tar(tmp_path / "set", *((name, b"") for name in names))
    assert (source.classes, source.labels.tolist()) == (["0", "1"], [1, 0])


def test_compressed_tar_files_are_refused(tmp_path, files):
    """Nothing in them lies where its header says."""
    for mode in ("w:gz", "w:bz2", "w:xz"):
        with tarfile.open(tmp_path / "train.tar", mode) as tar:
            add(tar, "a/x.png", files[0][0].read_bytes())
        with pytest.raises(DataError, match=r"cannot read .*train.tar: .*; shards are plain tar files, not compressed"):
            open_images(DataConfig(str(tmp_path)), "train")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["dir/x.jpg", "x.json"], r"train.tar/x.json is for no image, only for dir/x.jpg: want one of the same path"),
        (["dir/x.jpg", "x.cls"], r"train.tar/x.cls is for no image, only for dir/x.jpg: "),
        (["images/x.jpg", "labels/x.txt"], r"train.tar/labels/x.txt is for no image, only for images/x.jpg"),
        (["a/x.jpg", "b/y.cls"], r"train.tar/b/y.cls is for no image: want one of the same path up to the first dot"),
        (["x.1.jpg", "x.2.jpg", "x.1.cls"], r"train.tar/x.1.cls is for 2 images, x.1.jpg and x.2.jpg: what follows"),
        (["x.jpg", "x.cls", "x.b.cls"], r"train.tar/x.b.cls is a second label of x.jpg; want one"),
        (["a/x.jpg", "a/x.cls", "a/y.jpg"], r"image train.tar/a/y.jpg has no .cls file beside it, others have"),
    ],
)
def test_labels_in_tar_files_that_do_not_match_are_refused(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        one_tar(tmp_path / "set", *((name, b"1") for name in members))


def test_columns_as_older_versions_of_datasets_wrote_them(tmp_path, cache, files):
    content = files[0][0].read_bytes()

    def opened(features, **columns):
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tmp_path / "val.parquet")
        return open_images(DataConfig(str(tmp_path)), "val")

    label, names = pa.array([1]), {"names": ["a", "b\n"], "_type": "ClassLabel"}
    lists = [{"bbox": {"dtype": "float32", "_type": "Value"}}]
    described, boxes = {"label": names, "objects": lists}, pa.array([[1.0]])
    source = opened(described, image=pa.array([content]), label=label, objects=boxes)
    assert source.classes == ["a", r"b\n"]
    assert source.load(0, 1)[1] == 1
    large = pa.array([content], pa.large_binary())
    for images in (large, pa.StructArray.from_arrays([large], ["bytes"])):
        assert opened(described, image=images, label=label, objects=boxes).load(0, 1)[0].size == (12, 12)
    with pytest.raises(DataError, match=r"no column of images \(.*\); .* image \(string\), label \(int64\)"):
        opened({}, image=pa.array(["x.png"]), label=label)
    with pytest.raises(DataError, match=r"no column of labels \(whole numbers\); .*label \(list<.*int64>\)"):
        opened({}, image=pa.array([content]), label=pa.array([[1]]))
    with pytest.raises(DataError, match=r"its description by Hugging Face cannot be read .*names are 'ab'"):
        opened({"label": {"names": "ab"}}, image=pa.array([content]), label=label)


def test_parquet_files_with_damaged_names_of_columns_are_refused(tmp_path, cache, files):
    table = parquet_table([files[0][0].read_bytes()] * 2, [0, 1], "ab")
    pq.write_table(table, tmp_path / "val.parquet")
    whole = (tmp_path / "val.parquet").read_bytes()
    places = [match.start() for match in re.finditer(b"label|bytes", whole)]
    for place in places:
        (tmp_path / "val.parquet").write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        try:
            source = open_images(DataConfig(str(tmp_path)), "val")
            source.load(1)
        except DataError as error:
            assert "val.parquet" in str(error)  # noqa: PT017 (a copy of a name that is not read does no harm)
