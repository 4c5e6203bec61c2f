"""Files of every kind become upright RGB, and a file that cannot be used is named."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from roi_quantization.detection.data.images import ImageRecord, read_image


def save(path, image, width=4, height=2, **options):
    image.save(path, **options)
    return ImageRecord(1, path, width, height)


RED = Image.new("RGB", (4, 2), (255, 0, 0))


@pytest.mark.parametrize(
    ("name", "image", "colour"),
    [
        ("rgb.png", RED, (255, 0, 0)),
        ("palette.png", RED.convert("P"), (255, 0, 0)),
        ("alpha.png", RED.convert("RGBA"), (255, 0, 0)),
        ("grey.png", Image.new("L", (4, 2), 100), (100, 100, 100)),
        ("grey16.png", Image.fromarray(np.full((2, 4), 100 * 256, np.uint16)), (100, 100, 100)),
        ("grey16.tif", Image.fromarray(np.full((2, 4), 100 * 256, np.uint16)), (100, 100, 100)),
        ("grey16.pgm", Image.fromarray(np.full((2, 4), 100 * 256, np.int32)), (100, 100, 100)),
        ("cmyk.tif", Image.new("CMYK", (4, 2), (0, 255, 255, 0)), (255, 0, 0)),
    ],
)
def test_every_mode_is_read_as_rgb(tmp_path, name, image, colour):
    pixels = read_image(save(tmp_path / name, image))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 2, 4)
    assert (pixels == torch.tensor(colour)[:, None, None]).all()


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    pixels = read_image(save(tmp_path / "cmyk.jpg", Image.new("CMYK", (4, 2), (0, 255, 255, 0))))
    assert pixels[0].min() > 240 and pixels[1:].max() < 15


def test_exif_orientation_is_followed(tmp_path):
    upright = np.zeros((4, 2, 3), np.uint8)
    upright[0] = 255  # a white top row
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    lying = Image.fromarray(np.rot90(upright).copy())
    pixels = read_image(save(tmp_path / "turned.png", lying, width=2, height=4, exif=exif))
    assert torch.equal(pixels, torch.from_numpy(upright).permute(2, 0, 1))


def test_a_size_that_the_annotations_do_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png \(image 1\) is 4 x 2, its annotations say 2 x 4"):
        read_image(save(tmp_path / "a.png", RED, width=2, height=4))


@pytest.mark.parametrize("kept", [0, 20, 60])
def test_a_file_that_does_not_decode_is_named(tmp_path, kept):
    path = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (2, 4, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"broken\.png \(image 1\) does not decode"):
        read_image(ImageRecord(1, path, 4, 2))


def test_a_truncated_jpeg_is_named(tmp_path):
    path = tmp_path / "half.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"half\.jpg \(image 1\) does not decode: image file is truncated"):
        read_image(ImageRecord(1, path, 64, 64))


def test_an_image_too_large_to_be_true_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    with pytest.raises(ValueError, match=r"a\.png \(image 1\) does not decode: Image size \(8 pixels\) exceeds limit"):
        read_image(save(tmp_path / "a.png", RED))


@pytest.mark.parametrize(("width", "height"), [(12_000, 10_000), (50_000, 50_000), (70_000, 2)])
def test_a_small_file_that_claims_to_be_a_huge_image_is_named(tmp_path, width, height):
    """Pillow itself warns of the first, refuses the second and reads the third."""
    path = tmp_path / "bomb.png"
    RED.save(path)
    header = b"IHDR" + struct.pack(">II", width, height) + path.read_bytes()[24:29]
    path.write_bytes(path.read_bytes()[:12] + header + struct.pack(">I", zlib.crc32(header)) + path.read_bytes()[33:])
    with pytest.raises(ValueError, match=r"bomb\.png \(image 1\) does not decode: .*(too large to be a photograph|decompression bomb)"):
        read_image(ImageRecord(1, path, width, height))


def test_a_file_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, whatever the file is called; this gs leaves a trace."""
    trace = tmp_path / "trace"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {trace}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(tmp_path / "gs"))
    RED.save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg \(image 1\) does not decode: cannot identify image file"):
        read_image(ImageRecord(1, tmp_path / "a.jpg", 4, 2))
    assert not trace.exists()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png \(image 1\) does not decode: it is no regular file"):
        read_image(ImageRecord(1, tmp_path / "a.png", 4, 2))


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Image 1 is not at .*gone\.png"):
        read_image(ImageRecord(1, tmp_path / "gone.png", 4, 2))
