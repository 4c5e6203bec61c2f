"""Misalignment without training: what an operator really reads of a box, held against the box.

Coordinates: `ops/geometry.py`. What a bin reads is taken off its lattice, never computed anew. The value of cell `i` is the image's at the
cell's centre, so a sample at index `i` reads the place `i + 0.5`, whatever the operator believed; and a sample stands for one step of the
lattice, half of it to either side. So the bins of a box read

    [first + 0.5 - step / 2, last + 0.5 + step / 2]    in cells,

from the first sample of the first bin to the last sample of the last. For quantized bins, whose samples are whole cells, these are
the cells from the first to the last. For RoIAlign it is the box itself; without `half_pixel` it is the box moved by half a cell. An
integral (PrRoIPool) reads its bounds. A sample off the map that still counts as the outermost cell stands where it was asked for.

Interpolation also takes values from the cells around a sample, in and out of the box alike: `Reading.cells` has them, the extent has not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from roi_quantization import ops
from roi_quantization.ops.geometry import IntegralRule, LatticeRule

Operator = Callable[..., Tensor]
SIZES = {"all": (0.0, torch.inf), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, torch.inf)}
"""COCO's sizes of a box, by its area in pixels."""


class Span(NamedTuple):
    """What `P` bins of `L` boxes read along one axis, `[L, P]`, float64 in cells. A bin that reads nothing has NaN and count 0."""

    low: Tensor
    high: Tensor
    first: Tensor
    """The place of the first sample; the others follow `step` apart."""
    step: Tensor
    count: Tensor
    """int64; 0 for an integral too, which has no samples."""


@dataclass(frozen=True)
class Reading:
    """What an operator reads of `L` boxes."""

    x: Span
    y: Span
    extent: Tensor
    """float64 `[L, 4]` `(x1, y1, x2, y2)` in pixels; NaN where nothing is read."""
    cells: Tensor
    """int64 `[L, 4]`: first column, first row, and one past the last of each, of the cells whose values enter the output."""


@dataclass(frozen=True)
class Misalignment:
    """How what is read differs from each of `L` boxes; float64."""

    lost: Tensor
    """`[L]` area of the box that is not read, as a share of the box's area."""
    gained: Tensor
    """`[L]` area that is read and lies outside of the box, as a share of the box's area."""
    shift: Tensor
    """`[L, 2]` from the box's centre to that of what is read, (right, down), in pixels; NaN where nothing is read."""
    iou: Tensor
    """`[L]` intersection over union of the box and what is read."""
    bin_iou: Tensor
    """`[L]` the same bin by bin: of a bin's share of the box and what the bin reads; mean over the bins. It sees what `iou` does not: bins
    that overlap, or that read each other's share."""


def rule_of(operator: Operator) -> LatticeRule | None:
    """The rule that an operator's lattice follows; None for PrRoIPool, which has none. `operator`: as configs/roi/*.yaml give it."""
    function, knobs = (operator.func, operator.keywords) if isinstance(operator, partial) else (operator, {})
    if function is ops.prroi_pool:
        return None
    if function is ops.lattice_pool:
        return LatticeRule(**{knob: value for knob, value in knobs.items() if knob != "reduce"})
    raise TypeError(f"{operator!r}: where this operator looks is not known; expected one of configs/roi (ops.lattice_pool, ops.prroi_pool)")


def is_known(operator: Operator) -> bool:
    """Whether `rule_of` can tell where it looks."""
    function = operator.func if isinstance(operator, partial) else operator
    return function in (ops.lattice_pool, ops.prroi_pool)


def map_size(image_size: Sequence[int], stride: int) -> tuple[int, int]:
    """(height, width) of the map in cells: the detector pads images to multiples of the stride."""
    return -(-image_size[0] // stride), -(-image_size[1] // stride)


def read(operator: Operator, boxes: Tensor, image_size: Sequence[int], stride: int, output_size: int = 7) -> Reading:
    """What `operator` reads of `boxes`.

    Args:
        operator: as configs/roi/*.yaml give it.
        boxes: `[L, 4]` `(x1, y1, x2, y2)` in pixels.
        image_size: (height, width) in pixels.
        stride: pixels a cell.
        output_size: bins a side.

    Raises:
        TypeError: an operator of somebody else's.
    """
    height, width = map_size(image_size, stride)
    boxes = boxes.detach().float()  # what the operators compute coordinates in
    x, x_cells = _span(operator, boxes[:, 0], boxes[:, 2], 1 / stride, output_size, width)
    y, y_cells = _span(operator, boxes[:, 1], boxes[:, 3], 1 / stride, output_size, height)
    extent = torch.stack([_least(x.low), _least(y.low), -_least(-x.high), -_least(-y.high)], 1) * stride
    extent[extent.isnan().any(1)] = torch.nan  # nothing along one axis is nothing
    return Reading(x, y, extent, torch.stack([x_cells[0], y_cells[0], x_cells[1], y_cells[1]], 1))


def misalignment(operator: Operator, boxes: Tensor, image_size: Sequence[int], stride: int, output_size: int = 7) -> Misalignment:
    """How what `operator` reads differs from `boxes`. Arguments as for `read`; a box without area raises ValueError."""
    empty = ~((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    if empty.any():
        k = int(empty.nonzero()[0])
        raise ValueError(f"Box {k} is {boxes[k].tolist()}: expected x1 < x2 and y1 < y2; a box without area cannot be misread.")
    reading = read(operator, boxes, image_size, stride, output_size)
    boxes, extent = boxes.detach().double(), reading.extent
    area, common, read_area = areas(boxes, extent)
    shift = (extent[:, :2] + extent[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2
    read_by_bins = _rectangles(reading.x.low, reading.y.low, reading.x.high, reading.y.high) * stride
    bin_area, bin_common, bin_read = areas(_shares(boxes, output_size), read_by_bins)
    return Misalignment(
        lost=1 - common / area,
        gained=(read_area - common) / area,
        shift=shift,
        iou=common / (area + read_area - common),
        bin_iou=(bin_common / (bin_area + bin_read - bin_common)).mean((1, 2)),
    )


def slack(operator: Operator, boxes: Tensor, image_size: Sequence[int], stride: int, output_size: int = 7, steps: int = 16) -> Tensor:
    """How far each box can be moved before anything that is read changes: what no regression can see.

    Arguments as for `read`. Returns `[L, 2]`, in pixels: the way to the left and to the right together, and the way up and down. Found by
    moves in so many `steps` a cell, of one cell at most either way. 0 for an operator that follows every move.
    """
    boxes, step, size = boxes.detach().float(), stride / steps, map_size(image_size, stride)[::-1]
    ways = torch.zeros(len(boxes), 2, dtype=torch.float64)
    for axis in (0, 1):
        low, high = boxes[:, axis], boxes[:, axis + 2]
        here = _span(operator, low, high, 1 / stride, output_size, size[axis])[0]
        for direction in (-1, 1):
            same = torch.ones(len(boxes), dtype=torch.bool)
            for k in range(steps):
                move = direction * (k + 0.5) * step
                there = _span(operator, low + move, high + move, 1 / stride, output_size, size[axis])[0]
                same &= ((there.low == here.low) | here.low.isnan()).all(1) & ((there.high == here.high) | here.high.isnan()).all(1)
                ways[:, axis] += same * step
    return ways


def summarise(
    operators: Mapping[str, Operator],
    boxes: Iterable[tuple[Tensor, Sequence[int]]],
    strides: Sequence[int] = (16, 32),
    output_size: int = 7,
    most: int = 20_000,
) -> list[dict[str, str | int | float]]:
    """Means over many boxes: a row for each stride, size of box and operator.

    boxes: of each image, `[L, 4]` in its pixels, and its (height, width).
    most: of more boxes than this, so many drawn at random, always the same ones, stand for all.

    A row has `operator`, `stride`, `size` (one of `SIZES`; those without boxes are left out), `boxes` (how many), and the means of `iou`,
    `bin_iou`, `lost` and `gained` (percent of the box), `shift_x` and `shift_y` (pixels, signed: a bias), `distance` (of the centres,
    pixels) and `slack` (pixels, of both axes).
    """
    by_size: dict[tuple[int, ...], list[Tensor]] = {}
    for some, image_size in boxes:
        by_size.setdefault(tuple(image_size), []).append(some)
    together = {image_size: torch.cat(several) for image_size, several in by_size.items()}  # images of one size at once, which is fast
    kept = _keep(sum(len(some) for some in together.values()), most).split([len(some) for some in together.values()])
    chosen_boxes = ((some[keep], image_size) for (image_size, some), keep in zip(together.items(), kept, strict=True))
    chunks = [(chunk, image_size) for some, image_size in chosen_boxes for chunk in some.split(4096) if len(chunk)]
    area = torch.cat([(chunk[:, 2:] - chunk[:, :2]).double().prod(1) for chunk, _ in chunks]) if chunks else torch.zeros(0)
    rows = []
    for stride in strides:
        found = {
            name: [(misalignment(operator, *chunk, stride, output_size), slack(operator, *chunk, stride, output_size)) for chunk in chunks]
            for name, operator in operators.items()
        }
        for size, (least, limit) in SIZES.items():
            chosen = (area >= least) & (area < limit)
            if chosen.any():
                of_size = {"stride": stride, "size": size, "boxes": int(chosen.sum())}
                rows += [{"operator": name, **of_size, **_means(several, chosen)} for name, several in found.items()]
    return rows


def format_summary(rows: Sequence[Mapping[str, str | int | float]]) -> str:
    """The rows of `summarise` as a table of 100 columns at most."""
    head = ("stride", "size", "boxes", "operator", "IoU", "bins", "lost %", "gained %", "right", "down", "distance", "slack")
    form = "{:>6}  {:<7}{:>6}  {:<14}{:>6}{:>8}{:>8}{:>10}{:>7}{:>7}{:>10}{:>7}"
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
                f"{row['slack']:.1f}",
            )
        )
    return "\n".join(lines)


def _span(operator: Operator, low: Tensor, high: Tensor, scale: float, bins: int, size: int) -> tuple[Span, tuple[Tensor, Tensor]]:
    """What is read along an axis of `size` cells, and the cells that enter: the first, and one past the last."""
    rule = rule_of(operator)
    if rule is None:
        half_pixel = operator.keywords.get("half_pixel", False) if isinstance(operator, partial) else False
        bounds = IntegralRule(half_pixel).axis(low, high, scale, bins, size)
        near, far = bounds.low.double(), bounds.high.double()
        nothing = torch.full_like(near, torch.nan)
        span = Span(near + 0.5, far + 0.5, nothing, nothing, torch.zeros_like(near, dtype=torch.int64))
    else:
        axis = rule.axis(low, high, scale, bins, size)
        visited = axis.count > 0
        near = axis.first.double().masked_fill(~visited, torch.nan)
        step = axis.step.double()
        far = near + (axis.count - 1) * step
        span = Span(near + 0.5 - step / 2, far + 0.5 + step / 2, near + 0.5, step, axis.count.long())
    first, last = _least(near).clamp(0, size - 1).floor(), (-_least(-far)).clamp(0, size - 1).ceil()
    nowhere = first.isnan()
    return span, (first.masked_fill(nowhere, 0).long(), (last + 1).masked_fill(nowhere, 0).long())


def areas(true: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The areas of the true boxes, of what they have in common with what is read, and of what is read; all `[..., 4]` -> `[...]`."""
    area, read_area = (true[..., 2:] - true[..., :2]).prod(-1), (read[..., 2:] - read[..., :2]).prod(-1)
    common = (torch.minimum(true[..., 2:], read[..., 2:]) - torch.maximum(true[..., :2], read[..., :2])).clamp(min=0).prod(-1)
    return area, common.nan_to_num(0.0), read_area.nan_to_num(0.0)


def _shares(boxes: Tensor, bins: int) -> Tensor:
    """The boxes cut evenly: `[L, 4]` -> `[L, bins, bins, 4]`."""
    edges = boxes[:, None, :2] + (boxes[:, None, 2:] - boxes[:, None, :2]) * torch.arange(bins + 1, dtype=boxes.dtype)[:, None] / bins
    x, y = edges[..., 0], edges[..., 1]
    return _rectangles(x[:, :-1], y[:, :-1], x[:, 1:], y[:, 1:])


def _rectangles(left: Tensor, top: Tensor, right: Tensor, bottom: Tensor) -> Tensor:
    """From edges of the bins `[L, P]` on both axes to the bins, `[L, P, P, 4]`, rows of bins first."""
    return torch.stack(torch.broadcast_tensors(left[:, None, :], top[:, :, None], right[:, None, :], bottom[:, :, None]), -1)


def _least(values: Tensor) -> Tensor:
    """The least of each row, NaN left out; NaN where there is nothing else."""
    least = values.nan_to_num(nan=torch.inf).amin(1)
    return least.masked_fill(least.isinf(), torch.nan)


def _keep(count: int, most: int) -> Tensor:
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
    return shares | percent | shifts | {"slack": torch.cat([ways for _, ways in found])[chosen].mean().item()}
