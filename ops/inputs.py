"""What every operator accepts, checked before anything is read."""

import math
from collections.abc import Sequence
from operator import index

import numpy as np
import torch
from torch import Tensor
from torch.jit._trace import is_tracing  # torch.jit has it too, without saying so to mypy

from roi_quantization.ops.geometry import is_number


class BoxShapeError(ValueError, AssertionError):
    """Boxes of another shape: a ValueError, and an AssertionError for callers that catch torchvision's."""


def prepare(
    features: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int | Sequence[int], *, differentiable_boxes: bool
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Bring both of torchvision's box forms into one.

    Args:
        features: `[N, C, H, W]`, floating point.
        boxes: list of `N` tensors `[L, 4]`, or one `[K, 5]` whose first column is the index of the image; `(x1, y1, x2, y2)` in pixels.
        output_size: bins along height and width; an int for both.
        differentiable_boxes: whether the operator has a gradient with respect to the boxes.

    Returns:
        Index of the image `[K]`, coordinates `[K, 4]` in float32 (float64 where the features are), bins `(height, width)`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError(f"input: expected a floating point tensor [N, C, H, W], got {_describe(features)}")
    if features.dim() != 4:
        raise ValueError(f"input: expected 4 dimensions [N, C, H, W], got shape {tuple(features.shape)}")
    size = pair_of_bins(output_size)

    image, coordinates = _table(boxes) if isinstance(boxes, Tensor) else _concatenate(features, boxes)
    if coordinates.device != features.device:
        raise ValueError(f"boxes are on {coordinates.device} and input on {features.device}: move one of them")
    if not differentiable_boxes and coordinates.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "boxes require a gradient, and an operator with quantized bins has none: its output is piecewise constant in the boxes. "
            "Pass boxes.detach(), or choose an operator whose bins are not quantized (roi_align, roi_warp, prroi_pool)."
        )
    if 0 in (features.shape[0], *features.shape[2:]) and coordinates.shape[0] > 0:  # in this order: a trace need not know how many boxes
        raise ValueError(f"input: a map of shape {tuple(features.shape)} has no cells to pool {coordinates.shape[0]} boxes from")
    return image, coordinates.to(torch.promote_types(features.dtype, torch.float32)), size


def pair_of_bins(output_size: int | Sequence[int]) -> tuple[int, int]:
    """Return the bins along height and width, from an integer (NumPy's as well) or two of them, also in an array or a tensor.

    Raises:
        ValueError: anything else, and numbers below 1.
    """
    if isinstance(output_size, np.ndarray | Tensor) and output_size.ndim > 0:
        output_size = list(output_size)
    try:
        sides = tuple(output_size) if isinstance(output_size, Sequence) else (index(output_size),) * 2
        height, width = (side if isinstance(side, torch.SymInt) else index(side) for side in sides)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"output_size: expected a positive int or two of them (height, width), got {output_size!r}")
    return height, width


def check_scale(spatial_scale: float) -> None:
    """Raise ValueError for what is not cells per pixel.

    A tensor is not: a kernel takes a number, and reading it off a GPU would wait. In a trace it may be one, as sizes are there.
    """
    try:
        is_scale = (is_tracing() or is_number(spatial_scale)) and 0 < spatial_scale < math.inf
    except (TypeError, ValueError, RuntimeError):  # other types, arrays, tensors
        is_scale = False
    if not is_scale:
        raise ValueError(f"spatial_scale={spatial_scale!r}: expected cells per pixel, above 0, such as 1/16: one number for both axes")


def mask_invalid_boxes(image: Tensor, coordinates: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Index of the image `[K]` int64 and coordinates `[K, 4]`; a box that is not valid becomes NaN, and so does its output."""
    valid = _is_valid(image, coordinates, images)
    return torch.where(valid, image, 0).long(), torch.where(valid[:, None], coordinates, torch.nan)


def _is_valid(image: Tensor, coordinates: Tensor, images: int) -> Tensor:
    return coordinates.isfinite().all(1) & (image > -1) & (image < images)


@torch.library.custom_op("roi_quantization::check_boxes", mutates_args=(), device_types="cpu")
def check_boxes(image: Tensor, coordinates: Tensor, features: Tensor) -> Tensor:
    """Raise ValueError for a box that is NaN or infinite, or of an image that is not there; else give `image` back, to be used.

    It is for a CPU: on other devices looking would stall the stream. It is an operator of PyTorch, because a trace and an exported program
    have to check the boxes that they are called with, not those that they were made with.

    Args:
        image: `[K]` index of each box's image, of any dtype.
        coordinates: `[K, 4]`.
        features: `[N, C, H, W]`, of which the number of images is read.
    """
    images = features.shape[0]
    valid = _is_valid(image, coordinates, images)
    if not valid.all():
        k = int((~valid).nonzero()[0])
        box = [round(float(v), 3) for v in coordinates[k]]
        if not bool(coordinates[k].isfinite().all()):
            raise ValueError(f"boxes: box {k} is {box}: coordinates must be finite")
        raise ValueError(f"boxes: box {k} {box} belongs to image {image[k].item():g}, and the input holds images 0 to {images - 1}")
    return image.clone()


@check_boxes.register_fake
def _(image: Tensor, coordinates: Tensor, features: Tensor) -> Tensor:
    return torch.empty_like(image)


def _table(boxes: Tensor) -> tuple[Tensor, Tensor]:
    if boxes.dim() != 2 or boxes.shape[1] != 5:
        raise BoxShapeError(f"boxes: a tensor must be [K, 5] (image index, x1, y1, x2, y2), got shape {tuple(boxes.shape)}")
    if not boxes.is_floating_point():
        raise TypeError(f"boxes: expected floating point coordinates, got {boxes.dtype}")
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))  # bfloat16 compares image 256 with 257 images as with 256
    return boxes[:, 0].detach(), boxes[:, 1:]


def _concatenate(features: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    boxes = list(boxes)
    if len(boxes) != features.shape[0]:
        raise ValueError(f"boxes: a list must have one tensor for each of the {features.shape[0]} images, got {len(boxes)}")
    for i, b in enumerate(boxes):
        if not isinstance(b, Tensor) or not b.is_floating_point():
            raise TypeError(f"boxes[{i}]: expected a floating point tensor [L, 4], got {_describe(b)}")
        if b.dim() != 2 or b.shape[1] != 4:
            raise BoxShapeError(f"boxes[{i}]: expected shape [L, 4] (x1, y1, x2, y2), got {tuple(b.shape)}")
        if b.device != boxes[0].device or b.dtype != boxes[0].dtype:
            raise ValueError(f"boxes[{i}] is {b.dtype} on {b.device}, boxes[0] is {boxes[0].dtype} on {boxes[0].device}: make them alike")
    if not boxes:
        return torch.empty(0, dtype=torch.int64, device=features.device), features.new_empty(0, 4)
    # full_like, because a trace would take the number of boxes of a list for a constant
    image = torch.cat([torch.full_like(b[:, 0], i, dtype=torch.int64, requires_grad=False) for i, b in enumerate(boxes)])
    return image, torch.cat(boxes)


def _describe(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
