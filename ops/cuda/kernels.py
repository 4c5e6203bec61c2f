"""The operators on a GPU: lattices in, Triton kernels, tensors out. The same functions as `ops/cpu/kernels.py`.

Dtypes: float32, float16, bfloat16.

Nothing here waits for the device, so CUDA graphs can capture all of it. The kernels read the map channels-last; a contiguous map is copied
once a call, which costs far less than reading its cells one channel at a time. The gradient of the features is laid out as the map is.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from roi_quantization.ops.cuda.geometry import place
from roi_quantization.ops.cuda.integral import integral_forward as _integral_forward
from roi_quantization.ops.cuda.integral import integral_slopes
from roi_quantization.ops.cuda.lattice import lattice_slopes, max_forward, mean_forward
from roi_quantization.ops.cuda.scatter import clear_and_find_largest, scatter_max, write_sums
from roi_quantization.ops.cuda.tiles import mark_rois_by_tile, mean_backward
from roi_quantization.ops.geometry import Axis, Bounds, IntegralRule, LatticeRule, empty_planes

# Sizes of programs: no register spills on sm_80, sm_90, sm_100 (tests/ops/compile_kernels.py)
BINS_PLACED = 256  # of a program of the geometry
ROW_OF_BINS = 8  # of a program of the forward, and of the gradient of boxes
TILE = {"TILE_Y": 8, "TILE_X": 8}  # cells of a program of the backward of a mean: the 64 rows of a product of tensor cores
MOST_PROGRAMS = 512  # that clear the sums and look for the largest gradient
CLEARED = 4096  # sums, at a time, of such a program
MOST_SUMS = 2**25  # 64-bit sums of a maximum's gradient, 256 MiB; a larger map takes some channels after others


def place_boxes(
    rule: LatticeRule | IntegralRule, image: Tensor, box: Tensor, spatial_scale: float, images: int, bins: list[int], size: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `mask_invalid_boxes` and `rule.axis` of y and x in one launch.

    Returns:
        The image of each box `[K]`, int64; first, step and total of y `[3, K, P]` (of an integral low and high `[2, K, P]`) and the visited
        samples `[K, P]`, int32; the same of x. Each plane `[K, P]` starts at a multiple of 16 bytes.
    """
    is_integral = isinstance(rule, IntegralRule)
    knobs = LatticeRule() if isinstance(rule, IntegralRule) else rule
    rois, kinds = len(image), 2 if is_integral else 3
    of_axis = [empty_planes(box, kinds, rois, of_side) for of_side in bins]
    counts = [torch.empty(0 if is_integral else rois, of_side, dtype=torch.int32, device=box.device) for of_side in bins]
    image_out = torch.empty(rois, dtype=torch.int64, device=box.device)
    if rois:
        with torch.cuda.device_of(box):
            place[triton.cdiv(rois * max(bins), BINS_PLACED), 2](
                *(image, box, image_out, of_axis[0], counts[0], of_axis[1], counts[1]),
                *(rois, image.stride(0), *box.stride(), images, *size, *(knobs.most_samples(side) for side in size)),
                *(float(spatial_scale), float(knobs.smallest_extent or 0), float(knobs.sample_offset)),
                *(-float(knobs.border), *(side - 1 + float(knobs.border) for side in size), *bins),
                INTEGRAL=is_integral,
                QUANTIZE_ROI=knobs.quantize_roi,
                INCLUSIVE_END=knobs.inclusive_end,
                HALF_PIXEL=rule.half_pixel,
                HAS_MIN_EXTENT=knobs.smallest_extent is not None,
                QUANTIZE_BINS=knobs.quantize_bins,
                RATIO=max(int(knobs.sampling_ratio), 0),
                TESTED=knobs.tests_each_sample,
                BINS=BINS_PLACED,
                enable_fp_fusion=False,  # a fused multiply-add rounds otherwise
            )
    return image_out, of_axis[0], counts[0], of_axis[1], counts[1]


def lattice_forward(
    features: Tensor, image: Tensor, y: Axis, x: Axis, reduce: str, winners_dtype: torch.dtype | None, whole_cells: bool = False
) -> tuple[Tensor, Tensor]:
    """Reduce each bin's samples by their `mean` or `max`.

    Args:
        features: the map `[N, C, H, W]`.
        image: `[K]` index of each RoI's image, int64.
        y, x: the lattices, each `[K, P]`.
        reduce: `mean` or `max`.
        winners_dtype: of the numbers of the samples that won, for `max`; None where no gradient needs them.
        whole_cells: whether the samples are known to be whole cells, one apart.

    Returns:
        `[K, C, P, P]` in the dtype of the features; and which sample of each bin won, `i * x.visited + j` or -1, `[K * C * P * P]`, or an
        empty tensor.
    """
    out = features.new_empty(len(image), features.shape[1], y.first.shape[1], x.first.shape[1])
    remembered = out.numel() if reduce == "max" and winners_dtype else 0
    winners = torch.empty(remembered, dtype=winners_dtype or torch.int8, device=features.device)
    lattice = image, *_dense(y), *_dense(x)
    if reduce == "max":
        _forward(max_forward, features, lattice, out, winners, CHANNELS=128, REMEMBER=remembered > 0, CELLS=whole_cells)
    else:
        _forward(mean_forward, features, lattice, out, CHANNELS=256, CELLS=whole_cells)
    return out, winners


def lattice_backward(
    grad: Tensor,
    features: Tensor | None,
    winners: Tensor,
    image: Tensor,
    y: Axis,
    x: Axis,
    reduce: str,
    of_features: Tensor | None,
    of_lattice: bool,
    whole_cells: bool = False,
) -> list[Tensor] | None:
    """Write the gradient of the features, and compute that of the lattices.

    Args:
        grad: of the output, `[K, C, P, P]`.
        features: the map `[N, C, H, W]`, read for `of_lattice` alone; else it may be None.
        winners: `[K * C * P * P]` as `lattice_forward` gave them, read for `max` alone.
        image: `[K]` index of each RoI's image, int64.
        y, x: the lattices, each `[K, P]`.
        reduce: `mean` or `max`.
        of_features: where the gradient of the features is written, in the shape and layout of the map; None where it is not asked for.
        of_lattice: whether the gradient of the lattices is asked for.
        whole_cells: as of the forward.

    Returns:
        Gradients of `first` and `step` of y and then of x, each `[K, P]` in float32; None without `of_lattice`.
    """
    grad, y, x = grad.contiguous(), Axis(*_dense(y)), Axis(*_dense(x))
    if of_features is not None and reduce == "max":
        _scatter(grad, of_features, image, y, x, winners, whole_cells)
    elif of_features is not None:
        _gather(grad, of_features, image, y, x, is_integral=False)
    return _slopes(lattice_slopes, grad, features, (winners, image, *y, *x), MAX=reduce == "max") if of_lattice else None


def integral_forward(features: Tensor, image: Tensor, y: Bounds, x: Bounds) -> Tensor:
    """Take the mean of the interpolated map `[N, C, H, W]` over each bin, whose edges are `[K, P]`: `[K, C, P, P]`, in its dtype."""
    out = features.new_empty(len(image), features.shape[1], y.low.shape[1], x.low.shape[1])
    _forward(_integral_forward, features, (image, *_dense(y), *_dense(x)), out, CHANNELS=256)
    return out


def integral_backward(
    grad: Tensor, features: Tensor | None, image: Tensor, y: Bounds, x: Bounds, of_features: Tensor | None, of_bounds: bool
) -> list[Tensor] | None:
    """Write the gradient of the features, and compute that of the edges of the bins.

    Args:
        grad: of the output, `[K, C, P, P]`.
        features: the map `[N, C, H, W]`, read for `of_bounds` alone; else it may be None.
        image: `[K]` index of each RoI's image, int64.
        y, x: the edges, each `[K, P]`.
        of_features: where the gradient of the features is written, in the shape and layout of the map; None where it is not asked for.
        of_bounds: whether the gradient of the edges is asked for.

    Returns:
        Gradients of `low` and `high` of y and then of x, each `[K, P]` in float32; None without `of_bounds`.
    """
    grad, y, x = grad.contiguous(), Bounds(*_dense(y)), Bounds(*_dense(x))
    if of_features is not None:  # edges for first and step; an integral has no count and no total, which are not read
        _gather(grad, of_features, image, Axis(*y, y.low, y.low), Axis(*x, x.low, x.low), is_integral=True)
    return _slopes(integral_slopes, grad, features, (image, *y, *x)) if of_bounds else None


def _forward(
    kernel: triton.JITFunction, features: Tensor, lattice: tuple[Tensor, ...], out: Tensor, *results: Tensor, CHANNELS: int, **options: bool
) -> None:
    """Run a kernel of the forward, one program for a row of bins and some channels."""
    if not out.numel():
        return
    _, channels, height, width = features.shape
    rois, _, *bins = out.shape
    block = min(CHANNELS if channels % CHANNELS == 0 else 64, max(triton.next_power_of_2(channels), 16))
    cells = features.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    is_packed = features.dtype == torch.bfloat16 and channels % 2 == 0 and cells.storage_offset() % 2 == 0
    grid = rois * bins[0], triton.cdiv(bins[1], ROW_OF_BINS), triton.cdiv(channels, block)
    with torch.cuda.device_of(features):
        kernel[grid](
            *(cells.reshape(-1).view(torch.int32) if is_packed else cells, *lattice, out, *results, channels, height, width, *bins),
            **{"CHANNELS": block, "WHOLE": channels % block == 0, "PACKED": is_packed, "BINS": ROW_OF_BINS},
            **{"OFFSET": _offset(features, bins), "num_warps": 1, "maxnreg": 255, "enable_fp_fusion": True, **options},
        )


def _gather(grad: Tensor, out: Tensor, image: Tensor, y: Axis, x: Axis, is_integral: bool) -> None:
    """Write the gradient of the features of a mean or an integral, tile by tile."""
    if not (grad.numel() and out.numel()):
        out.zero_()
        return
    images, channels, height, width = out.shape
    rois, _, *bins = grad.shape
    tiles_x = triton.cdiv(width, TILE["TILE_X"])
    tiles = triton.cdiv(height, TILE["TILE_Y"]) * tiles_x
    words = triton.cdiv(rois, 32)
    marks = torch.empty(images * tiles, words, dtype=torch.int32, device=grad.device)
    bins_x = min(triton.next_power_of_2(bins[1]), 32)
    bins_y = max(min(triton.next_power_of_2(bins[0]), 32 // bins_x), 8 // bins_x, 1)  # in one product: 32 bins, 8 at least
    block = min(max(triton.next_power_of_2(channels), 16), 64)
    with torch.cuda.device_of(out):
        mark_rois_by_tile[words, min(triton.cdiv(images * tiles, 16), 64)](
            *(image, *y[:3], *x[:3], marks, rois, words, height, width, tiles_x, tiles, images * tiles, *bins),
            **{"INTEGRAL": is_integral, "TILES": 16, "BINS_Y": 8, "BINS_X": 8, **TILE},
        )
        mean_backward[images * tiles, triton.cdiv(channels, block)](
            *(grad, *y, *x, marks, out, words, channels, height, width, *out.stride(), tiles_x, tiles, *bins),
            **{"INTEGRAL": is_integral, "EXACT": grad.dtype != torch.float32, "BINS_Y": bins_y, "BINS_X": bins_x, **TILE},
            **{"CHANNELS": block, "OFFSET": _offset(out, bins), "num_warps": 4, "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True},
        )


def _scatter(grad: Tensor, out: Tensor, image: Tensor, y: Axis, x: Axis, winners: Tensor, whole_cells: bool) -> None:
    """Write the gradient of the features of a maximum: each bin adds to the cells of its winner, in integers."""
    if not (grad.numel() and out.numel()):
        out.zero_()
        return
    images, channels, height, width = out.shape
    rois, _, *bins = grad.shape
    log_bins = math.ceil(math.log2(rois * bins[0] * bins[1]))
    at_a_time = _channels_at_a_time(channels, max(MOST_SUMS // (images * height * width), 1))
    sums = torch.empty(images * at_a_time * height * width, dtype=torch.int64, device=grad.device)
    programs = min(max(rois, triton.cdiv(sums.numel(), CLEARED)), MOST_PROGRAMS)  # a few RoIs may have a large map
    largest = torch.empty(programs, device=grad.device)
    offset, rois_of_bins = {"OFFSET": _offset(out, bins), "MOST_PROGRAMS": MOST_PROGRAMS}, (rois, triton.cdiv(bins[0] * bins[1], 64))
    with torch.cuda.device_of(out):
        clear_and_find_largest[(programs,)](
            grad,
            y.first,
            x.first,
            largest,
            sums,
            rois,
            channels * bins[0] * bins[1],
            sums.numel(),
            *bins,
            SIZE=CLEARED,
            num_warps=4,
            maxnreg=255,
        )
        for c0 in range(0, channels, at_a_time):
            of_pass = min(at_a_time, channels - c0)
            scatter_max[*rois_of_bins, triton.cdiv(of_pass, 16)](
                *(grad, winners, image, *y[:2], *x[:3], largest, sums, programs, c0, channels, at_a_time, height, width, log_bins, *bins),
                **{"CELLS": whole_cells, "BINS": 64, "CHANNELS": 16, "num_warps": 4, "enable_fp_fusion": False, **offset},
            )
            write_sums[triton.cdiv(height * width, 64), triton.cdiv(of_pass, 32), images](
                *(largest, sums, out, programs, c0, channels, at_a_time, height, width, *out.stride(), log_bins),
                **{"CELLS": 64, "CHANNELS": 32, "num_warps": 4, **offset},
            )


def _channels_at_a_time(channels: int, most: int) -> int:
    """Share channels out evenly to as few passes as there must be, in whole programs of 16 where these fit."""
    even = triton.cdiv(channels, triton.cdiv(channels, most))
    whole = triton.cdiv(even, 16) * 16
    return min(whole, channels) if whole <= most else even


def _slopes(
    kernel: triton.JITFunction, grad: Tensor, features: Tensor | None, lattice: tuple[Tensor, ...], **options: bool
) -> list[Tensor]:
    """Four gradients `[K, P]`: each bin's share of them, added up along the axis that they do not belong to."""
    assert features is not None, "the map is kept for this gradient"
    rois, channels, *bins = grad.shape
    slopes = torch.zeros(4, rois, *bins, device=grad.device)
    if grad.numel():
        features = features.contiguous(memory_format=torch.channels_last)
        with torch.cuda.device_of(features):
            kernel[rois * bins[0], triton.cdiv(bins[1], ROW_OF_BINS)](
                *(features, grad, *lattice, slopes, rois, channels, *features.shape[2:], *bins),
                **{"BINS": ROW_OF_BINS, "CHANNELS": min(32, max(triton.next_power_of_2(channels), 16)), "OFFSET": _offset(features, bins)},
                **{"num_warps": 1, "maxnreg": 255, "enable_fp_fusion": True, **options},
            )
    return [slopes[0].sum(2), slopes[1].sum(2), slopes[2].sum(1), slopes[3].sum(1)]


def _dense(axis: Axis | Bounds) -> list[Tensor]:
    return [t.contiguous() for t in axis]


def _offset(features: Tensor, bins: Sequence[int]) -> tl.dtype:
    """Width of an offset within one image or one RoI; what comes before these always counts in 64 bits."""
    _, channels, height, width = features.shape
    return tl.int64 if channels * max(height * width, bins[0] * bins[1]) >= 2**31 else tl.int32
