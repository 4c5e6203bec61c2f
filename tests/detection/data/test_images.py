"""Files of every kind become upright RGB, and a file that cannot be used is named."""

import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps

from roi_quantization.detection.data import images
from roi_quantization.detection.data.images import ImageRecord, decode, read_image


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2, 4, 3), dtype=np.uint8))
    for name in ("a.png", "a.tif", "a.webp"):
        stored.save(tmp_path / name, exif=exif, lossless=True)
        with Image.open(tmp_path / name) as file:
            upright = np.array(ImageOps.exif_transpose(file))
        assert torch.equal(decode(tmp_path / name), torch.from_numpy(upright).permute(2, 0, 1)), name


def tiff_exif(*entries):
    """EXIF data of hand-made entries (tag, type, count, four bytes of value), then a string that long values may point to."""
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + b"\0\0\0\0"


TURNED = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    "entries",
    [
        [TURNED, (0x011A, 2, 4, b"72\0\0")],  # XResolution as text
        [TURNED, (0x9204, 9, 1, struct.pack("<i", -1))],  # an exposure bias as a negative integer
        [TURNED, (0x0131, 2, 4000, struct.pack("<I", 9))],  # a string that ends beyond the file
        [TURNED, (0x010F, 77, 1, b"\0\0\0\0")],  # a type that there is not
    ],
)
@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_metadata_other_than_the_orientation_is_not_read(tmp_path, entries):
    Image.new("RGB", (4, 2), (255, 0, 0)).save(tmp_path / "a.jpg", exif=tiff_exif(*entries))
    assert decode(tmp_path / "a.jpg").shape == (3, 4, 2), "turned"


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n      12\n4578696600zz\n"),  # no hexadecimal number
        png_chunk(b"tEXt", b"Raw profile type exif\0Exif\0\0II*\0"),  # as it is, not as text
        png_chunk(b"eXIf", b"Exif\0\0"),
        png_chunk(b"eXIf", b"MM"),
    ],
)
def test_damaged_metadata_do_not_refuse_a_png(tmp_path, chunk):
    RED.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    assert decode(tmp_path / "a.png")[0].min() == 255


def test_a_rotation_that_the_size_does_not_verify_is_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "_warned", set())
    exif = Image.Exif()
    exif[0x0112] = 3
    records = [save(tmp_path / name, RED, exif=exif) for name in ("a.png", "b.png")]
    read_image(records[0])
    assert not caplog.text, "no boxes"
    for record in records:
        read_image(record, has_boxes=True)
    assert len(caplog.records) == 1 and "a.png (image 1) is turned as its EXIF orientation says" in caplog.text
    exif[0x0112] = 6
    read_image(save(tmp_path / "c.png", RED, width=2, height=4, exif=exif), has_boxes=True)
    assert len(caplog.records) == 1, "the size tells"
    monkeypatch.setattr(images, "_warned", set())
    read_image(save(tmp_path / "d.png", Image.new("RGB", (3, 3)), width=3, height=3, exif=exif), has_boxes=True)
    assert "d.png" in caplog.text, "a square has the same size both ways"


def rising(white, dtype):
    """A row of 0, a quarter, a half and all of white, twice."""
    return Image.fromarray(np.array([[0, white / 4, white / 2, white]] * 2).astype(dtype))


@pytest.mark.parametrize(
    ("name", "image", "scale"),
    [
        ("10.png", rising(1023, np.uint16), "uint16 samples .* 0 to 1023 is scaled"),
        ("12.png", rising(4095, np.uint16), "uint16 samples .* 0 to 4095 is scaled"),
        ("12.tif", rising(4095, np.uint16), "uint16 samples .* 0 to 4095 is scaled"),
        ("14.tif", rising(16_383, np.uint16), "uint16 samples .* 0 to 16383 is scaled"),
        ("16.tif", rising(65_535, np.uint16), None),
        ("16.pgm", rising(65_535, np.uint16), None),
        ("8in32.tif", rising(255, np.int32), "int32 samples .* 0 to 255 is scaled"),
        ("20in32.tif", rising(1_000_000, np.int32), r"int32 samples .* 0 to 1e\+06 is scaled"),
        ("unit.tif", rising(1, np.float32), "float32 samples .* 0 to 1 is scaled"),
        ("float255.tif", rising(255, np.float32), "float32 samples .* 0 to 255 is scaled"),
        ("counts.tif", rising(70_000, np.float32), "float32 samples .* 0 to 70000 is scaled"),
    ],
)
def test_samples_of_more_than_8_bits_are_scaled_by_their_range(tmp_path, caplog, monkeypatch, name, image, scale):
    monkeypatch.setattr(images, "_warned", set())
    image.save(tmp_path / name)
    for _ in range(2):
        assert decode(tmp_path / name)[:, 0].sub(torch.tensor([0, 64, 128, 255], dtype=torch.uint8)).to(torch.int8).abs().max() <= 1
    assert len(caplog.records) == (scale is not None)
    assert scale is None or re.search(rf"{name} has {scale} to 0 to 255, by the image's own range", caplog.text)


def test_negative_samples_begin_at_black(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(images, "_warned", set())
    Image.fromarray(np.float32([[-1000, 0, 1000]])).save(tmp_path / "hounsfield.tif")
    assert decode(tmp_path / "hounsfield.tif")[0, 0].tolist() == [0, 128, 255]
    assert "-1000 to 1000 is scaled" in caplog.text


def test_a_tiff_that_states_its_maximum_is_scaled_by_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "_warned", set())
    Image.fromarray(np.full((2, 4), 1000, np.uint16)).save(tmp_path / "a.tif", tiffinfo={281: 3999})
    assert decode(tmp_path / "a.tif").unique().tolist() == [64] and not caplog.text


def test_a_black_image_and_one_that_is_not_finite(tmp_path):
    Image.fromarray(np.zeros((2, 4), np.uint16)).save(tmp_path / "black.png")
    assert decode(tmp_path / "black.png").max() == 0
    Image.fromarray(np.float32([[0, np.nan]])).save(tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="some of its pixels are NaN or infinite"):
        decode(tmp_path / "nan.tif")


def png_of_16_bit_colour(pixels):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def test_colours_of_12_bits_in_16_are_refused(tmp_path):
    """Pillow keeps the upper 8 of 16 bits of a colour: 4 of 12."""
    pixels = np.random.default_rng(0).integers(0, 4096, (6, 5, 3))
    (tmp_path / "a.png").write_bytes(png_of_16_bit_colour(pixels * 16))
    assert np.array_equal(decode(tmp_path / "a.png").permute(1, 2, 0), pixels >> 4)
    (tmp_path / "a.png").write_bytes(png_of_16_bit_colour(pixels))
    with pytest.raises(ValueError, match=r"its colours have 16 bits and use 14 or fewer, .* convert it to 8 bits a channel"):
        decode(tmp_path / "a.png")


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
