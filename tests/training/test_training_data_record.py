"""A run goes on with the data that it began with, and with updates made of the same steps."""

import os
import shutil

import pytest
from image_tree import write_image_tree
from whole_runs import config, interrupt, one_thread  # noqa: F401  (the fixture)

from vim.console import InterruptedRunError, RunError
from vim.data import DataConfig
from vim.training import train
from vim.training.classification import Classification
from vim.training.data_record import check_same_data, record_data

os.environ["ACCELERATE_USE_CPU"] = "true"
pytestmark = pytest.mark.usefixtures("one_thread")

DATA = {"num_workers": 0, "crop_pct": 1.0, "mean": (0.3,), "std": (0.2,)}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Images, and a run that was stopped in its second update."""
    path = tmp_path_factory.mktemp("begun")
    tree = write_image_tree(path / "images", {"train": 66, "val": 15}, classes=3)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, Classification, 1)
        with pytest.raises(InterruptedRunError):
            train(config(tree, path / "run"))
    return path


@pytest.fixture
def copied(begun, tmp_path):
    """Both in another folder, which is allowed."""
    shutil.copytree(begun, tmp_path / "copy")
    return tmp_path / "copy"


def resume(path, **data):
    train(config(path / "images", path / "run", data=DataConfig(str(path / "images"), **DATA | data)), resume=True)


def rename_class(images):
    for split in ("train", "val"):
        (images / split / "a").rename(images / split / "zero")


def add_class(images):
    for split in ("train", "val"):
        shutil.copytree(images / split / "a", images / split / "d")


def remove_class(images):
    for split in ("train", "val"):
        shutil.rmtree(images / split / "b")


def add_image(images):
    shutil.copy(images / "train/b/4.png", images / "train/b/new.png")


def remove_image(images):
    (images / "val/c/5.png").unlink()


def replace_images(images):
    for number in range(5):
        (images / f"train/a/{3 * number}.png").rename(images / f"train/a/other{number}.png")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (rename_class, "class 0 was 'a', is 'b'; class 1 was 'b', is 'c'; class 2 was 'c', is 'zero'"),
        (add_class, "3 classes have become 4 .1 new: 'd'."),
        (remove_class, "3 classes have become 2 .1 gone: 'b'."),
        (add_image, "66 images of train have become 67 .1 new: 'b/new.png'."),
        (remove_image, "15 images of val have become 14 .1 gone: 'c/5.png'."),
        (replace_images, r"66 images of train have become 66 .5 new: 'a/other0.png'.* and 2 others; 5 gone: 'a/0.png'"),
    ],
)
def test_a_resumed_run_refuses_other_data(copied, change, what):
    change(copied / "images")
    with pytest.raises(RunError, match=f"the data are not those that the run began with: {what}") as refused:
        resume(copied, batch_size=16)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("names", "annotations", "what"),
    [
        (["a/1", "a/0", "b/2"], "x", "3 images of train have become 3 .another order."),
        (["a/0", "a/1b/2"], "x", "3 images of train have become 2 .1 new: 'a/1b/2'; 2 gone: 'a/1', 'b/2'."),
        (["a/0", "a/1", "b/2"], "y", "the annotations of train are others"),
    ],
)
def test_names_their_order_and_what_else_is_known_are_compared(names, annotations, what):
    def record(names, annotations):
        return record_data(["a", "b"], {"train": names, "val": ["b/0"]}, {"train": annotations})

    saved = record(["a/0", "a/1", "b/2"], "x")
    check_same_data(saved, record(["a/0", "a/1", "b/2"], "x"))
    with pytest.raises(RunError, match=f"the data are not those that the run began with: {what}. Put them back"):
        check_same_data(saved, record(names, annotations))


def test_the_folder_of_the_data_may_move(copied):
    resume(copied, batch_size=16)
    assert (copied / "run" / "summary.json").exists()


def test_updates_keep_their_steps(copied):
    """Two of eight round, mix and drop otherwise than one of sixteen."""
    two = config(
        copied / "images",
        copied / "run",
        data=DataConfig(str(copied / "images"), batch_size=8, **DATA),
        accumulate=2,
    )
    with pytest.raises(RunError, match=r"1 steps of 16 images, .* 2 of 8, .* --data.batch_size 16 --accumulate 1"):
        train(two, resume=True)
