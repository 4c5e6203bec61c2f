"""Pictures in every form that users have them in are the same image, and what cannot be one is an error."""

import logging
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from roi_quantization.detection.data.pictures import is_batch, to_image


@pytest.fixture
def pixels():
    """uint8 `[5, 7, 3]`, all values different."""
    return np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def forms(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    return {
        "path": tmp_path / "picture.png",
        "name of a file": str(tmp_path / "picture.png"),
        "PIL": Image.fromarray(pixels),
        "array": pixels,
        "array with negative strides": np.ascontiguousarray(pixels[::-1, :, ::-1])[::-1, :, ::-1],
        "float array": pixels / 255,
        "float16 array": (pixels / 255).astype(np.float32),
        "array with opacity": np.concatenate([pixels, pixels[..., :1]], axis=2),
        "tensor": tensor,
        "float tensor": tensor / 255,
        "tensor that wants a gradient": (tensor / 255).requires_grad_(),
        "tv_tensor": tv_tensors.Image(tensor),
        "tensor with opacity": torch.cat([tensor, tensor[:1]]),
    }


def test_every_form_of_a_picture_is_the_same_image(pixels, tmp_path):
    expected = torch.from_numpy(pixels).permute(2, 0, 1)
    for name, picture in forms(pixels, tmp_path).items():
        image = to_image(picture)
        assert type(image) is torch.Tensor and image.dtype == torch.uint8, name
        assert torch.equal(image, expected), name


def test_an_array_that_cannot_be_written_to_is_taken_without_a_warning(pixels):
    picture = np.asarray(Image.fromarray(pixels))
    assert not picture.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(to_image(picture), torch.from_numpy(pixels).permute(2, 0, 1))


def test_grey_is_repeated(pixels):
    grey = pixels[..., 0]
    for picture in (grey, grey[..., None], torch.from_numpy(grey.copy()), torch.from_numpy(grey.copy())[None], Image.fromarray(grey)):
        assert torch.equal(to_image(picture), torch.from_numpy(grey.copy()).expand(3, -1, -1))


def test_half_precision_is_rounded():
    assert to_image(torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.bfloat16))[0, 0].tolist() == [0, 128, 255]
    for dtype in (np.float16, ">f4", ">f8", np.longdouble):
        assert to_image(np.array([[0.0, 0.5, 1.0]], dtype))[0, 0].tolist() == [0, 128, 255], dtype


def test_a_pil_image_of_16_bits_is_scaled_and_not_clipped(caplog):
    with caplog.at_level(logging.WARNING):
        image = to_image(Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)))
    assert image[0, 0].tolist() == [0, 128, 255]


def test_a_pil_image_is_taken_as_it_is_and_a_file_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (8, 6)).save(tmp_path / "lying.jpg", exif=exif)
    assert to_image(tmp_path / "lying.jpg").shape == (3, 8, 6)
    assert to_image(Image.open(tmp_path / "lying.jpg")).shape == (3, 6, 8), "boxes are in pixels of the picture given"


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        (
            np.zeros((4, 4, 3)) + 255.0,
            ValueError,
            "me has floating point values from 255 to 255: expected 0 to 1. Divide values of 0 to 255",
        ),
        (torch.randn(3, 4, 4) - 5, ValueError, r"floating point values from -.* undo a normalisation"),
        (np.full((4, 4, 3), 255, ">f4"), ValueError, "me has floating point values from 255 to 255"),
        (np.full((4, 4, 3), np.nan), ValueError, "values from nan to nan: expected 0 to 1"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "me has values of type int64: expected uint8 from 0 to 255, or floating point"),
        (np.zeros((4, 4, 3), np.uint16), TypeError, "values of type uint16"),
        (np.zeros((4, 4), bool), TypeError, "values of type bool"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), TypeError, r"values of type torch\.int32"),
        (
            np.zeros((4, 4, 2), np.uint8),
            ValueError,
            r"shape \(4, 4, 2\), so 2 channels: expected \[height, width, channels\] with 1, 3 or 4",
        ),
        (np.zeros((3, 40, 50), np.uint8), ValueError, r"50 channels: .* An array has its channels last, a tensor has them first"),
        (torch.zeros(40, 50, 3), ValueError, r"40 channels: expected \[channels, height, width\] .* a tensor has them first"),
        (np.zeros(4, np.uint8), ValueError, r"me has shape \(4,\): expected \[height, width\] or"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, r"me has shape \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "me is 4 wide and 0 high: it has no pixels"),
        (torch.zeros(3, 4, 0), ValueError, "me is 0 wide and 4 high: it has no pixels"),
        (None, TypeError, "me is a NoneType: expected a path, a PIL image"),
        ("nowhere.png", FileNotFoundError, r"me: there is no file nowhere\.png"),
        (__file__, ValueError, r"me: .*test_pictures\.py does not decode: cannot identify"),
    ],
)
def test_what_is_no_picture_is_an_error(picture, error, message):
    with pytest.raises(error, match=message):
        to_image(picture, "me")


def test_several_pictures_are_a_list_or_a_fourth_dimension(pixels):
    assert not any(is_batch(one) for one in (pixels, torch.from_numpy(pixels), "a.png", Image.fromarray(pixels)))
    assert all(is_batch(some) for some in ([pixels], ("a.png", "b.png"), pixels[None], torch.from_numpy(pixels)[None]))
