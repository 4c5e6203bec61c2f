"""Pictures as users have them (files, PIL images, arrays, tensors) -> the images that the detector takes."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.data.images import check_size, decode, to_rgb

ACCEPTED = "a path, a PIL image, a NumPy array [height, width, channels] or a tensor [channels, height, width]"


def is_batch(pictures: Any) -> bool:
    """Whether several pictures were given: a list or tuple, or an array or tensor of four dimensions."""
    return isinstance(pictures, list | tuple) or (isinstance(pictures, np.ndarray | Tensor) and pictures.ndim == 4)


def is_file(picture: Any) -> bool:
    """Whether a picture was given as a path."""
    return isinstance(picture, str | os.PathLike)


def to_image(picture: Any, name: str = "picture") -> Tensor:
    """Convert a picture to uint8 RGB `[3, H, W]` on the CPU.

    A file is read as in a data set, turned upright as its EXIF orientation says. A PIL image is converted to RGB and not turned. An array
    is `[H, W]` or `[H, W, C]`, a tensor `[H, W]` or `[C, H, W]`: one channel is grey, three are RGB, of four the last is opacity and is
    dropped. Floating point values are from 0 to 1 and are rounded to 8 bits.

    Args:
        picture: the picture.
        name: what an error calls it.

    Raises:
        TypeError: another type, of the picture or of its values.
        InputError: no pixels, another number of dimensions or channels, values out of range, or a file that does not decode.
        MissingFileError: there is no such file.
    """
    if is_file(picture):
        try:
            return decode(picture)
        except FileNotFoundError as error:
            raise MissingFileError(f"{name}: there is no file {os.fspath(picture)}") from error
        except ValueError as error:
            raise InputError(f"{name}: {os.fspath(picture)} does not decode: {error}") from error
    if isinstance(picture, Image.Image):
        _check_pixels(picture.height, picture.width, name)
        try:
            return to_rgb(picture, name)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
    if isinstance(picture, np.ndarray):
        if picture.dtype.kind not in "fu" or (picture.dtype.kind == "u" and picture.dtype != np.uint8):
            raise _wrong_dtype(picture.dtype, name)
        known = f"{picture.dtype.kind}{min(picture.dtype.itemsize, 8)}"  # PyTorch has neither long doubles nor other orders of bytes
        values = torch.from_numpy(np.array(picture, dtype=known, order="C"))  # a copy: it warns of an array that cannot be written to
        values = values.permute(2, 0, 1) if values.ndim == 3 else values
        layout = "[height, width, channels]"
    elif isinstance(picture, Tensor):
        values, layout = picture.detach().as_subclass(Tensor).cpu(), "[channels, height, width]"
        if values.dtype != torch.uint8 and not values.is_floating_point():
            raise _wrong_dtype(values.dtype, name)
    else:
        raise TypeError(f"{name} is a {type(picture).__name__}: expected {ACCEPTED}")
    return _three_channels(_to_uint8(_check_layout(values, tuple(picture.shape), layout, name), name))


def _wrong_dtype(dtype: Any, name: str) -> TypeError:
    return TypeError(f"{name} has values of type {dtype}: expected uint8 from 0 to 255, or floating point from 0 to 1")


def _check_layout(values: Tensor, shape: tuple[int, ...], layout: str, name: str) -> Tensor:
    """Return `[C, H, W]`."""
    if values.ndim not in (2, 3):
        raise InputError(f"{name} has shape {shape}: expected [height, width] or {layout}")
    values = values[None] if values.ndim == 2 else values
    if values.shape[0] not in (1, 3, 4):
        other = "An array has its channels last, a tensor has them first. " if min(shape) in (1, 3, 4) else ""
        raise InputError(
            f"{name} has shape {shape}, so {values.shape[0]} channels: expected {layout} with 1, 3 or 4 channels. {other}".strip()
        )
    _check_pixels(values.shape[1], values.shape[2], name)
    return values


def _check_pixels(height: int, width: int, name: str) -> None:
    if height == 0 or width == 0:
        raise InputError(f"{name} is {width} wide and {height} high: it has no pixels")
    try:
        check_size(width, height)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def _to_uint8(values: Tensor, name: str) -> Tensor:
    if values.dtype == torch.uint8:
        return values
    values = values.float()
    low, high = values.min().item(), values.max().item()
    if not (low >= 0 and high <= 1):  # a NaN is neither
        raise InputError(
            f"{name} has floating point values from {low:g} to {high:g}: expected 0 to 1. Divide values of 0 to 255 by 255, undo a "
            "normalisation by mean and deviation, or pass uint8"
        )
    return (255 * values).round().to(torch.uint8)


def _three_channels(values: Tensor) -> Tensor:
    return (values.expand(3, -1, -1) if len(values) == 1 else values[:3]).contiguous()
