"""The order of classes and files, and how names are written: the same in every reader and every process."""

import io
import json
import os
import subprocess
import sys
import tarfile

import pytest
from image_shards import add
from PIL import Image
from processes import outputs
from timm.data.readers.reader_image_folder import find_images_and_targets

from vim.data import DataError, EvalImages, ImageFolder, ImageSource, check_same_classes
from vim.data.names import natural_order, plain_name, read_lines
from vim.data.splits import split_folder
from vim.data.tar_shards import TarImages

TIED = ["B", "01", "a", "10", "A", "²", "1", "2", "m²", "b"]
IN_ORDER = ["01", "1", "2", "10", "A", "a", "B", "b", "m²", "²"]


def png(value=0):
    file = io.BytesIO()
    Image.new("L", (2, 2), value).save(file, "PNG")
    return file.getvalue()


def write_classes(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        for file in ("X.png", "x.png"):
            (root / name / file).write_bytes(png())
    return root


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add(tar, name, content)
    return path


ORDERS = """
import json, sys
from pathlib import Path
from vim.data import ImageFolder, ImageSource
from vim.data.tar_shards import TarImages
root = Path(sys.argv[1])
folder, tree = ImageFolder(root, "val"), ImageSource(root / "val")
tar = TarImages([root / "val.tar"], root, "")
files = [path[len(str(folder.path)) + 1 :] for path, _ in folder.samples]
labels = [[label for _, label in folder.samples], [entry.label for entry in tree.entries], tar.labels.tolist()]
print(json.dumps([folder.classes, tree.classes, tar.classes, files, [e.path for e in tree.entries], labels]))
"""


def test_classes_and_files_have_one_order_in_every_reader_and_process(tmp_path):
    write_classes(tmp_path / "val", TIED)
    write_tar(tmp_path / "val.tar", {f"{name}/{file}.png": png() for name in IN_ORDER for file in "Xx"})
    command = [sys.executable, "-c", ORDERS, str(tmp_path)]
    running = [
        subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": seed}, cwd=tmp_path, stdout=subprocess.PIPE)
        for seed in "01"
    ]
    found = [json.loads(out) for out, _ in outputs(*running)]
    assert found[0] == found[1]
    *classes, files, entries, labels = found[0]
    assert classes == [IN_ORDER] * 3
    assert files == entries == [f"{name}/{file}.png" for name in IN_ORDER for file in "Xx"]
    assert labels == [[label for label in range(len(IN_ORDER)) for _ in "Xx"]] * 3


def test_where_timm_has_no_tie_its_order_stays(tmp_path):
    for path in ("n02/b10.png", "n02/b9.png", "n1/A2.png", "n1/a10.jpg", "B/x.png", "a/y-1.png", "a/y.png"):
        (tmp_path / "val" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / path).write_bytes(b"")
    samples, classes = find_images_and_targets(str(tmp_path / "val"))
    folder = ImageFolder(tmp_path, "val")
    assert folder.samples == samples
    assert {name: label for label, name in enumerate(folder.classes)} == classes


def test_numbers_of_any_length_and_script_have_an_order():
    names = ["9" * 5000, "x" + "0" * 5000 + "1", "x٣", "x2"]
    assert sorted(names, key=natural_order) == [names[0], names[1], "x2", "x٣"]


CAFE = os.fsdecode(b"caf\xe9")


def test_names_that_are_no_text_are_escaped(tmp_path):
    assert plain_name(CAFE) == r"caf\xe9"
    assert plain_name("a\nb\u2028\x1b[31mé 猫 $x$") == r"a\nb\u2028\x1b[31mé 猫 $x$"
    write_classes(tmp_path / "val", [CAFE, "two\nlines"])
    (tmp_path / "val" / CAFE / "x.png").write_bytes(b"no image")
    folder, source = ImageFolder(tmp_path, "val"), ImageSource(tmp_path / "val")
    assert folder.classes == source.classes == [r"caf\xe9", r"two\nlines"]
    assert [source.entries[i].path for i in (0, 2)] == [r"caf\xe9/X.png", r"two\nlines/X.png"]
    assert folder.name(1) == rf"{tmp_path}/val/caf\xe9/x.png"
    with pytest.raises(DataError, match=r"cannot read image .*caf\\xe9/x.png: "):
        folder.load(1)
    assert folder.load(0)[1] == source.entries[0].label == 0
    assert EvalImages(folder, lambda image: image, bad_images="skip")[1][2] == [folder.name(1)]
    members = {f"{name}/{file}.png": png() for name in (CAFE, "two\nlines") for file in "Xx"}
    tar = TarImages([write_tar(tmp_path / "val.tar", members)], tmp_path, "")
    assert tar.classes == folder.classes
    assert tar.name(0) == r"val.tar/caf\xe9/X.png"
    assert split_folder(tmp_path, "val", {"one": 0.5, "two": 0.5}) == {"one": 2, "two": 2}
    check_same_classes(ImageFolder(tmp_path, "one"), folder)


def test_two_classes_that_are_written_alike_are_refused(tmp_path):
    write_classes(tmp_path / "val", [CAFE, r"caf\xe9"])
    with pytest.raises(DataError, match=r"has two classes that are written 'caf.*xe9'; rename one"):
        ImageFolder(tmp_path, "val")


def test_lists_hold_the_bytes_of_file_names(tmp_path):
    write_classes(tmp_path / "val", [CAFE])
    names = tmp_path / "names.txt"
    names.write_bytes(b"\xef\xbb\xbfval/caf\xe9/x.png\t3\r\nval/caf\xe9/X.png\t0\r\n")
    source = ImageSource(names)
    assert [(entry.path, entry.label) for entry in source.entries] == [
        (r"val/caf\xe9/x.png", 3),
        (r"val/caf\xe9/X.png", 0),
    ]
    assert source.classes == ["0", "1", "2", "3"]
    assert source.load(0).size == (2, 2)
    names.write_text("val/x.png\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"names.txt is no text in UTF-8: it has null bytes, as UTF-16 has; save it"):
        ImageSource(names)
    for label in ("9" * 5000, "99999999999", "-1", "²"):
        names.write_text(f"val/x.png\t{label}\n")
        with pytest.raises(DataError, match=r"labels? .*numbers? from 0 up"):
            ImageSource(names)
    with pytest.raises(DataError, match=r"cannot read .*val: Is a directory"):
        read_lines(tmp_path / "val")
