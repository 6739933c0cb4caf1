"""Files of every kind that data sets hold: each becomes the picture it is, or an error with its name."""

import re
import warnings

import numpy as np
import pytest
from PIL import Image

from vim.data import DataError
from vim.data.decode import decode_image


def pixel(path, in_chans=3, place=(0, 0)):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return decode_image(path, in_chans, path).getpixel(place)


def test_sixteen_bits_keep_their_brightness(tmp_path):
    grey = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    for name in ("grey.png", "grey.tif"):
        assert [pixel(tmp_path / name, 1, (x, 0)) for x in range(3)] == [0, 128, 255]
        assert pixel(tmp_path / name, 3, (1, 0)) == (128, 128, 128)


def test_other_colour_models(tmp_path):
    Image.new("CMYK", (3, 3), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red, green, blue = pixel(tmp_path / "cmyk.jpg")
    assert red > 240
    assert green < 15
    assert blue < 15
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "palette.png", transparency=b"\x80\x40")
    assert pixel(tmp_path / "palette.png") == (10, 200, 30)
    Image.new("LA", (3, 3), (77, 0)).save(tmp_path / "grey.png")
    assert pixel(tmp_path / "grey.png") == (77, 77, 77)
    Image.new("1", (3, 3), 1).save(tmp_path / "bits.png")
    assert pixel(tmp_path / "bits.png", 1) == 255


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("blue", "red", "lime")]
    for name in ("moving.gif", "moving.webp", "moving.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert pixel(tmp_path / name) == (0, 0, 255)


def test_an_exif_rotation_is_not_applied(tmp_path):
    """As in timm and torchvision, whose published results are without it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode_image(tmp_path / "turned.jpg", 3, "").size == (8, 4)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 30)])
def test_unusual_sizes(tmp_path, size):
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "image.png")
    assert decode_image(tmp_path / "image.png", 3, "").size == size
    assert pixel(tmp_path / "image.png") == (1, 2, 3)


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "float", "bomb"])
def test_what_is_no_picture_is_named(tmp_path, kind):
    path = tmp_path / ("image.tif" if kind == "float" else "image.png")
    size = (20_000, 10_000) if kind == "bomb" else (30, 30)
    Image.new("F" if kind == "float" else "1" if kind == "bomb" else "RGB", size).save(path)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"<html>not found</html>", "truncated": content[:60]}.get(kind, content))
    with pytest.raises(DataError, match=re.escape(f"cannot read image {path}: ") + ".*; repair or remove it"):
        decode_image(path, 3, path)
