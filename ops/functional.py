"""The operators as functions, with torchvision's argument names and order; `roi_align` and `roi_pool` have its defaults too.

Boxes are a list of `[L, 4]`, one for each image, or one `[K, 5]` whose first column is the index of the image. Coordinates are
`(x1, y1, x2, y2)` in pixels of the image that `spatial_scale` relates to the map; their conventions are in `ops/geometry.py`. The output is
`[K, C, P, P]`, contiguous, in the dtype of the input. Sums and coordinates are float32 at least. Numba kernels run on a CPU, Triton kernels
on a CUDA GPU. On other devices, AMD's GPUs too, and for float64 on a GPU, plain PyTorch runs (`ops/eager.py`), and a warning in the log
says so once.
"""

import logging
from collections.abc import Sequence
from dataclasses import astuple
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.jit._trace import is_tracing  # torch.jit has it too, without saying so to mypy
from torch.overrides import handle_torch_function, has_torch_function_unary

from roi_quantization.ops import eager, library
from roi_quantization.ops.geometry import Axis, Bounds, IntegralRule, LatticeRule, smallest_winners_dtype
from roi_quantization.ops.inputs import check_boxes, check_scale, mask_invalid_boxes, prepare

log = logging.getLogger(__name__)

Boxes = Tensor | Sequence[Tensor]
Size = int | Sequence[int]


def lattice_pool(
    input: Tensor,
    boxes: Boxes,
    output_size: Size,
    spatial_scale: float = 1.0,
    *,
    quantize_roi: Literal["none", "round", "floor"] = "none",
    inclusive_end: bool = False,
    half_pixel: bool = True,
    min_extent: float | None = None,
    quantize_bins: Literal["none", "cover", "truncate"] = "none",
    sampling_ratio: int = 2,
    sample_offset: float = 0.5,
    border: float = 1.0,
    reduce: Literal["mean", "max"] = "mean",
) -> Tensor:
    """Pool each box on a lattice of samples or cells, each rounding with a knob of its own; the defaults are RoIAlign with 2 x 2 samples.

    Args:
        input: the feature map `[N, C, H, W]`.
        boxes: `(x1, y1, x2, y2)` in pixels of the image: a list of `[L, 4]`, one for each image, or `[K, 5]` with the image's index before.
        output_size: bins along height and width.
        spatial_scale: cells per pixel, such as 1/16.
        quantize_roi: what happens to the projected edges: `none`, `round` (halves away from zero, as Caffe) or `floor`.
        inclusive_end: Caffe's reading of the end as the last cell inside: one cell is added to the extent.
        half_pixel: interpolate with cell centres at `i + 0.5` (torchvision's `aligned=True`). Where bins are quantized nothing is
            interpolated, and it changes only the default of `min_extent`.
        min_extent: smallest extent of a RoI in cells; None: 1 without `half_pixel`, no minimum with it (both as torchvision).
        quantize_bins: `none`; `cover`: from the floor of a bin's start to the ceil of its end; bins overlap, nothing is lost; `truncate`:
            the bin size is floored (one cell at least) and the remainder at the RoI's end is lost. Such bins visit each of their cells.
        sampling_ratio: samples per bin along each axis where bins are not quantized; 0 or less: adaptive, `ceil(extent / P)`.
        sample_offset: place of a sample in its share of the bin: 0.5 the middle, 0 the start.
        border: how far beyond the outermost cell centres a sample is still worth the outermost cell, in cells; further out it is worth 0.
        reduce: `mean` or `max` over a bin's samples. A bin without samples is 0. The gradient of a maximum goes to the first of equals.

    Returns:
        `[K, C, P, P]`. Differentiable in the features, and in the boxes where bins are not quantized, straight through a quantized RoI.
        A sample that interpolates an infinite cell is infinite or NaN, as in torchvision. The cell beside a sample that lies on a cell's
        centre has the weight 0 and is not read, though torchvision reads it. A bin with a NaN sample is NaN, for `max` too.

    Raises:
        TypeError, ValueError: an argument of another shape, type or range; a box that is NaN or infinite, or of an image that is not there
            (on a CPU; on a GPU, where looking would stall the stream, its output is NaN); a box of more than 1e18 cells whose bins cannot
            be placed (on a CPU; on a GPU its output is undefined); boxes that want a gradient where there is none.
        RuntimeError: forward-mode differentiation of a kernel.
    """
    if has_torch_function_unary(input):  # torch.fx records a call of this function, and subclasses of Tensor may override it
        return handle_torch_function(
            lattice_pool,
            (input,),
            input,
            boxes,
            output_size,
            spatial_scale,
            quantize_roi=quantize_roi,
            inclusive_end=inclusive_end,
            half_pixel=half_pixel,
            min_extent=min_extent,
            quantize_bins=quantize_bins,
            sampling_ratio=sampling_ratio,
            sample_offset=sample_offset,
            border=border,
            reduce=reduce,
        )
    if reduce not in ("mean", "max"):
        raise ValueError(f"reduce={reduce!r}: expected one of mean, max")
    rule = LatticeRule(quantize_roi, inclusive_end, half_pixel, min_extent, quantize_bins, sampling_ratio, sample_offset, border)
    return _pool_lattice(rule, input, boxes, output_size, spatial_scale, reduce)


ROI_POOL = LatticeRule(quantize_roi="round", inclusive_end=True, half_pixel=False, quantize_bins="cover")
"""The rounding rule of RoIPool."""


def _pool_lattice(rule: LatticeRule, features: Tensor, boxes: Boxes, output_size: Size, spatial_scale: float, reduce: str) -> Tensor:
    image, y, x = place_bins(rule, features, boxes, output_size, spatial_scale)
    if not _has_kernels(features):
        return eager.lattice_pool(features, image, y, x, reduce).to(features.dtype)
    dtype = None  # of the winners, which a gradient needs
    if reduce == "max" and torch.is_grad_enabled() and (features.requires_grad or y.first.requires_grad):
        dtype = smallest_winners_dtype(rule.most_samples(features.shape[2]) * rule.most_samples(features.shape[3]))
    out, _ = library.lattice_pool(features, image, *y, *x, reduce, dtype, rule.quantize_bins != "none")
    return out


def roi_pool(input: Tensor, boxes: Boxes, output_size: Size, spatial_scale: float = 1.0) -> Tensor:
    """Pool each box by RoIPool: the RoI is rounded (with Caffe's `+ 1`), a bin reaches from floor to ceil, and its largest cell counts.

    Girshick, "Fast R-CNN", 2015. Equal to `torchvision.ops.roi_pool`, gradients included. No gradient for the boxes: asking is an error.

    Takes `[N, C, H, W]` and boxes in pixels, one `[L, 4]` an image or `[K, 5]`; gives `[K, C, P, P]`. The rest: `lattice_pool`.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(roi_pool, (input,), input, boxes, output_size, spatial_scale)
    return _pool_lattice(ROI_POOL, input, boxes, output_size, spatial_scale, "max")


def roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    reduce: Literal["mean", "max"] = "mean",
) -> Tensor:
    """Pool each box by RoIAlign: nothing is quantized, and samples are bilinear.

    He et al., "Mask R-CNN", 2017. Equal to `torchvision.ops.roi_align`, with its defaults: `aligned=False` and an adaptive number of
    samples. The usual RoIAlign is `aligned=True, sampling_ratio=2`. `aligned` is `half_pixel` of `lattice_pool`.
    `reduce="max"` takes the largest interpolated sample. Differentiable in the boxes too.

    Takes `[N, C, H, W]` and boxes in pixels, one `[L, 4]` an image or `[K, 5]`; gives `[K, C, P, P]`. The rest: `lattice_pool`.
    """
    return lattice_pool(input, boxes, output_size, spatial_scale, half_pixel=aligned, sampling_ratio=sampling_ratio, reduce=reduce)


def roi_warp(
    input: Tensor,
    boxes: Boxes,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = True,
    reduce: Literal["mean", "max"] = "mean",
) -> Tensor:
    """Pool each box by RoIWarp as Mask R-CNN reads it: the RoI is rounded, its bins are not, and samples are bilinear.

    Dai et al., "Multi-task Network Cascades", 2016; He et al., "Mask R-CNN", section 3 and table 2. Differentiable in the boxes, straight
    through the rounding. `aligned` is `half_pixel` of `lattice_pool`, and its default is not that of `roi_align`. The layer that was
    released with MNC is `configs/roi/warp_mnc.yaml`.

    Takes `[N, C, H, W]` and boxes in pixels, one `[L, 4]` an image or `[K, 5]`; gives `[K, C, P, P]`. The rest: `lattice_pool`.
    """
    return lattice_pool(
        input, boxes, output_size, spatial_scale, quantize_roi="round", half_pixel=aligned, sampling_ratio=sampling_ratio, reduce=reduce
    )


def prroi_pool(input: Tensor, boxes: Boxes, output_size: Size, spatial_scale: float = 1.0, half_pixel: bool = False) -> Tensor:
    """Pool each box by Precise RoI pooling: each bin is the mean of the interpolated map, as an exact integral; nothing is quantized.

    Jiang et al., "Acquisition of Localization Confidence for Accurate Object Detection" (IoU-Net), 2018, equation 5. The map is 0 beyond
    its outermost cells; a bin without area is 0. `half_pixel` is that of `lattice_pool`; False is the released
    layer. Differentiable in the boxes too.

    Takes `[N, C, H, W]` and boxes in pixels, one `[L, 4]` an image or `[K, 5]`; gives `[K, C, P, P]`. The rest: `lattice_pool`.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(prroi_pool, (input,), input, boxes, output_size, spatial_scale, half_pixel)
    image, y, x = place_bins(IntegralRule(half_pixel), input, boxes, output_size, spatial_scale)
    if not _has_kernels(input):
        return eager.integral_pool(input, image, y, x).to(input.dtype)
    return library.integral_pool(input, image, *y, *x)


def place_bins(
    rule: LatticeRule | IntegralRule, features: Tensor, boxes: Boxes, output_size: Size, spatial_scale: float
) -> tuple[Tensor, Any, Any]:
    """Return the image of each box, and where its bins look along y and along x.

    Args:
        rule: what is rounded and sampled.
        features, boxes, output_size, spatial_scale: as of `lattice_pool`.

    Returns:
        `[K]` index of the image, int64; an `Axis` along y and one along x, each `[K, P]`, or two `Bounds` for an `IntegralRule`.

    Raises:
        TypeError, ValueError, RuntimeError: as `lattice_pool`.
    """
    image, box, bins = prepare(features, boxes, output_size, differentiable_boxes=rule.has_box_gradient)
    check_scale(spatial_scale)
    if library.supports(features):
        library.refuse_tangents(features, box)
    images, _, height, width = features.shape
    if places_by_kernel(features, box):
        return place_by_kernel(rule, image.detach(), box.detach(), spatial_scale, images, bins, (height, width))
    if features.is_cpu:
        image = check_boxes(image, box.detach(), features.detach())
    image, box = mask_invalid_boxes(image, box, images)
    y = rule.axis(box[:, 1], box[:, 3], spatial_scale, bins[0], height)
    return image, y, rule.axis(box[:, 0], box[:, 2], spatial_scale, bins[1], width)


def places_by_kernel(features: Tensor, box: Tensor) -> bool:
    """Whether a kernel places the bins: on a GPU, unless the boxes need a gradient, which autograd computes through `rule.axis`.

    Nor under `jit.trace`, which would fix the size of the map in the operator's lists of integers.
    """
    needs_gradient = box.requires_grad and torch.is_grad_enabled()
    return features.is_cuda and library.supports(features) and not (needs_gradient or is_tracing())


def place_by_kernel(
    rule: LatticeRule | IntegralRule,
    image: Tensor,
    box: Tensor,
    spatial_scale: float,
    images: int,
    bins: Sequence[int],
    size: Sequence[int],
) -> tuple[Tensor, Any, Any]:
    """The same by one kernel, in the place of some seventy that a GPU takes longer to start than to run. It has no gradient."""
    if isinstance(rule, IntegralRule):
        image, low_high_y, low_high_x = library.place_edges(image, box, spatial_scale, images, bins, rule.half_pixel)
        return image, Bounds(*low_high_y), Bounds(*low_high_x)
    image, y, visited_y, x, visited_x = library.place_lattice(image, box, spatial_scale, images, bins, size, *astuple(rule))
    return image, Axis(y[0], y[1], visited_y, y[2]), Axis(x[0], x[1], visited_x, x[2])


def _has_kernels(features: Tensor) -> bool:
    supported = library.supports(features)
    if not (supported or torch.compiler.is_compiling()):
        _warn_of_plain_pytorch(features.device.type, features.dtype)
    return supported


@cache
def _warn_of_plain_pytorch(device: str, dtype: torch.dtype) -> None:
    log.warning("no kernels for %s on %s: the RoI operators run in plain PyTorch, which is slower and takes more memory", dtype, device)
