"""The operators on a GPU: lattices in, Triton kernels, tensors out. The same functions as `ops/cpu/kernels.py`.

Dtypes: float32, float16, bfloat16.

Nothing here waits for the device, so CUDA graphs can capture all of it. The kernels read the map channels-last; a contiguous map is copied
once a call, which costs far less than reading its cells one channel at a time. The gradient of the features is laid out as the map is.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from roi_quantization.ops.cuda.integral import integral_forward as _integral_forward
from roi_quantization.ops.cuda.integral import integral_slopes
from roi_quantization.ops.cuda.lattice import lattice_forward as _lattice_forward
from roi_quantization.ops.cuda.lattice import lattice_slopes
from roi_quantization.ops.cuda.tiles import list_rois_by_tile, max_backward, mean_backward
from roi_quantization.ops.geometry import Axis, Bounds

# Sizes of programs: no register spills on sm_80, sm_90, sm_100 (tests/ops/compile_kernels.py)
BINS = 64  # 7 x 7 in one
MOST_BINS = 256  # a side, of the backward: a row of bins lies in shared memory
TILE = {"TILE_Y": 4, "TILE_X": 8}  # cells of a program of the backward
OPTIONS = {"enable_fp_fusion": True}
NARROW, WIDE = {"num_warps": 4, "maxnreg": 168, **OPTIONS}, {"num_warps": 8, "maxnreg": 128, **OPTIONS}


def lattice_forward(
    features: Tensor, image: Tensor, y: Axis, x: Axis, reduce: str, winners_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The mean or the largest sample of each bin, `[K, C, P, P]`; and which won, `[K * C * P * P]` (without a dtype: empty)."""
    bins = y.first.shape[1], x.first.shape[1]
    out = features.new_empty(len(image), features.shape[1], *bins)
    remembered = out.numel() if reduce == "max" and winners_dtype else 0
    winners = torch.empty(remembered, dtype=winners_dtype or torch.int8, device=features.device)
    if out.numel():
        features = features.contiguous(memory_format=torch.channels_last)
        sizes, blocks = _sizes(features, bins), _blocks(features, bins)
        with torch.cuda.device_of(features):
            _lattice_forward[_grid(out, blocks)](
                features, image, *_dense(y), *_dense(x), out, winners, *sizes, MAX=reduce == "max", REMEMBER=winners.numel() > 0, **blocks
            )
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
) -> list[Tensor] | None:
    """Write the gradient of the features to `of_features`, unless it is None; gradients of `first` and `step`, of y and then of x.

    The map itself is read for `of_lattice` alone.
    """
    grad, y, x = grad.contiguous(), Axis(*_dense(y)), Axis(*_dense(x))
    if of_features is not None:
        _gather(grad, of_features, image, y, x, reduce, winners)
    return _slopes(lattice_slopes, grad, features, (winners, image, *y, *x), MAX=reduce == "max") if of_lattice else None


def integral_forward(features: Tensor, image: Tensor, y: Bounds, x: Bounds) -> Tensor:
    """The mean of the interpolated map over each bin, `[K, C, P, P]`."""
    bins = y.low.shape[1], x.low.shape[1]
    out = features.new_empty(len(image), features.shape[1], *bins)
    if out.numel():
        features = features.contiguous(memory_format=torch.channels_last)
        blocks = _blocks(features, bins)
        with torch.cuda.device_of(features):
            _integral_forward[_grid(out, blocks)](features, image, *_dense(y), *_dense(x), out, *_sizes(features, bins), **blocks)
    return out


def integral_backward(
    grad: Tensor, features: Tensor | None, image: Tensor, y: Bounds, x: Bounds, of_features: Tensor | None, of_bounds: bool
) -> list[Tensor] | None:
    """Write the gradient of the features to `of_features`, unless it is None; gradients of `low` and `high`, of y and then of x.

    The map itself is read for `of_bounds` alone.
    """
    grad, y, x = grad.contiguous(), Bounds(*_dense(y)), Bounds(*_dense(x))
    if of_features is not None:  # edges for first and step; an integral has no count and no total, which are not read
        _gather(grad, of_features, image, Axis(*y, y.low, y.low), Axis(*x, x.low, x.low), "integral")
    return _slopes(integral_slopes, grad, features, (image, *y, *x)) if of_bounds else None


def _gather(grad: Tensor, out: Tensor, image: Tensor, y: Axis, x: Axis, reduce: str, winners: Tensor | None = None) -> None:
    """Write the gradient of the features, tile by tile; `reduce` is `mean`, `max` or `integral`."""
    if not (grad.numel() and out.numel()):
        out.zero_()
        return
    images, channels, height, width = out.shape
    tiles_x = triton.cdiv(width, TILE["TILE_X"])
    tiles = triton.cdiv(height, TILE["TILE_Y"]) * tiles_x
    lists = torch.empty(images * tiles, len(image), dtype=torch.int32, device=grad.device)
    lengths = torch.empty(images * tiles, dtype=torch.int32, device=grad.device)

    bins = grad.shape[2:]
    if max(bins) > MOST_BINS:
        raise ValueError(f"output_size: {tuple(bins)} bins; the gradient of the features on a GPU takes {MOST_BINS} a side at most")
    sizes = len(image), channels, height, width, *out.stride(), *bins, tiles_x, tiles
    pad_y, pad_x = triton.next_power_of_2(bins[0]), triton.next_power_of_2(bins[1])
    block = {
        "CHANNELS": _channels(channels, 64 if reduce == "max" else 32),
        "OFFSET": _offset(out, bins),
        "BINS_X": pad_x,
        **TILE,
        **OPTIONS,
    }
    grid = images * tiles, triton.cdiv(channels, block["CHANNELS"])
    with torch.cuda.device_of(out):
        list_rois_by_tile[grid[:1]](
            *(image, *y[:3], *x[:3], lists, lengths, len(image), height, width, *bins, tiles_x, tiles),
            **{"INTEGRAL": reduce == "integral", "ROIS": 64, "BINS_Y": pad_y, "BINS_X": pad_x, **TILE, **OPTIONS},
        )
        if reduce == "max":
            max_backward[grid](grad, winners, *y[:3], *x[:3], lists, lengths, out, *sizes, **block, BINS_Y=pad_y, num_warps=8)
        else:
            block["BINS_Y"] = max(min(pad_y, 32 // pad_x), 16 // pad_x, 1)  # in one product: 32 bins, 16 at least
            mean_backward[grid](grad, *y, *x, lists, lengths, out, *sizes, **block, INTEGRAL=reduce == "integral", num_stages=1)


def _slopes(
    kernel: triton.JITFunction, grad: Tensor, features: Tensor | None, lattice: tuple[Tensor, ...], **options: bool
) -> list[Tensor]:
    """Four gradients `[K, P]`: each bin's share of them, added up along the axis that they do not belong to."""
    assert features is not None, "the map is kept for this gradient"
    rois, bins = len(grad), grad.shape[2:]
    slopes = torch.zeros(4, rois, *bins, device=grad.device)
    if grad.numel():
        features = features.contiguous(memory_format=torch.channels_last)
        blocks = _blocks(features, bins) | {"CHANNELS": _channels(features.shape[1], 32), **NARROW, "maxnreg": 255}
        with torch.cuda.device_of(features):
            kernel[rois, triton.cdiv(bins[0] * bins[1], BINS)](
                features, grad, *lattice, slopes, *_sizes(features, bins), **options, **blocks
            )
    return [slopes[0].sum(2), slopes[1].sum(2), slopes[2].sum(1), slopes[3].sum(1)]


def _dense(axis: Axis | Bounds) -> list[Tensor]:
    return [t.contiguous() for t in axis]


def _sizes(features: Tensor, bins: Sequence[int]) -> tuple[int, ...]:
    """What a kernel has to know of a channels-last map and its bins."""
    _, channels, height, width = features.shape
    return channels, height, width, channels * height * width, channels * width, channels, *bins


def _blocks(features: Tensor, bins: Sequence[int]) -> dict[str, object]:
    """A program's share: 64 bins, and channels for 128 bytes of each cell."""
    channels = _channels(features.shape[1], 128 // features.element_size())
    return {"BINS": BINS, "CHANNELS": channels, "OFFSET": _offset(features, bins), **(WIDE if channels > 32 else NARROW)}


def _grid(out: Tensor, blocks: dict[str, object]) -> tuple[int, int, int]:
    return out.shape[0], triton.cdiv(out.shape[2] * out.shape[3], BINS), triton.cdiv(out.shape[1], blocks["CHANNELS"])


def _channels(channels: int, most: int) -> int:
    return max(min(triton.next_power_of_2(channels), most), 16)  # tensor cores want 16


def _offset(features: Tensor, bins: Sequence[int]) -> tl.dtype:
    """Width of an offset within one image or one RoI; what comes before these always counts in 64 bits."""
    _, channels, height, width = features.shape
    return tl.int64 if channels * max(height * width, bins[0] * bins[1]) >= 2**31 else tl.int32
