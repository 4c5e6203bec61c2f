"""Where every operator of the family looks: boxes in pixels -> lattices of samples in cells. It defines all rounding of the project.

On a GPU one kernel computes the same (`ops/cuda/geometry.py`); a test holds it to the bits of this file, for every rule.

Coordinates, stated once. A box `(x1, y1, x2, y2)` is in image pixels and continuous: it covers the area between its edges. On the feature
map, cell `i` covers `[i, i + 1)` and its centre is `i + 0.5`; the projection of an edge is `spatial_scale * x`. Interpolation works in
*index* coordinates, where the value of cell `i` sits at `i`: the right position for a point `x` is `x - 0.5` (`half_pixel=True`,
torchvision's `aligned=True`); `half_pixel=False` forgets the 0.5, as Caffe2, MNC and the first RoIAlign did.

A bin is a lattice: along each axis a first position, a step and a number of samples. RoIAlign's bin is `g` samples `b / g` apart. RoIPool's
is the integer cells from floor to ceil, one apart, where interpolation is the cell itself. Kernels visit lattices and know nothing of
rounding. Autograd through this file turns gradients of `first` and `step` into gradients of the boxes, straight through the rounding.

Sources: Girshick, "Fast R-CNN" (2015), and its Caffe layer; Dai et al., "Instance-aware Semantic Segmentation via Multi-task Network
Cascades" (2016) for RoIWarp; He et al., "Mask R-CNN" (2017), section 3, for RoIAlign; Jiang et al., "IoU-Net" (2018), equation 5, for
PrRoIPool.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

LARGEST_KNOB = 2**28
"""Of `min_extent`, `sample_offset` and `border`, in cells, samples: a bin's samples are numbered in 32 bits."""

MOST_SAMPLES_TESTED = 16
"""Up to so many samples per bin along each axis, each is tested for being on the map."""


class Axis(NamedTuple):
    """The samples of `P` bins of `K` RoIs along one axis, each `[K, P]`.

    Sample `i` of a bin is at `first + i * step`, in index coordinates. `visited` samples are on the map; a kernel clamps their positions to
    `[0, size - 1]`. `total` also counts the samples off the map, which have the value 0.
    """

    first: Tensor
    step: Tensor
    visited: Tensor  # int32
    total: Tensor  # floating point, because it has no limit: the divisor of a mean


class Bounds(NamedTuple):
    """The edges of `P` bins of `K` RoIs along one axis, each `[K, P]`, in index coordinates: what an integral needs."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class LatticeRule:
    """The knobs that tell the operators of the family apart; see `ops.lattice_pool` for what each does.

    Raises:
        ValueError: a choice that is not one of a knob's, a `sampling_ratio` that is no whole number, or another knob that is no number or
            out of its range.
    """

    quantize_roi: Literal["none", "round", "floor"] = "none"
    inclusive_end: bool = False
    half_pixel: bool = True
    min_extent: float | None = None
    quantize_bins: Literal["none", "cover", "truncate"] = "none"
    sampling_ratio: int = 2
    sample_offset: float = 0.5
    border: float = 1.0

    def __post_init__(self) -> None:
        for knob, choices in (("quantize_roi", ("none", "round", "floor")), ("quantize_bins", ("none", "cover", "truncate"))):
            if getattr(self, knob) not in choices:
                raise ValueError(f"{knob}={getattr(self, knob)!r}: expected one of {', '.join(choices)}")
        if not _is_whole(self.sampling_ratio):
            raise ValueError(
                f"sampling_ratio={self.sampling_ratio!r}: expected a whole number of samples per bin along each axis, one number, or 0 for "
                "an adaptive one"
            )
        object.__setattr__(self, "sampling_ratio", int(self.sampling_ratio))  # an operator of PyTorch takes no 2.0 for an integer
        for knob, low in (("sample_offset", -LARGEST_KNOB), ("border", 0), ("min_extent", 0)):
            value = getattr(self, knob)
            if not (value is None and knob == "min_extent") and not _is_between(low, value, LARGEST_KNOB):
                raise ValueError(f"{knob}={value!r}: expected a number from {low} to {LARGEST_KNOB}")

    @property
    def has_box_gradient(self) -> bool:
        """Whether the output changes with the boxes other than in steps."""
        return self.quantize_bins == "none"

    @property
    def smallest_extent(self) -> float | None:
        """Of a RoI, in cells: `min_extent`, or torchvision's where it is None."""
        return self.min_extent if self.min_extent is not None else (None if self.half_pixel else 1.0)

    @property
    def tests_each_sample(self) -> bool:
        """Whether a bin has so few samples that each is tested for being on the map."""
        return 0 < self.sampling_ratio <= MOST_SAMPLES_TESTED

    def axis(self, x1: Tensor, x2: Tensor, spatial_scale: float, bins: int, size: int) -> Axis:
        """Place the bins of each box on one axis of the map.

        Args:
            x1, x2: `[K]` edges of the boxes on this axis, in pixels. A box with a NaN has one sample in each bin, at NaN.
            spatial_scale: cells per pixel.
            bins: `P`, of a RoI along this axis.
            size: cells of the map along this axis.

        Returns:
            The lattice of each bin, `[K, P]`. Differentiable in `x1` and `x2` where bins are not quantized.
        """
        start = self._project(x1, spatial_scale)
        extent = self._project(x2, spatial_scale) - start + (1 if self.inclusive_end else 0)
        if self.smallest_extent is not None:
            extent = extent.clamp(min=self.smallest_extent)
        axis = self._sample(start, extent, bins, size) if self.quantize_bins == "none" else self._cells(start, extent, bins, size)
        return _propagate_nan(axis)

    def most_samples(self, size: int) -> int:
        """No bin visits more samples than this along an axis of `size` cells."""
        if self.quantize_bins != "none":
            return size
        if self.sampling_ratio > 0:
            return self.sampling_ratio
        return 2 * size - 1 + math.ceil(4 * self.border)  # adaptive samples are more than half a cell apart

    def _project(self, x: Tensor, spatial_scale: float) -> Tensor:
        # The half pixel is taken off here, before the extent is, because torchvision does: `(b - 0.5) - (a - 0.5)` and `b - a` can differ
        # in the last bit, and the adaptive `ceil(extent / P)` would notice.
        edge = x * spatial_scale
        if self.quantize_roi != "none":
            rounded = edge.floor() if self.quantize_roi == "floor" else round_half_away(edge)
            edge = straight_through(rounded, edge)
        return edge - 0.5 if self.half_pixel and self.quantize_bins == "none" else edge

    def _sample(self, start: Tensor, extent: Tensor, bins: int, size: int) -> Axis:
        bin_size = divide(extent, bins)[:, None]
        ratio = bin_size.detach().ceil().clamp(min=0) if self.sampling_ratio <= 0 else torch.full_like(bin_size, self.sampling_ratio)
        bin_start = start[:, None] + _indices(bins, start) * bin_size
        total = ratio.expand_as(bin_start)
        with torch.no_grad():
            skipped, visited = self._visited(bin_start, bin_size, ratio, size)
        first = self._position(bin_start, bin_size, ratio, skipped)
        return Axis(first, divide(bin_size, ratio.clamp(min=1)).expand_as(first), visited, total)

    def _position(self, bin_start: Tensor, bin_size: Tensor, ratio: Tensor, i: Tensor) -> Tensor:
        """Where sample `i` of a bin lies, to the last bit: torchvision's order of operations, which decides what lies on the border."""
        return bin_start + divide((i + self.sample_offset) * bin_size, ratio.clamp(min=1))

    def _visited(self, bin_start: Tensor, bin_size: Tensor, ratio: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """How many samples a bin has before its first one on the map, and how many on the map, each `[K, P]`.

        Samples more than `border` cells beyond the outermost cell centres are worth 0 and need no visit. It is what keeps an adaptive
        lattice over a huge box finite.
        """
        low, high = -self.border, size - 1 + self.border
        if self.tests_each_sample:
            i = torch.arange(self.sampling_ratio, dtype=bin_start.dtype, device=bin_start.device)
            at = self._position(bin_start[..., None], bin_size[..., None], ratio[..., None], i)
            on_map = (at >= low) & (at <= high)  # neighbours, because positions are in order
            visited = on_map.sum(-1, dtype=torch.int32)
            return on_map.int().argmax(-1).to(at.dtype), visited
        near, far = torch.where(bin_size < 0, high, low), torch.where(bin_size < 0, low, high)

        def index(
            edge: Tensor,
        ) -> Tensor:  # NaN, 0 / 0: a bin without extent that lies just on the border, where all its samples are visited
            return divide((edge - bin_start) * ratio, bin_size) - self.sample_offset

        skipped = index(near).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).ceil().clamp(min=0).minimum(ratio)
        last = index(far).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).floor().clamp(min=-1).minimum(ratio - 1)
        # The quotients may miss by one sample; the position of the two samples on either side of each edge decides.
        i = torch.stack([skipped - 1, skipped, last, last + 1], -1)
        at = self._position(bin_start[..., None], bin_size[..., None], ratio[..., None], i)
        on_map = (at >= low) & (at <= high)
        before, first, end, after = on_map.unbind(-1)
        skipped = (skipped - (before & (skipped > 0)).to(at.dtype) + (~first & (skipped < ratio)).to(at.dtype)).clamp(min=0)
        last = last - (~end & (last >= 0)).to(at.dtype) + (after & (last + 1 < ratio)).to(at.dtype)
        most = self.most_samples(size)  # binds only where float32 has no digits to count with
        return skipped, (last - skipped + 1).clamp(min=0, max=most).int()

    def _cells(self, start: Tensor, extent: Tensor, bins: int, size: int) -> Axis:
        # The whole cell that a bin starts from is added after the floor, as Caffe does with its rounded RoI: in float32
        # `floor(a + p * b)` and `a + floor(p * b)` are not the same.
        whole = start.detach().floor()[:, None]
        rest = start.detach()[:, None] - whole
        bin_size = divide(extent.detach()[:, None], bins)
        index = _indices(bins, start)
        if self.quantize_bins == "cover":
            low = (rest + index * bin_size).floor()
            high = (rest + (index + 1) * bin_size).ceil()
        else:
            # The sources are silent on a RoI of fewer cells than bins, where the size would be 0: a bin has one cell at least.
            cells = bin_size.floor().clamp(min=1)
            low, high = index * cells, (index + 1) * cells
        low, high = (low + whole).clamp(0, size), (high + whole).clamp(0, size)
        count = (high - low).clamp(min=0)
        return Axis(low, torch.ones_like(low), count.int(), count)


@dataclass(frozen=True)
class IntegralRule:
    """PrRoIPool's: nothing is quantized and nothing sampled."""

    half_pixel: bool = False
    has_box_gradient: ClassVar[bool] = True

    def axis(self, x1: Tensor, x2: Tensor, spatial_scale: float, bins: int, size: int) -> Bounds:
        """Edges of `bins` bins a RoI, whatever the `size` of the axis. `x1, x2`: `[K]` in pixels; a reversed box has no extent."""
        start = x1 * spatial_scale - (0.5 if self.half_pixel else 0.0)
        bin_size = divide(((x2 - x1) * spatial_scale).clamp(min=0)[:, None], bins)
        low = start[:, None] + _indices(bins, start) * bin_size
        return Bounds(low, low + bin_size)


def smallest_winners_dtype(samples: int) -> torch.dtype:
    """The narrowest integers that number so many samples of a bin, and -1."""
    return torch.int8 if samples <= 2**7 - 1 else torch.int16 if samples <= 2**15 - 1 else torch.int32


def empty_planes(box: Tensor, planes: int, rois: int, bins: int) -> Tensor:
    """Memory `[planes, K, P]` for lattices placed by a kernel, float32.

    Each plane starts at a multiple of 16 bytes for every number of boxes: Triton compiles a kernel for how its pointers are aligned.
    Planes lie four times their size apart. Padded to the next four boxes they would be contiguous for every fourth number of boxes, which
    torch.export and torch.compile would fix. Three planes take 36 bytes a bin and side in the place of 12, little beside the output.
    """
    return box.new_empty_strided((planes, rois, bins), (4 * rois * bins, bins, 1), dtype=torch.float32)


def round_half_away(x: Tensor) -> Tensor:
    """Round to the nearest integer, halves away from zero, as C's `round` does (`torch.round` takes halves to even)."""
    size = x.abs()  # torch.trunc would be shorter, and takes milliseconds where it waits for MKL's threads
    whole = size.floor()
    return (whole + (size - whole >= 0.5)).copysign(x)


def divide(a: Tensor, b: Tensor | int) -> Tensor:
    """`a / b`, correctly rounded on every device: a `floor` or a `ceil` after it would notice the last bit.

    A GPU's division of float32 may miss that bit: by a number it is a product with the reciprocal, and compiled it is approximate.
    """
    return divide_in_double(a, b) if a.is_cuda else a / b


def divide_in_double(a: Tensor, b: Tensor | int) -> Tensor:
    """The same by way of float64, which has more than twice the digits of float32, so that rounding twice is rounding once."""
    b = b if isinstance(b, Tensor) else a.new_full((), b, dtype=torch.float64)
    return (a.double() / b).to(a.dtype)


def straight_through(quantized: Tensor, x: Tensor) -> Tensor:
    """The value of `quantized` with the gradient of `x`."""
    return quantized.detach() + (x - x.detach())


def is_number(value: Any) -> bool:
    """Whether a value is no tensor and no array but of 0 dimensions: an operator of PyTorch takes neither for a number."""
    return not (isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.ndim))


def _indices(bins: int, like: Tensor) -> Tensor:
    return torch.arange(bins, dtype=like.dtype, device=like.device)


def _is_whole(value: Any) -> bool:
    try:
        return bool(value == int(value))
    except (TypeError, ValueError, OverflowError):  # another type, NaN, infinite
        return False


def _is_between(low: float, value: Any, high: float) -> bool:
    try:
        return is_number(value) and bool(low <= value <= high)
    except TypeError:
        return False


def _propagate_nan(axis: Axis) -> Axis:
    """Give a NaN box one sample in each bin, at NaN: its output is NaN on every path, and nothing is read out of bounds."""
    bad = axis.first.isnan() | axis.step.isnan()
    return Axis(
        torch.where(bad, torch.nan, axis.first),
        torch.where(bad, 0.0, axis.step),
        torch.where(bad, 1, axis.visited),
        torch.where(bad, 1.0, axis.total),
    )
