"""The region that a RoI operator samples, compared with the RoI. Needs no training.

Coordinates are those of `ops/geometry.py`. The region is computed from the operator's own sampling
lattice. Cell `i` of a feature map holds the value at the cell's centre, so a sample at index `i` lies at
`i + 0.5` cells. Each sample represents one step of the lattice, half a step on either side. The bins of a
RoI therefore cover

    [first + 0.5 - step / 2, last + 0.5 + step / 2]    in cells,

from the first sample of the first bin to the last sample of the last bin. For quantized bins, whose samples
are whole cells, this is the range of cells. For RoIAlign it is the RoI itself. Without `half_pixel` it is the
RoI shifted by half a cell. PrRoIPool integrates between bounds, which are the region. A sample outside the
map that is clamped to the outermost cell keeps its own position.

Bilinear interpolation also takes values from the cells around a sample. `SampledRegion.cells` includes these,
`SampledRegion.extent` does not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from roi_quantization import ops
from roi_quantization.detection.common.errors import InputError
from roi_quantization.ops.geometry import IntegralRule, LatticeRule

Operator = Callable[..., Tensor]
SIZES = {"all": (0.0, torch.inf), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, torch.inf)}
"""COCO's sizes of a box, by its area in pixels."""


class AxisBins(NamedTuple):
    """The `P` bins of `L` RoIs along one axis: `[L, P]`, float64, in cells. A bin without samples has NaN and count 0."""

    low: Tensor
    high: Tensor
    first: Tensor
    """Position of the first sample. The others follow at distances of `step`."""
    step: Tensor
    count: Tensor
    """int64, number of samples. 0 for PrRoIPool, which has none."""


@dataclass(frozen=True)
class SampledRegion:
    """What an operator samples for each of `L` RoIs."""

    x: AxisBins
    y: AxisBins
    extent: Tensor
    """float64 `[L, 4]`, `(x1, y1, x2, y2)` in pixels. NaN where there is no sample."""
    cells: Tensor
    """int64 `[L, 4]`: first column, first row, end of the columns, end of the rows, of the cells that the output depends on."""


@dataclass(frozen=True)
class Misalignment:
    """How the sampled region differs from each of `L` RoIs. float64."""

    lost: Tensor
    """`[L]`, area of the RoI outside the sampled region, as a share of the RoI's area."""
    gained: Tensor
    """`[L]`, area of the sampled region outside the RoI, as a share of the RoI's area."""
    shift: Tensor
    """`[L, 2]`, from the RoI's centre to the region's centre, (right, down), in pixels. NaN where there is no sample."""
    iou: Tensor
    """`[L]`, intersection over union of RoI and sampled region."""
    bin_iou: Tensor
    """`[L]`, mean over the bins of the IoU between the bin's part of the RoI and what the bin samples. Unlike
    `iou` it is lowered by bins that overlap or that sample their neighbour's part."""


def lattice_rule(operator: Operator) -> LatticeRule | None:
    """Return the rule of an operator's sampling lattice, None for PrRoIPool, which has no lattice.

    Args:
        operator: a function of `ops`, or a `functools.partial` of one, as `configs/roi/*.yaml` instantiate to.

    Raises:
        TypeError: an operator that is not of this project.
    """
    function, knobs = (operator.func, operator.keywords) if isinstance(operator, partial) else (operator, {})
    if function is ops.prroi_pool:
        return None
    if function is ops.lattice_pool:
        return LatticeRule(**{knob: value for knob, value in knobs.items() if knob != "reduce"})
    raise TypeError(
        f"{operator!r}: where this operator samples is not known. Choose one of configs/roi: ops.lattice_pool or ops.prroi_pool."
    )


def reduction(operator: Operator) -> str:
    """Return how an operator reduces the samples of a bin, `mean` or `max`."""
    return operator.keywords.get("reduce", "mean") if isinstance(operator, partial) else "mean"


def is_supported(operator: Operator) -> bool:
    """Return whether `lattice_rule` knows where the operator samples."""
    function = operator.func if isinstance(operator, partial) else operator
    return function in (ops.lattice_pool, ops.prroi_pool)


def feature_map_size(image_size: Sequence[int], stride: int) -> tuple[int, int]:
    """Return (height, width) of the feature map in cells. The detector pads images to multiples of the stride."""
    return -(-image_size[0] // stride), -(-image_size[1] // stride)


def sampled_region(operator: Operator, boxes: Tensor, image_size: Sequence[int], stride: int, output_size: int = 7) -> SampledRegion:
    """Return what `operator` samples for each of `boxes`.

    Args:
        operator: see `lattice_rule`.
        boxes: `[L, 4]`, `(x1, y1, x2, y2)` in pixels.
        image_size: (height, width) in pixels.
        stride: pixels per cell.
        output_size: bins per side.

    Raises:
        TypeError: an operator that is not of this project.
    """
    height, width = feature_map_size(image_size, stride)
    boxes = boxes.detach().float()  # the operators compute coordinates in float32
    x, x_cells = _axis_bins(operator, boxes[:, 0], boxes[:, 2], 1 / stride, output_size, width)
    y, y_cells = _axis_bins(operator, boxes[:, 1], boxes[:, 3], 1 / stride, output_size, height)
    extent = torch.stack([_nanmin(x.low), _nanmin(y.low), -_nanmin(-x.high), -_nanmin(-y.high)], 1) * stride
    extent[extent.isnan().any(1)] = torch.nan  # a bin needs samples along both axes
    return SampledRegion(x, y, extent, torch.stack([x_cells[0], y_cells[0], x_cells[1], y_cells[1]], 1))


def sampled_bins(operator: Operator, low: Tensor, high: Tensor, output_size: int = 7) -> AxisBins:
    """Return the bins along one axis of RoIs `[low, high]`, both `[L]` in cells, on a map that ends nowhere near them."""
    return _axis_bins(operator, low.float(), high.float(), 1.0, output_size, size=2**20)[0]


def misalignment(operator: Operator, boxes: Tensor, image_size: Sequence[int], stride: int, output_size: int = 7) -> Misalignment:
    """Compare what `operator` samples with `boxes`. Arguments as for `sampled_region`.

    Raises:
        TypeError: an operator that is not of this project.
        ValueError: a box without area.
    """
    empty = ~((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    if empty.any():
        k = int(empty.nonzero()[0])
        raise InputError(f"Box {k} is {boxes[k].tolist()}: expected x1 < x2 and y1 < y2. A box without area has no misalignment.")
    region = sampled_region(operator, boxes, image_size, stride, output_size)
    boxes, extent = boxes.detach().double(), region.extent
    area, common, region_area = box_areas(boxes, extent)
    shift = (extent[:, :2] + extent[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2
    bins = _bin_boxes(region.x.low, region.y.low, region.x.high, region.y.high) * stride
    bin_area, bin_common, bin_region_area = box_areas(_even_bins(boxes, output_size), bins)
    return Misalignment(
        lost=1 - common / area,
        gained=(region_area - common) / area,
        shift=shift,
        iou=common / (area + region_area - common),
        bin_iou=(bin_common / (bin_area + bin_region_area - bin_common)).mean((1, 2)),
    )


def dead_zone(operator: Operator, boxes: Tensor, image_size: Sequence[int], stride: int, output_size: int = 7, steps: int = 16) -> Tensor:
    """Return how far each box can be moved without any change of the sampled region. No regression can correct such a move.

    Args:
        operator, boxes, image_size, stride, output_size: see `sampled_region`.
        steps: moves are tried in so many steps per cell, up to one cell in each direction.

    Returns:
        `[L, 2]` in pixels: left and right together, up and down together. 0 for an operator whose region follows every move.
    """
    boxes, step, size = boxes.detach().float(), stride / steps, feature_map_size(image_size, stride)[::-1]
    zone = torch.zeros(len(boxes), 2, dtype=torch.float64)
    for axis in (0, 1):
        low, high = boxes[:, axis], boxes[:, axis + 2]
        here = _axis_bins(operator, low, high, 1 / stride, output_size, size[axis])[0]
        for direction in (-1, 1):
            same = torch.ones(len(boxes), dtype=torch.bool)
            for k in range(steps):
                move = direction * (k + 0.5) * step
                there = _axis_bins(operator, low + move, high + move, 1 / stride, output_size, size[axis])[0]
                same &= ((there.low == here.low) | here.low.isnan()).all(1) & ((there.high == here.high) | here.high.isnan()).all(1)
                zone[:, axis] += same * step
    return zone


def summarize(
    operators: Mapping[str, Operator],
    boxes: Iterable[tuple[Tensor, Sequence[int]]],
    strides: Sequence[int] = (16, 32),
    output_size: int = 7,
    most: int = 20_000,
) -> list[dict[str, str | int | float]]:
    """Average the misalignment over many boxes, for each stride, box size and operator.

    Args:
        operators: by name.
        boxes: for each image its boxes, `[L, 4]` in its pixels, and its (height, width).
        strides: pixels per cell.
        output_size: bins per side.
        most: a fixed random sample of so many boxes is used where there are more.

    Returns:
        A row per stride, size and operator: `operator`, `stride`, `size` (one of `SIZES`, left out where it has no boxes), `boxes` (their
        number), and the means of `iou`, `bin_iou`, `lost` and `gained` (percent of the box), `shift_x` and `shift_y` (pixels, signed),
        `distance` between the centres (pixels) and `dead_zone` (pixels, mean over the axes).
    """
    by_size: dict[tuple[int, ...], list[Tensor]] = {}
    for some, image_size in boxes:
        by_size.setdefault(tuple(image_size), []).append(some)
    together = {
        image_size: torch.cat(several) for image_size, several in by_size.items()
    }  # images of one size in one call, which is faster
    kept = _random_subset(sum(len(some) for some in together.values()), most).split([len(some) for some in together.values()])
    chosen_boxes = ((some[keep], image_size) for (image_size, some), keep in zip(together.items(), kept, strict=True))
    chunks = [(chunk, image_size) for some, image_size in chosen_boxes for chunk in some.split(4096) if len(chunk)]
    area = torch.cat([(chunk[:, 2:] - chunk[:, :2]).double().prod(1) for chunk, _ in chunks]) if chunks else torch.zeros(0)
    rows = []
    for stride in strides:
        found = {
            name: [tuple(measure(operator, *chunk, stride, output_size) for measure in (misalignment, dead_zone)) for chunk in chunks]
            for name, operator in operators.items()
        }
        for size, (least, limit) in SIZES.items():
            chosen = (area >= least) & (area < limit)
            if chosen.any():
                of_size = {"stride": stride, "size": size, "boxes": int(chosen.sum())}
                rows += [{"operator": name, **of_size, **_means(several, chosen)} for name, several in found.items()]
    return rows


def format_summary(rows: Sequence[Mapping[str, str | int | float]]) -> str:
    """Format the rows of `summarize` as a table of at most 100 columns."""
    head = ("stride", "size", "boxes", "operator", "IoU", "bins", "lost %", "gained %", "right", "down", "distance", "dead zone")
    form = "{:>6}  {:<7}{:>6}  {:<14}{:>6}{:>7}{:>8}{:>9}{:>7}{:>7}{:>9}{:>10}"
    lines = [form.format(*head)]
    for row in rows:
        numbers = (f"{row['iou']:.3f}", f"{row['bin_iou']:.3f}", f"{row['lost']:.1f}", f"{row['gained']:.1f}")
        shifts = (f"{round(row[name], 1) + 0.0:+.1f}" for name in ("shift_x", "shift_y"))
        lines.append(
            form.format(
                row["stride"],
                row["size"],
                row["boxes"],
                row["operator"],
                *numbers,
                *shifts,
                f"{row['distance']:.1f}",
                f"{row['dead_zone']:.1f}",
            )
        )
    return "\n".join(lines)


def _axis_bins(operator: Operator, low: Tensor, high: Tensor, scale: float, bins: int, size: int) -> tuple[AxisBins, tuple[Tensor, Tensor]]:
    """Return the bins along an axis of `size` cells, and the first cell and the end of the cells that the output depends on."""
    rule = lattice_rule(operator)
    if rule is None:
        half_pixel = operator.keywords.get("half_pixel", False) if isinstance(operator, partial) else False
        bounds = IntegralRule(half_pixel).axis(low, high, scale, bins, size)
        near, far = bounds.low.double(), bounds.high.double()
        nothing = torch.full_like(near, torch.nan)
        span = AxisBins(near + 0.5, far + 0.5, nothing, nothing, torch.zeros_like(near, dtype=torch.int64))
    else:
        axis = rule.axis(low, high, scale, bins, size)
        visited = axis.visited > 0
        near = axis.first.double().masked_fill(~visited, torch.nan)
        step = axis.step.double()
        far = near + (axis.visited - 1) * step
        span = AxisBins(near + 0.5 - step / 2, far + 0.5 + step / 2, near + 0.5, step, axis.visited.long())
    first, last = _nanmin(near).clamp(0, size - 1).floor(), (-_nanmin(-far)).clamp(0, size - 1).ceil()
    nowhere = first.isnan()
    return span, (first.masked_fill(nowhere, 0).long(), (last + 1).masked_fill(nowhere, 0).long())


def box_areas(boxes: Tensor, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the areas of the boxes, of their intersections with the regions, and of the regions: `[..., 4]` -> `[...]`."""
    area, region_area = (boxes[..., 2:] - boxes[..., :2]).prod(-1), (regions[..., 2:] - regions[..., :2]).prod(-1)
    sides = torch.minimum(boxes[..., 2:], regions[..., 2:]) - torch.maximum(boxes[..., :2], regions[..., :2])
    return area, sides.clamp(min=0).prod(-1).nan_to_num(0.0), region_area.nan_to_num(0.0)


def _even_bins(boxes: Tensor, bins: int) -> Tensor:
    """Divide boxes into equal bins: `[L, 4]` -> `[L, bins, bins, 4]`."""
    edges = boxes[:, None, :2] + (boxes[:, None, 2:] - boxes[:, None, :2]) * torch.arange(bins + 1, dtype=boxes.dtype)[:, None] / bins
    x, y = edges[..., 0], edges[..., 1]
    return _bin_boxes(x[:, :-1], y[:, :-1], x[:, 1:], y[:, 1:])


def _bin_boxes(left: Tensor, top: Tensor, right: Tensor, bottom: Tensor) -> Tensor:
    """Return the bins as boxes, `[L, P, P, 4]` with rows first, from their edges `[L, P]` on both axes."""
    return torch.stack(torch.broadcast_tensors(left[:, None, :], top[:, :, None], right[:, None, :], bottom[:, :, None]), -1)


def _nanmin(values: Tensor) -> Tensor:
    """Return the minimum of each row without its NaN. NaN where a row has nothing else."""
    least = values.nan_to_num(nan=torch.inf).amin(1)
    return least.masked_fill(least.isinf(), torch.nan)


def _random_subset(count: int, most: int) -> Tensor:
    keep = torch.zeros(count, dtype=torch.bool)
    keep[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]] = True
    return keep


def _means(found: Sequence[tuple[Misalignment, Tensor]], chosen: Tensor) -> dict[str, float]:
    measured = [m for m, _ in found]
    shares = {name: torch.cat([getattr(m, name) for m in measured])[chosen].mean().item() for name in ("iou", "bin_iou", "lost", "gained")}
    shift = torch.cat([m.shift for m in measured])[chosen]
    right, down = shift.nanmean(0).tolist()
    percent = {"lost": 100 * shares["lost"], "gained": 100 * shares["gained"]}
    shifts = {"shift_x": right, "shift_y": down, "distance": shift.norm(dim=1).nanmean().item()}
    return shares | percent | shifts | {"dead_zone": torch.cat([zone for _, zone in found])[chosen].mean().item()}
