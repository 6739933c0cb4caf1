"""Files of every kind that data sets hold: each becomes the picture it is, or an error with its name."""

import os
import re
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from vim.data import DataError, ImageFolder, ImageSource, decode
from vim.data.decode import decode_image, image_size
from vim.data.image_files import image_suffixes
from vim.data.tar_shards import TarImages


def pixel(path, in_chans=3, place=(0, 0)):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return decode_image(path, in_chans, path).getpixel(place)


def test_sixteen_bits_keep_their_brightness(tmp_path):
    grey = np.array([[0, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    Image.fromarray(grey).save(tmp_path / "grey.pgm")
    Image.frombytes("I;16B", (3, 1), grey.astype(">u2").tobytes()).save(tmp_path / "big-endian.tif")
    for name in ("grey.png", "grey.tif", "grey.pgm", "big-endian.tif"):
        assert [pixel(tmp_path / name, 1, (x, 0)) for x in range(3)] == [0, 128, 255]
        assert pixel(tmp_path / name, 3, (1, 0)) == (128, 128, 128)
    Image.fromarray(np.array([[-1, 65536, 2**31 - 1]], np.int32)).save(tmp_path / "beyond.tif")
    assert [pixel(tmp_path / "beyond.tif", 1, (x, 0)) for x in range(3)] == [0, 255, 255]


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
    Image.new("RGB", (3, 3), (255, 0, 0)).save(tmp_path / "red.png")
    assert pixel(tmp_path / "red.png", 1) == 76  # 0.299 of 255, as ITU-R 601 weighs red


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
    if kind != "truncated":  # the header is whole
        with pytest.raises(DataError, match=re.escape(f"cannot read image {path}: ") + ".*; repair or remove it"):
            image_size(path, path)


@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif", "avif", "jp2"])
def test_a_size_is_that_of_the_decoded_picture_without_decoding_it(tmp_path, monkeypatch, suffix, turned):
    """Also where the pixels would be turned, as Pillow does with those of TIFF."""
    path, exif = tmp_path / f"image.{suffix}", Image.Exif()
    exif[0x0112] = turned
    Image.new("RGB", (80, 40)).save(path, **{} if suffix in ("gif", "jp2") else {"exif": exif})
    want = decode_image(path, 3, path).size
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert image_size(path, path) == want


# Suffix -> what Pillow needs to write without much loss.
KINDS = {
    "webp": {"lossless": True},
    "bmp": {},
    "tif": {},
    "tiff": {"compression": "tiff_lzw"},
    "gif": {},
    "jp2": {},
    "avif": {"quality": 100},
    "ppm": {},
    "JPG": {"quality": 100},
    "jfif": {"quality": 100},
    "PNG": {},
}


def test_images_of_every_kind_are_in_folders_tars_and_lists(tmp_path, caplog):
    """Nothing vanishes: what is left out is counted and named once."""
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    kinds = {suffix: options for suffix, options in KINDS.items() if f".{suffix.lower()}" in image_suffixes()}
    assert len(kinds) >= 9
    for suffix, options in kinds.items():
        Image.new("RGB", (8, 8), (200, 30, 90)).save(folder / f"x.{suffix}", **options)
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.png").write_bytes(b"x")
    os.mkfifo(folder / "pipe.png")
    for index in range(3):
        (folder / f"{index}.json").write_text("{}")
    names = sorted(f"a/x.{suffix}" for suffix in kinds)
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name in (*names, "a/notes.txt"):
            tar.add(tmp_path / "val" / name, name)
        link = tarfile.TarInfo("a/link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a/x.PNG"
        tar.addfile(link)
    (tmp_path / "list.txt").write_text("\n".join(f"val/{name}" for name in names))
    sources = ImageFolder(tmp_path, "val"), ImageSource(tmp_path / "val"), ImageSource(tmp_path / "list.txt")
    tars = TarImages([tmp_path / "val.tar"], tmp_path, "val.tar"), ImageSource(tmp_path / "val.tar")
    for source in (*sources, *tars):
        assert len(source) == len(kinds)
        for index in range(len(source)):
            loaded = source.load(index)
            image = loaded if isinstance(loaded, Image.Image) else loaded[0]
            assert np.abs(np.asarray(image).astype(int) - (200, 30, 90)).max() <= 6
    where, tar = tmp_path / "val", tmp_path / "val.tar"
    of_folder = "6 (a/0.json, a/1.json, a/2.json, a/.hidden.png, a/notes.txt, ...)"
    of_tar = "2 (val.tar/a/notes.txt, val.tar/a/link.png)"
    left_out = "files left out, hidden or no images:"
    assert caplog.messages == [
        f"{where}: {left_out} {of_folder}", f"val.tar: {left_out} {of_tar}", f"{tar}: {left_out} {of_tar}"
    ]  # fmt: skip


def test_only_the_formats_of_images_are_opened(tmp_path, monkeypatch):
    """EPS would be run by Ghostscript, whatever its name."""
    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.eps").read_bytes())
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("run by Ghostscript"))
    with pytest.raises(DataError, match=r"cannot read image x: it holds none of the formats JPEG, PNG, .*; repair"):
        decode_image(tmp_path / "x.png", 3, "x")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "y.png")
    (tmp_path / "y.jpg").write_bytes((tmp_path / "y.png").read_bytes())
    assert pixel(tmp_path / "y.jpg") == (1, 2, 3)


def test_folders_that_cannot_be_walked(tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    Image.new("L", (2, 2)).save(tmp_path / "val" / "a" / "x.png")
    (tmp_path / "val" / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    source = ImageSource(tmp_path / "val")
    with pytest.raises(DataError, match=r"cannot read image a/gone.png: .*No such file"):
        source.load(0)
    (tmp_path / "val" / "a" / "itself").symlink_to(tmp_path / "val" / "a" / "itself")
    with pytest.raises(DataError, match=r"cannot read .*val/a/itself: Too many levels of symbolic links"):
        ImageSource(tmp_path / "val")
    (tmp_path / "val" / "a" / "itself").unlink()
    (tmp_path / "val" / "a" / "loop").symlink_to(tmp_path / "val")
    for reader in (lambda: ImageSource(tmp_path / "val"), lambda: ImageFolder(tmp_path, "val")):
        with pytest.raises(DataError, match=r"folder .*a/loop is a link to one that it is in; remove it"):
            reader()


PEAKS = """
import sys
import torch
from vim.data.decode import decode_image
from vim.training.summary import peak_memory_mib
cpu = torch.device("cpu")
baseline = peak_memory_mib(cpu)
for in_chans in (1, 3):
    print(decode_image(sys.argv[1], in_chans, "x").getbbox(), round(peak_memory_mib(cpu) - baseline))
"""


def test_large_images_of_16_bits_take_little_memory(tmp_path):
    """13,000 pixels squared in 321 KiB: 169 million, 2 bytes each in the file, and 4 as RGB."""
    path = tmp_path / "large.png"
    rows = np.zeros(13_000, ">u2").tobytes()
    compressor = zlib.compressobj(1)
    data = b"".join(compressor.compress(b"\0" + rows) for _ in range(12_999))
    data += compressor.compress(b"\0" + rows[:-2] + b"\xff\xff") + compressor.flush()
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 16, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, (b"IHDR", b"IDAT", b"IEND"), (header, data, b""))))
    command = [sys.executable, "-c", PEAKS, str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # Pillow warns of images of this size
    for line, limit in zip(done.stdout.splitlines(), (800, 1200), strict=True):
        box, _, peak = line.rpartition(" ")
        assert box == "(12999, 12999, 13000, 13000)"
        assert int(peak) <= limit


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_every_value_of_16_bits_is_rounded(tmp_path, monkeypatch):
    values = np.arange(65536, dtype=np.uint16).reshape(64, 1024)
    want = np.round(values.astype(np.float64) * 255 / 65535)
    Image.fromarray(values).save(tmp_path / "x.png")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "x.tif")  # 32 bits
    for name in ("x.png", "x.tif"):
        assert np.array_equal(np.asarray(decode_image(tmp_path / name, 1, name)), want)
    monkeypatch.setattr(decode, "STRIP", 5000)  # strips that do not divide the image
    assert np.array_equal(np.asarray(decode_image(tmp_path / "x.png", 3, "x"))[..., 2], want)


def test_text_that_fills_the_memory_is_refused(tmp_path):
    """A PNG whose comments unpack to far more than the file."""
    bomb = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(200_000_000), 9))
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    path = tmp_path / "x.png"
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    for content in (bomb + pixels, pixels + bomb):
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + content + chunk(b"IEND", b""))
        with pytest.raises(DataError, match=r"cannot read image x: Decompressed data too large"):
            decode_image(path, 3, "x")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("Failed to decode"), zlib.error("x"), struct.error("x")])
def test_whatever_pillow_says_the_image_is_named(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(DataError, match=f"cannot read image x: {str(error) or type(error).__name__}; repair"):
        decode_image(tmp_path / "x.png", 1, "x")
