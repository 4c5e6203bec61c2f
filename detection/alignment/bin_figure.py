"""One bin in detail: its samples, and the cells that each sample interpolates, as text and as a figure."""

import os
from collections.abc import Sequence
from itertools import product
from math import ceil
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from roi_quantization.detection.alignment.explanation import Explanation, describe, sample_positions
from roi_quantization.detection.alignment.explanation_figure import BIN, KEPT, WIDTH, add_rectangle, draw_cell_grid, paper_name, save_png
from roi_quantization.detection.alignment.misalignment import lattice_rule
from roi_quantization.detection.common.errors import InputError

TAP = "#D55E00"


class Sample(NamedTuple):
    """A sample and the cells that it interpolates. In a quantized bin a sample is one cell with weight 1."""

    x: float
    y: float
    """Position in cells."""
    taps: list[tuple[int, int, float]]
    """(column, row, weight)."""


def samples_of(e: Explanation, row: int, column: int) -> list[Sample]:
    """The samples of one bin, in the order of region.

    Interpolation gives cell `i` the weight `max(0, 1 - |x - (i + 0.5)|)` along an axis. Positions beyond the outermost cell
    centres are clamped to them.

    Raises:
        ValueError: there is no such bin, or it has no samples.
    """
    if not (0 <= row < e.bins and 0 <= column < e.bins):
        raise InputError(f"bin=[{row}, {column}]: expected [row,column], each from 0 to {e.bins - 1}")
    height, width = e.feature_map_size
    samples = [
        Sample(x, y, [(i, j, v * h) for (j, v), (i, h) in product(_weights(y, height), _weights(x, width))])
        for y, x in product(sample_positions(e.region.y)[row], sample_positions(e.region.x)[column])
    ]
    if not samples:
        reason = "the operator integrates" if lattice_rule(e.operator) is None else "the bin lies off the map"
        raise InputError(f"bin=[{row}, {column}]: {e.name} has no samples there, {reason}")
    return samples


def format_bin(e: Explanation, row: int, column: int) -> str:
    """Return the samples of one bin as text of at most 100 columns."""
    lines = [f"{e.name}, bin in row {row} and column {column}: {'; '.join(describe(e.operator))}"]
    for sample in samples_of(e, row, column):
        weighted = " + ".join(f"{weight:.2f} ({i}, {j})" for i, j, weight in sample.taps)
        lines.append(f"  the sample at ({sample.x:.2f}, {sample.y:.2f}) is {weighted}")
    return "\n".join(lines)


def draw_bin(explanations: Sequence[Explanation], row: int, column: int, path: str | os.PathLike) -> None:
    """Draw one panel per operator: the bin, its samples, and the interpolation weights of the first sample."""
    found = [samples_of(e, row, column) for e in explanations]
    edges = [_bin_rectangle(e, row, column) for e in explanations]
    left, top, right, bottom = (
        pick([*(edge[side] for edge in edges), *(tap[side % 2] + side // 2 for samples in found for s in samples for tap in s.taps)])
        for side, pick in enumerate((min, min, max, max))
    )
    window = (left - 0.15, top - 0.15, right + 0.15, bottom + 0.15)
    columns = min(3, len(found))
    rows = ceil(len(found) / columns)
    height = (WIDTH - 0.3) * (window[3] - window[1]) / (window[2] - window[0]) + 0.9
    figure = Figure(figsize=(max(7.0, WIDTH * columns), height * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    for axes, e, edge, samples in zip(panels, explanations, edges, found, strict=False):
        draw_cell_grid(axes, e, window)
        add_rectangle(axes, edge, **KEPT, zorder=0)
        add_rectangle(axes, edge, fill=False, edgecolor=BIN, linewidth=2, zorder=2)
        first = samples[0]
        for i, j, weight in first.taps:
            axes.plot([first.x, i + 0.5], [first.y, j + 0.5], color=TAP, linewidth=0.6 + 5 * weight, zorder=3, solid_capstyle="round")
            axes.plot(i + 0.5, j + 0.5, marker="s", markersize=5, color=TAP, zorder=4)
            up = j + 0.5 <= first.y
            axes.text(i + 0.5, j + 0.5 + (-0.09 if up else 0.09), f"{weight:.2f}", ha="center", va="bottom" if up else "top", fontsize=11)
        axes.scatter([s.x for s in samples], [s.y for s in samples], s=34, color="black", edgecolor="white", zorder=5)
        axes.set_title(paper_name(e), loc="left", fontsize=13, fontweight="bold", pad=22)
        axes.text(0, 1.02, describe(e.operator)[1], transform=axes.transAxes, fontsize=9.5, va="bottom")
    entries = [
        Patch(fill=False, edgecolor=BIN, linewidth=2, label="the bin"),
        Line2D([], [], color="black", marker="o", markersize=6, linestyle="none", label="a sample"),
        Line2D([], [], color=TAP, marker="s", linewidth=2.5, label="a cell's centre and its weight in the first sample"),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.get_layout_engine().set(h_pad=0.08)
    figure.suptitle(
        f"The bin in row {row} and column {column} of {explanations[0].bins} x {explanations[0].bins}, and its samples", fontsize=12
    )
    save_png(figure, path)


def _weights(place: float, size: int) -> list[tuple[int, float]]:
    place = min(max(place, 0.5), size - 0.5)
    near = [(i, 1 - abs(place - (i + 0.5))) for i in range(max(0, int(place) - 1), min(size, int(place) + 2))]
    return [(i, weight) for i, weight in near if weight > 1e-6]


def _bin_rectangle(e: Explanation, row: int, column: int) -> tuple[float, float, float, float]:
    x, y = e.region.x, e.region.y
    return x.low[0, column].item(), y.low[0, row].item(), x.high[0, column].item(), y.high[0, row].item()
