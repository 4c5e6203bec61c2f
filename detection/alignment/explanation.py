"""One box, one operator, every number of the way, as text. Where operators look: `ops/geometry.py`; what they read: `misalignment.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from roi_quantization.detection.alignment.misalignment import (
    Misalignment,
    Operator,
    Reading,
    Span,
    areas,
    map_size,
    misalignment,
    read,
    rule_of,
    slack,
)
from roi_quantization.ops.geometry import IntegralRule

Rectangle = tuple[float, float, float, float]
"""`(x1, y1, x2, y2)` in cells."""


@dataclass(frozen=True)
class Explanation:
    """What `operator` does with one box."""

    name: str
    operator: Operator
    stride: int
    map_size: tuple[int, int]
    """height, width, in cells."""
    bins: int
    """a side."""
    box: Rectangle
    """The truth."""
    roi: Rectangle
    """What the operator takes for the box on the map, before it cuts it into bins."""
    extent: Rectangle
    """What is read in the end."""
    reading: Reading
    misalignment: Misalignment
    slack: tuple[float, float]
    """How far the box can be moved along x and along y before anything that is read changes, in pixels."""

    @property
    def area(self) -> float:
        """of the true box, in cells."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    @property
    def lost(self) -> float:
        """in cells."""
        return max(self.misalignment.lost.item(), 0.0) * self.area

    @property
    def gained(self) -> float:
        """in cells."""
        return max(self.misalignment.gained.item(), 0.0) * self.area


def explain(name: str, operator: Operator, box: Sequence[float], image_size: Sequence[int], stride: int, bins: int) -> Explanation:
    """`box`: `(x1, y1, x2, y2)` in pixels of an image of `image_size` (height, width), which must hold it. Else ValueError."""
    if len(box) != 4:
        raise ValueError(f"box={list(box)}: expected [x1,y1,x2,y2], two corners in pixels")
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2):
        raise ValueError(f"box={list(box)}: expected [x1,y1,x2,y2] with x1 < x2 and y1 < y2, two corners in pixels")
    if x1 < 0 or y1 < 0 or x2 > image_size[1] or y2 > image_size[0]:
        raise ValueError(f"box={list(box)} reaches out of the image, which is {image_size[1]} wide and {image_size[0]} high")
    boxes = torch.tensor([list(box)], dtype=torch.float32)
    reading = read(operator, boxes, image_size, stride, bins)
    return Explanation(
        name=name,
        operator=operator,
        stride=stride,
        map_size=map_size(image_size, stride),
        bins=bins,
        box=tuple(edge / stride for edge in box),
        roi=tuple(round(edge, 4) for edge in _roi(operator, boxes, stride)),  # float32 has no more digits to show
        extent=tuple(round(edge, 4) for edge in (reading.extent[0] / stride).tolist()),
        reading=reading,
        misalignment=misalignment(operator, boxes, image_size, stride, bins),
        slack=tuple(slack(operator, boxes, image_size, stride, bins, steps=4 * stride)[0].tolist()),
    )


def describe(operator: Operator) -> tuple[str, str]:
    """What it does to the RoI, and to bins and samples, in a few words each."""
    rule, knobs = rule_of(operator), operator.keywords if isinstance(operator, partial) else {}
    if rule is None:
        return "RoI exact", "bins exact, integral" + ("" if knobs.get("half_pixel", False) else ", no half pixel")
    roi = {"none": "RoI exact", "round": "RoI rounded", "floor": "RoI floored"}[rule.quantize_roi] + ", + 1 cell" * rule.inclusive_end
    reduce = knobs.get("reduce", "mean")
    if rule.quantize_bins != "none":
        return roi, {"cover": "bins floor to ceil", "truncate": "bin size floored"}[rule.quantize_bins] + f", {reduce} of whole cells"
    samples = f"{rule.sampling_ratio} x {rule.sampling_ratio}" if rule.sampling_ratio > 0 else "ceil(bin)"
    return roi, f"bins exact, {reduce} of {samples} bilinear" + ("" if rule.half_pixel else ", no half pixel")


def tell(e: Explanation) -> str:
    """The steps of one operator with their numbers; at most 100 columns."""
    rule = rule_of(e.operator)
    width, height = (e.roi[2] - e.roi[0]) / e.bins, (e.roi[3] - e.roi[1]) / e.bins
    lines = [
        f"{e.name}: {'; '.join(describe(e.operator))}",
        f"  RoI      {rectangle(e.roi)}",
        f"           {_against(e.roi, e.box)}",
        f"  bins     {e.bins} x {e.bins} of {width:.2f} x {height:.2f}",
    ]
    if rule is None:
        lines.append("  samples  none: the integral over each bin")
    elif rule.quantize_bins == "none":
        lines += [f"  samples  x {_places(e.reading.x)}", f"           y {_places(e.reading.y)}"]
    else:
        lines[-1] += f", in whole cells: columns {_cells(e.reading.x)}"
        lines += [f"           rows {_cells(e.reading.y)}"]
    return "\n".join(
        [
            *lines,
            f"  reads    {rectangle(e.extent)}",
            f"           {_against(e.extent, e.box)}; bin by bin {e.misalignment.bin_iou.item():.3f}",
            f"           centre {shift(e.misalignment)}",
            f"  unseen   {unseen(e)}",
        ]
    )


def table(explanations: Sequence[Explanation]) -> str:
    """One line an operator."""
    form = "{:<15}{:>7}{:>12}{:>13}{:>15}{:>11}{:>10}{:>12}"
    lines = [form.format("", "IoU", "bin by bin", "lost, cells", "gained, cells", "right, px", "down, px", "unseen, px")]
    for e in explanations:
        ious = (f"{e.misalignment.iou.item():.3f}", f"{e.misalignment.bin_iou.item():.3f}")
        shifts = (f"{round(value, 1) + 0.0:+.1f}" for value in e.misalignment.shift[0].tolist())
        lines.append(form.format(e.name, *ious, f"{e.lost:.2f}", f"{e.gained:.2f}", *shifts, f"{e.slack[0]:.0f} x {e.slack[1]:.0f}"))
    return "\n".join(lines)


def rectangle(r: Rectangle) -> str:
    width, height = r[2] - r[0], r[3] - r[1]
    return f"x {r[0]:.2f} to {r[2]:.2f}, y {r[1]:.2f} to {r[3]:.2f}: {width:.2f} x {height:.2f} = {width * height:.2f} cells"


def shift(m: Misalignment) -> str:
    """Where the centre of what is read lies, seen from the box's."""
    (right, down), parts = m.shift[0].tolist(), []
    for pixels, ahead, back in ((right, "right", "left"), (down, "down", "up")):
        if abs(pixels) >= 0.05:
            parts.append(f"{abs(pixels):.1f} px {ahead if pixels > 0 else back}")
    return ", ".join(parts) or "in place"


def unseen(e: Explanation) -> str:
    """The moves of the box that change nothing of what is read."""
    return f"moves within {e.slack[0]:.0f} px in x, {e.slack[1]:.0f} px in y" if any(e.slack) else "no move"


def places(span: Span) -> list[list[float]]:
    """Of one box: the places of the samples of each bin along an axis, in cells."""
    return [
        [first + i * step for i in range(count)]
        for first, step, count in zip(span.first[0].tolist(), span.step[0].tolist(), span.count[0].tolist(), strict=True)
    ]


def _roi(operator: Operator, boxes: Tensor, stride: int) -> Rectangle:
    """The RoI as the operator's rule makes it: where the one sample of one bin starts, and its step, is where the RoI is, and its size."""
    rule, corners = rule_of(operator), []
    for low, high in ((boxes[:, 0], boxes[:, 2]), (boxes[:, 1], boxes[:, 3])):
        if rule is None:
            bounds = IntegralRule().axis(low, high, 1 / stride, 1, 0)
            corners.append((bounds.low.item(), bounds.high.item()))
        else:
            whole = replace(rule, quantize_bins="none", sampling_ratio=1, sample_offset=0.0, border=torch.inf)
            axis = whole.axis(low, high, 1 / stride, 1, size=1)
            start = axis.first.item() + (0.5 if rule.half_pixel else 0.0)
            corners.append((start, start + axis.step.item()))
    (x1, x2), (y1, y2) = corners
    return x1, y1, x2, y2


def _against(r: Rectangle, box: Rectangle) -> str:
    area, common, other = (value.item() for value in areas(torch.tensor(box).double(), torch.tensor(r).double()))
    lost, gained = max(area - common, 0.0), max(other - common, 0.0)
    shares = f"lost {lost:.2f} cells ({lost / area:.1%}), gained {gained:.2f} ({gained / area:.1%})"
    return f"{shares}; IoU with the box {common / (area + gained):.3f}"


def _cells(span: Span) -> str:
    """The first and last cell of each bin."""
    ranges = zip(span.low[0].tolist(), span.high[0].tolist(), strict=True)
    return ", ".join("none" if low != low else f"{low:.0f}-{high - 1:.0f}" if high - low > 1 else f"{low:.0f}" for low, high in ranges)


def _places(span: Span) -> str:
    """The samples, bin by bin; of many bins the first and the last."""
    bins = [" ".join(f"{place:.2f}" for place in of_bin) or "none" for of_bin in places(span)]
    return " | ".join(bins if len(" | ".join(bins)) <= 85 else [bins[0], "...", bins[-1]])
