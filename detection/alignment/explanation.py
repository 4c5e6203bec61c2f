"""Every step of one operator on one box, as text. The sampling rules are in `ops/geometry.py`, the sampled region in `misalignment.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from roi_quantization.detection.alignment.misalignment import (
    AxisBins,
    Misalignment,
    Operator,
    SampledRegion,
    box_areas,
    dead_zone,
    feature_map_size,
    lattice_rule,
    misalignment,
    reduction,
    sampled_region,
)
from roi_quantization.detection.common.errors import InputError
from roi_quantization.ops.geometry import LARGEST_KNOB, IntegralRule

Rectangle = tuple[float, float, float, float]
"""`(x1, y1, x2, y2)` in cells."""


@dataclass(frozen=True)
class Explanation:
    """What `operator` does with one box. Lengths are in cells unless another unit is named."""

    name: str
    operator: Operator
    stride: int
    feature_map_size: tuple[int, int]
    """(height, width)."""
    bins: int
    """Per side."""
    box: Rectangle
    """The box itself, without rounding."""
    roi: Rectangle
    """The operator's RoI on the feature map, rounded or not, before it is divided into bins."""
    extent: Rectangle
    """The sampled region."""
    region: SampledRegion
    misalignment: Misalignment
    dead_zone: tuple[float, float]
    """Pixels that the box can be moved along x and along y without any change of the sampled region."""

    @property
    def area(self) -> float:
        """Area of the box."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    @property
    def lost(self) -> float:
        """Area of the box outside the sampled region."""
        return max(self.misalignment.lost.item(), 0.0) * self.area

    @property
    def gained(self) -> float:
        """Area of the sampled region outside the box."""
        return max(self.misalignment.gained.item(), 0.0) * self.area


def explain(name: str, operator: Operator, box: Sequence[float], image_size: Sequence[int], stride: int, bins: int) -> Explanation:
    """Compute every step of `operator` on one box.

    Args:
        name: of the operator.
        operator: see `misalignment.lattice_rule`.
        box: `(x1, y1, x2, y2)` in pixels.
        image_size: (height, width) in pixels.
        stride: pixels per cell.
        bins: per side.

    Raises:
        ValueError: the box has no area or reaches out of the image.
    """
    if len(box) != 4:
        raise InputError(f"box={list(box)}: expected [x1,y1,x2,y2], two corners in pixels")
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2):
        raise InputError(f"box={list(box)}: expected [x1,y1,x2,y2] with x1 < x2 and y1 < y2, two corners in pixels")
    if x1 < 0 or y1 < 0 or x2 > image_size[1] or y2 > image_size[0]:
        raise InputError(f"box={list(box)} reaches out of the image, which is {image_size[1]} wide and {image_size[0]} high")
    boxes = torch.tensor([list(box)], dtype=torch.float32)
    region = sampled_region(operator, boxes, image_size, stride, bins)
    return Explanation(
        name=name,
        operator=operator,
        stride=stride,
        feature_map_size=feature_map_size(image_size, stride),
        bins=bins,
        box=tuple(edge / stride for edge in box),
        roi=tuple(round(edge, 4) for edge in _roi(operator, boxes, stride)),  # float32 has no more digits to show
        extent=tuple(round(edge, 4) for edge in (region.extent[0] / stride).tolist()),
        region=region,
        misalignment=misalignment(operator, boxes, image_size, stride, bins),
        dead_zone=tuple(dead_zone(operator, boxes, image_size, stride, bins, steps=4 * stride)[0].tolist()),
    )


def describe(operator: Operator) -> tuple[str, str]:
    """Describe how the operator treats the RoI, and how it treats bins and samples."""
    rule, knobs = lattice_rule(operator), operator.keywords if isinstance(operator, partial) else {}
    if rule is None:
        return "RoI exact", "bins exact, integral" + ("" if knobs.get("half_pixel", False) else ", no half pixel")
    roi = {"none": "RoI exact", "round": "RoI rounded", "floor": "RoI floored"}[rule.quantize_roi] + ", + 1 cell" * rule.inclusive_end
    reduce = reduction(operator)
    if rule.quantize_bins != "none":
        return roi, {"cover": "bins floor to ceil", "truncate": "bin size floored"}[rule.quantize_bins] + f", {reduce} of whole cells"
    samples = f"{rule.sampling_ratio} x {rule.sampling_ratio}" if rule.sampling_ratio > 0 else "ceil(bin)"
    return roi, f"bins exact, {reduce} of {samples} bilinear" + ("" if rule.half_pixel else ", no half pixel")


def format_steps(e: Explanation) -> str:
    """Format the steps of one operator with their numbers, at most 100 columns wide."""
    rule = lattice_rule(e.operator)
    width, height = (e.roi[2] - e.roi[0]) / e.bins, (e.roi[3] - e.roi[1]) / e.bins
    lines = [
        f"{e.name}: {'; '.join(describe(e.operator))}",
        f"  RoI      {format_rectangle(e.roi)}",
        f"           {_compare_with_box(e.roi, e.box)}",
        f"  bins     {e.bins} x {e.bins} of {width:.2f} x {height:.2f}",
    ]
    if rule is None:
        lines.append("  samples  none, the operator integrates over each bin")
    elif rule.quantize_bins == "none":
        lines += [f"  samples  x {_format_samples(e.region.x)}", f"           y {_format_samples(e.region.y)}"]
    else:
        lines[-1] += f", in whole cells: columns {_format_cells(e.region.x)}"
        lines += [f"           rows {_format_cells(e.region.y)}"]
    return "\n".join(
        [
            *lines,
            f"  region   {format_rectangle(e.extent)}",
            f"           {_compare_with_box(e.extent, e.box)}; bin by bin {e.misalignment.bin_iou.item():.3f}",
            f"           centre {format_shift(e.misalignment)}",
            f"  dead zone {format_dead_zone(e)}",
        ]
    )


def format_table(explanations: Sequence[Explanation]) -> str:
    """Format a table with one row per operator."""
    form = "{:<15}{:>7}{:>12}{:>13}{:>15}{:>11}{:>10}{:>15}"
    lines = [form.format("", "IoU", "bin by bin", "lost, cells", "gained, cells", "right, px", "down, px", "dead zone, px")]
    for e in explanations:
        ious = (f"{e.misalignment.iou.item():.3f}", f"{e.misalignment.bin_iou.item():.3f}")
        shifts = (f"{round(value, 1) + 0.0:+.1f}" for value in e.misalignment.shift[0].tolist())
        lines.append(
            form.format(e.name, *ious, f"{e.lost:.2f}", f"{e.gained:.2f}", *shifts, f"{e.dead_zone[0]:.0f} x {e.dead_zone[1]:.0f}")
        )
    return "\n".join(lines)


def format_rectangle(r: Rectangle) -> str:
    """Format position, size and area."""
    width, height = r[2] - r[0], r[3] - r[1]
    return f"x {r[0]:.2f} to {r[2]:.2f}, y {r[1]:.2f} to {r[3]:.2f}: {width:.2f} x {height:.2f} = {width * height:.2f} cells"


def format_shift(m: Misalignment) -> str:
    """Format the offset from the box's centre to the sampled region's."""
    (right, down), parts = m.shift[0].tolist(), []
    for pixels, ahead, back in ((right, "right", "left"), (down, "down", "up")):
        if abs(pixels) >= 0.05:
            parts.append(f"{abs(pixels):.1f} px {ahead if pixels > 0 else back}")
    return ", ".join(parts) or "in place"


def format_dead_zone(e: Explanation) -> str:
    """Format the moves of the box that leave the sampled region unchanged."""
    return f"moves within {e.dead_zone[0]:.0f} px in x, {e.dead_zone[1]:.0f} px in y" if any(e.dead_zone) else "no move"


def sample_positions(span: AxisBins) -> list[list[float]]:
    """Return the positions of one box's samples along an axis, in cells, for each bin."""
    return [
        [first + i * step for i in range(count)]
        for first, step, count in zip(span.first[0].tolist(), span.step[0].tolist(), span.count[0].tolist(), strict=True)
    ]


def _roi(operator: Operator, boxes: Tensor, stride: int) -> Rectangle:
    """Return the RoI as the operator rounds it. With one bin of one sample the lattice's start and step are the RoI's start and size."""
    rule, corners = lattice_rule(operator), []
    for low, high in ((boxes[:, 0], boxes[:, 2]), (boxes[:, 1], boxes[:, 3])):
        if rule is None:
            bounds = IntegralRule().axis(low, high, 1 / stride, 1, 0)
            corners.append((bounds.low.item(), bounds.high.item()))
        else:
            whole = replace(rule, quantize_bins="none", sampling_ratio=1, sample_offset=0.0, border=LARGEST_KNOB)
            axis = whole.axis(low, high, 1 / stride, 1, size=1)
            start = axis.first.item() + (0.5 if rule.half_pixel else 0.0)
            corners.append((start, start + axis.step.item()))
    (x1, x2), (y1, y2) = corners
    return x1, y1, x2, y2


def _compare_with_box(r: Rectangle, box: Rectangle) -> str:
    area, common, other = (value.item() for value in box_areas(torch.tensor(box).double(), torch.tensor(r).double()))
    lost, gained = max(area - common, 0.0), max(other - common, 0.0)
    shares = f"lost {lost:.2f} cells ({lost / area:.1%}), gained {gained:.2f} ({gained / area:.1%})"
    return f"{shares}; IoU with the box {common / (area + gained):.3f}"


def _format_cells(span: AxisBins) -> str:
    """Format the first and last cell of each bin."""
    ranges = zip(span.low[0].tolist(), span.high[0].tolist(), strict=True)
    return ", ".join("none" if low != low else f"{low:.0f}-{high - 1:.0f}" if high - low > 1 else f"{low:.0f}" for low, high in ranges)


def _format_samples(span: AxisBins) -> str:
    """Format the samples bin by bin, of many bins the first and the last."""
    bins = [" ".join(f"{place:.2f}" for place in of_bin) or "none" for of_bin in sample_positions(span)]
    return " | ".join(bins if len(" | ".join(bins)) <= 85 else [bins[0], "...", bins[-1]])
