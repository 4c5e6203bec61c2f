"""Draw what RoI operators do with one box. The numbers come from `explanation.py`."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil, floor

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from roi_quantization.detection.alignment.explanation import Explanation, describe, format_dead_zone, format_shift, sample_positions
from roi_quantization.detection.alignment.misalignment import AxisBins
from roi_quantization.detection.common.files import atomic_write

# Okabe and Ito's colours, which the colour-blind can tell apart; hatched differently besides, for those who print in grey.
LOST = {"facecolor": "#F0A579", "edgecolor": "#A34400", "hatch": "////"}
GAINED = {"facecolor": "#C9E8F9", "edgecolor": "#56B4E9", "hatch": "\\\\\\\\"}
KEPT = {"facecolor": "#F4F4F4", "edgecolor": "none"}
BIN = "#0072B2"
SHARED = {"facecolor": (0.0, 0.2, 0.4, 0.13), "edgecolor": "none"}
WIDTH = 3.6  # inches, of a panel
NAMES = {"pool": "RoIPool", "warp": "RoIWarp", "align": "RoIAlign", "prroi": "PrRoIPool"}
"""Configuration in `configs/roi` -> the operator's name in its paper."""


@dataclass(frozen=True)
class Photograph:
    """A photograph to draw below the grid of cells."""

    image: Tensor
    """uint8 RGB `[3, H, W]`."""
    features: Tensor
    """`[h, w]`, mean over the channels of the feature map."""
    pooled: Sequence[Tensor]
    """For each operator `[P, P]`, mean over the channels of its output."""


def draw_explanations(
    explanations: Sequence[Explanation], path: str | os.PathLike, title: str, photograph: Photograph | None = None
) -> None:
    """Draw one panel per operator: box, sampled region, bins and samples on the grid of cells, with the numbers below.

    Args:
        explanations: of the same box, one per operator.
        path: of the PNG file.
        title: of the figure.
        photograph: drawn below the grid. Adds the image, its feature map, and each operator's output.
    """
    columns = 2 if len(explanations) in (2, 4) else min(3, len(explanations))
    window = _window(explanations)
    ratio = (window[3] - window[1]) / (window[2] - window[0])
    rows = [[*explanations[i : i + columns]] for i in range(0, len(explanations), columns)]
    heights = [(WIDTH - 0.45) * ratio + 2.2] * len(rows)
    if photograph is not None:
        heights = [3.4] + [height for panel in heights for height in (panel, 1.9)]
    figure = Figure(figsize=(max(WIDTH * columns, 7.5), sum(heights) + 0.8), layout="constrained")
    strips = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if photograph is not None:
        _draw_photograph(strips.pop(0), photograph, explanations[0])
    for row in rows:
        strip = strips.pop(0)
        for axes, e in zip(_panels(strip, columns), row, strict=False):
            if photograph is None:
                add_rectangle(axes, e.box, **KEPT, zorder=0)
            else:
                _draw_image(axes, photograph.image, e.stride, alpha=0.55)  # pale, so that the drawing on it stays visible
            draw_cell_grid(axes, e, window)
            _draw_reading(axes, e)
            _annotate(axes, e)
        if photograph is not None:
            pooled = photograph.pooled[explanations.index(row[0]) :]
            for axes, e, values in zip(_panels(strips.pop(0), columns), row, pooled, strict=False):
                axes.axis("on")
                _draw_values(axes, values, f"output of {e.name}: {e.bins} x {e.bins}")
    figure.legend(handles=_legend(explanations), loc="outside lower center", ncols=6, frameon=False, fontsize=9.5)
    figure.get_layout_engine().set(h_pad=0.08)
    figure.suptitle(title, fontsize=12)
    save_png(figure, path, dpi=130 if photograph is None else 86)  # photographs compress badly


def _panels(strip: SubFigure, columns: int) -> list[Axes]:
    panels = list(strip.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.axis("off")  # the last row may have fewer operators than columns
    return panels


def _draw_image(axes: Axes, image: Tensor, stride: int, alpha: float = 1.0) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, image.shape[2] / stride, image.shape[1] / stride, 0), alpha=alpha, zorder=-1)


def _draw_photograph(strip: SubFigure, photograph: Photograph, e: Explanation) -> None:
    image, features = strip.subplots(1, 2)
    height, width = e.feature_map_size
    _draw_image(image, photograph.image, e.stride)
    image.vlines(range(width + 1), 0, height, color="white", linewidth=0.4)
    image.hlines(range(height + 1), 0, width, color="white", linewidth=0.4)
    image.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    image.set_title(f"the image, cells of {e.stride} pixels", fontsize=9.5)
    _draw_values(features, photograph.features, f"its feature map, {width} x {height} cells, mean over channels")
    for axes in (image, features):
        offset = 0.5 if axes is features else 0.0  # _draw_values has the centre of a cell at 0
        add_rectangle(axes, tuple(edge - offset for edge in e.box), fill=False, edgecolor="black", linewidth=3)
        add_rectangle(axes, tuple(edge - offset for edge in e.box), fill=False, edgecolor="white", linewidth=1.4)


def _draw_values(axes: Axes, values: Tensor, title: str) -> None:
    axes.imshow(values.numpy(), cmap="cividis")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9.5)


def draw_cell_grid(axes: Axes, e: Explanation, window: tuple[float, float, float, float]) -> None:
    axes.axis("on")
    left, top, right, bottom = window
    height, width = e.feature_map_size
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.vlines(range(ceil(x1), floor(x2) + 1), y1, y2, color="#BDBDBD", linewidth=0.8, zorder=1)
    axes.hlines(range(ceil(y1), floor(y2) + 1), x1, x2, color="#BDBDBD", linewidth=0.8, zorder=1)
    if right > width:
        axes.vlines(width, y1, y2, color="#555555", linewidth=3, zorder=1)
        axes.text(width + 0.1, y2 - 0.1, "end of map", rotation=90, fontsize=8, va="bottom", color="#555555")
    if bottom > height:
        axes.hlines(height, x1, x2, color="#555555", linewidth=3, zorder=1)
        axes.text(x1 + 0.1, height + 0.1, "end of map", fontsize=8, va="top", color="#555555")
    axes.set_xticks([i + 0.5 for i in range(width) if left < i + 0.5 < right], [i for i in range(width) if left < i + 0.5 < right])
    axes.set_yticks([i + 0.5 for i in range(height) if top < i + 0.5 < bottom], [i for i in range(height) if top < i + 0.5 < bottom])
    axes.tick_params(length=0, labelsize=8, colors="#555555", pad=1)
    axes.spines[:].set_visible(False)


def _draw_reading(axes: Axes, e: Explanation) -> None:
    for part in _subtract(e.box, e.extent):
        add_rectangle(axes, part, **LOST, linewidth=0, zorder=0.5)
    for part in _subtract(e.extent, e.box):
        add_rectangle(axes, part, **GAINED, linewidth=0, zorder=0.5)
    x, y = e.region.x, e.region.y
    left, top, right, bottom = e.extent
    for part in [(low, top, high, bottom) for low, high in _overlaps(x)] + [(left, low, right, high) for low, high in _overlaps(y)]:
        add_rectangle(axes, part, **SHARED, linewidth=0, zorder=0.7)
    for (left, right), (top, bottom) in product(_inset_edges(x), _inset_edges(y)):
        add_rectangle(axes, (left, top, right, bottom), fill=False, edgecolor=BIN, linewidth=1.4, zorder=3)
    add_rectangle(axes, e.box, fill=False, edgecolor="black", linewidth=2.4, zorder=4)
    xs, ys = ({place for of_bin in sample_positions(span) for place in of_bin} for span in (x, y))
    samples = tuple(zip(*product(xs, ys), strict=True)) or ((), ())  # an integral has none
    axes.scatter(*samples, s=16, color="black", edgecolor="white", linewidth=0.6, zorder=5)


def _annotate(axes: Axes, e: Explanation) -> None:
    axes.set_title(paper_name(e), loc="left", fontsize=13, fontweight="bold", pad=36)
    axes.set_title(f"IoU {e.misalignment.iou.item():.3f}", loc="right", fontsize=13, pad=36)
    axes.text(0, 1.02, "\n".join(describe(e.operator)), transform=axes.transAxes, fontsize=9.5, va="bottom")
    lines = [
        f"RoI     {_format_place(e.roi)}",
        f"samples {_format_place(e.extent)}",
        f"lost    {e.lost:5.2f} cells, {e.lost / e.area:.1%}",
        f"gained  {e.gained:5.2f} cells, {e.gained / e.area:.1%}",
        f"centre  {format_shift(e.misalignment)}",
        f"bins    IoU {e.misalignment.bin_iou.item():.3f}, bin by bin",
        f"dead zone {format_dead_zone(e)}",
    ]
    axes.set_xlabel("\n".join(lines), loc="left", fontsize=9.5, family="monospace")


def paper_name(e: Explanation) -> str:
    return f"{NAMES[e.name]} ({e.name})" if e.name in NAMES else e.name


def _format_place(r: Sequence[float]) -> str:
    return f"{r[2] - r[0]:5.2f} x {r[3] - r[1]:.2f} cells at ({r[0]:.2f}, {r[1]:.2f})"


def _legend(explanations: Sequence[Explanation]) -> list:
    """Return handles for what occurs in at least one panel."""
    entries = [
        (True, Line2D([], [], color="black", linewidth=2.4, label="the box")),
        (any(e.lost > 1e-3 for e in explanations), Patch(**LOST, linewidth=0, label="lost: in the box, not sampled")),
        (any(e.gained > 1e-3 for e in explanations), Patch(**GAINED, linewidth=0, label="gained: sampled, not in the box")),
        (True, Patch(fill=False, edgecolor=BIN, linewidth=1.4, label="a bin")),
        (
            any(_overlaps(span) for e in explanations for span in (e.region.x, e.region.y)),
            Patch(**SHARED, linewidth=0, label="sampled by two or more bins"),
        ),
        (True, Line2D([], [], color="black", marker="o", markersize=5, linestyle="none", label="a sample")),
    ]
    return [handle for there, handle in entries if there]


def _window(explanations: Sequence[Explanation]) -> tuple[float, float, float, float]:
    """Return the rectangle, in cells, that shows everything for every operator."""
    seen = [r for e in explanations for r in (e.box, e.extent)]
    x1, y1, x2, y2 = (pick(r[side] for r in seen) for side, pick in enumerate((min, min, max, max)))
    margin = 0.06 * max(x2 - x1, y2 - y1)
    return x1 - margin, y1 - margin, x2 + margin, y2 + margin


def _overlaps(span: AxisBins) -> list[tuple[float, float]]:
    """Return the intervals along an axis that two neighbouring bins both sample."""
    edges = list(zip(span.low[0].tolist(), span.high[0].tolist(), strict=True))
    return [(low, high) for (_, high), (low, _) in pairwise(edges) if high > low + 1e-3]


def _inset_edges(span: AxisBins) -> list[tuple[float, float]]:
    """Return the edges of the bins along an axis, moved inwards a little so that neighbours stay distinct."""
    edges = zip(span.low[0].tolist(), span.high[0].tolist(), strict=True)
    insets = (0.05, 0.14) if _overlaps(span) else (0.05, 0.05)
    return [(low + insets[i % 2], high - insets[i % 2]) for i, (low, high) in enumerate(edges)]


def _subtract(a: Sequence[float], b: Sequence[float]) -> list[tuple[float, float, float, float]]:
    """Return `a` without `b` as rectangles. Slivers of rounding errors in float32 are left out."""
    x1, y1, x2, y2 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    if not (x1 < x2 and y1 < y2):
        return [tuple(a)]
    parts = [(a[0], a[1], a[2], y1), (a[0], y2, a[2], a[3]), (a[0], y1, x1, y2), (x2, y1, a[2], y2)]
    return [part for part in parts if part[2] - part[0] > 1e-3 and part[3] - part[1] > 1e-3]


def add_rectangle(axes: Axes, r: Sequence[float], **style) -> None:
    axes.add_patch(Rectangle((r[0], r[1]), r[2] - r[0], r[3] - r[1], **style))


def save_png(figure: Figure, path: str | os.PathLike, dpi: int = 130) -> None:
    """Write a PNG file atomically."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").save(buffer, format="png", optimize=True)
    atomic_write(path, buffer.getvalue())
