"""The report's figures. Each function draws one, or returns None where the sweep has nothing for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from roi_quantization.detection.evaluation.statistics import Estimate, TwoByTwo
from roi_quantization.detection.report.findings import Findings
from roi_quantization.detection.report.style import WIDTH, Look, Theme, height, look, rows
from roi_quantization.detection.report.tables import tested_operators

THRESHOLDS = np.linspace(0.5, 0.95, 10)


@dataclass(frozen=True)
class Drawing:
    """name: of its files. caption: what is seen, and how to read it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Theme], Figure]


def _looks(found: Findings, theme: Theme) -> dict[str, Look]:
    return {arm: look(found.runs(arm)[0].config.roi, theme) for arm in found.arms}


def _new(lines: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, lines), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(panels, 1)))


def _key(axes: Axes, looks: dict[str, Look], theme: Theme) -> None:
    """What colours and markers mean, as far as they occur."""
    colours = {theme.exact: "RoI exact", theme.rounded: "RoI rounded", theme.floored: "RoI floored"}
    entries = [Line2D([], [], color=c, linewidth=4, label=n) for c, n in colours.items() if c in {one.colour for one in looks.values()}]
    for marker, name in (("o", "bins exact"), ("s", "bins of whole cells")):
        if marker in {one.marker for one in looks.values()}:
            entries.append(Line2D([], [], color=theme.ink, marker=marker, linestyle="", markersize=5, label=name))
    if not all(one.filled for one in looks.values()):
        entries.append(
            Line2D([], [], color=theme.ink, marker="o", markerfacecolor="none", linestyle="", markersize=5, label="hollow: mean")
        )
    axes.figure.legend(handles=entries, loc="outside lower center", ncols=2 if len(entries) < 5 else 3, columnspacing=1.2, handlelength=1.5)


def _interval(axes: Axes, estimate: Estimate, y: float, one: Look, size: float = 6) -> None:
    if estimate.has_interval:
        axes.plot([estimate.low, estimate.high], [y, y], color=one.colour, linewidth=1.6)
    axes.plot(estimate.value, y, markersize=size, **one.point)


def forest(found: Findings) -> Drawing | None:
    changes = found.differences["AP75"]
    if not changes:
        return None

    def draw(theme: Theme) -> Figure:
        looks = _looks(found, theme)
        figure, (axes,) = _new(height(len(changes)) + 0.4)
        for y, arm in zip(rows(axes, list(changes)), changes, strict=True):
            _interval(axes, changes[arm], y, looks[arm])
        axes.axvline(0, color=theme.ink, linewidth=1)
        axes.set_xlabel(f"AP75 of the operator - AP75 of {found.reference}, points")
        _key(axes, {arm: looks[arm] for arm in changes}, theme)
        return figure

    caption = f"How far each operator is from {found.reference}, with the 95 % interval of the paired difference over {found.over}. "
    caption += "An interval that excludes 0 is a difference that was shown."
    return Drawing("differences", f"Difference to {found.reference}", caption, draw)


def seeds(found: Findings) -> Drawing:
    def draw(theme: Theme) -> Figure:
        looks = _looks(found, theme)
        figure, (axes,) = _new(height(len(found.arms)) + 0.4)
        for y, arm in zip(rows(axes, list(found.arms)), found.arms, strict=True):
            values = list(found.values["AP75"][arm].values())
            axes.plot(np.mean(values), y, marker="|", markersize=15, markeredgewidth=1.5, color=theme.ink)
            axes.plot(values, [y] * len(values), linestyle="", markersize=5, alpha=0.9, **looks[arm].point)
        axes.set_xlabel("AP75, percent")
        _key(axes, looks, theme)
        return figure

    return Drawing("seeds", "AP75 of every run", "A dot is a run with its own seed, the stroke is their mean.", draw)


def two_by_two(found: Findings) -> Drawing | None:
    if not found.costs:
        return None
    cells = TwoByTwo()

    def draw(theme: Theme) -> Figure:
        looks = _looks(found, theme)
        figure, (axes,) = _new(3.1)
        lines = ((cells.exact, cells.rounded_roi, "bins exact"), (cells.quantized_bins, cells.both, "bins of whole cells"))
        for shift, (left, right, name) in zip((-0.02, 0.02), lines, strict=True):
            estimates = [found.means["AP75"][arm] for arm in (left, right)]
            axes.plot(
                [shift, 1 + shift], [e.value for e in estimates], color=theme.ink, linestyle=looks[left].line, linewidth=1.2, label=name
            )
            for x, arm, e in zip((shift, 1 + shift), (left, right), estimates, strict=True):
                if e.has_interval:
                    axes.plot([x, x], [e.low, e.high], color=looks[arm].colour, linewidth=1.6)
                axes.plot(x, e.value, markersize=7, **looks[arm].point)
                axes.annotate(
                    f"{arm} {e.value:.1f}", (x, e.value), xytext=(-9 if x < 0.5 else 9, 0), textcoords="offset points", va="center",
                    ha="right" if x < 0.5 else "left",
                )  # fmt: skip
        axes.set_xticks([0, 1], ["RoI exact", "RoI rounded"])
        axes.set_xlim(-0.75, 1.75)
        axes.set_ylabel("AP75, percent")
        axes.grid(axis="y", linewidth=0.6)
        axes.legend(loc="upper right")
        return figure

    caption = (
        "The two quantizations, one at a time and together; the largest value of a bin, no + 1. Were their costs to add up, the lines "
    )
    caption += f"would be parallel. Bars: 95 % intervals over {found.over}."
    return Drawing("two_by_two", "The 2 x 2 of the two quantizations", caption, draw)


def thresholds(found: Findings) -> Drawing:
    def draw(theme: Theme) -> Figure:
        looks = _looks(found, theme)
        figure, (axes,) = _new(3.6)
        order = sorted(found.arms, key=lambda arm: -found.curves[arm][5])
        for arm in order:
            one = looks[arm]
            axes.plot(THRESHOLDS, found.curves[arm], linestyle=one.line, linewidth=1.3, markersize=4, label=arm, **one.point)
        axes.set(xlabel="IoU from which a detection counts as right", ylabel="AP, percent", ylim=(0, None))
        axes.grid(linewidth=0.6)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, columnspacing=1.2)
        return figure

    caption = "What is lost where localisation is asked for more strictly. Colours as above; dashed, with squares: bins of whole cells."
    return Drawing("thresholds", "AP at every IoU threshold", caption, draw)


def located(found: Findings) -> Drawing | None:
    arms = [arm for arm in found.arms if any(len(one) and one.proposal is not None for one in found.located(arm))]
    if not arms:
        return None

    def draw(theme: Theme) -> Figure:
        looks = _looks(found, theme)
        figure, panels = _new(2 * height(len(arms)) + 0.4, panels=2)
        for axes, of, label in zip(
            panels, (_ious, _offsets), ("IoU with the object", "distance of an edge from the object's, pixels"), strict=True
        ):
            for y, arm in zip(rows(axes, arms), arms, strict=True):
                for values, shift, colour, filled in zip(
                    of(found, arm), (-0.17, 0.17), (theme.ink, looks[arm].colour), (False, True), strict=True
                ):
                    low, middle, high = np.percentile(values, (25, 50, 75))
                    axes.plot([low, high], [y + shift] * 2, color=colour, linewidth=3 if filled else 1.2, alpha=0.75)
                    face = colour if filled else "none"
                    axes.plot(middle, y + shift, marker="o", markersize=4.5, color=colour, markerfacecolor=face)
            axes.set_xlabel(label)
        entries = [
            Line2D(
                [],
                [],
                color=theme.ink,
                linewidth=1.2,
                marker="o",
                markerfacecolor="none",
                markersize=4.5,
                label="before regression (the RoI)",
            ),
            Line2D([], [], color=theme.exact, linewidth=3, marker="o", markersize=4.5, label="after"),
        ]
        figure.legend(handles=entries, loc="outside lower center", ncols=2)
        return figure

    caption = "Of the detections that found an object (IoU 0.5): median and the middle half, before and after box regression. All seeds. "
    caption += "Where few objects are found, only the easy ones are in the picture: the table says how many."
    return Drawing("localisation", "How far off the boxes are", caption, draw)


def _ious(found: Findings, arm: str) -> tuple[np.ndarray, np.ndarray]:
    several = [one for one in found.located(arm) if len(one)]
    return np.concatenate([one.proposal_iou for one in several]), np.concatenate([one.iou for one in several])


def _offsets(found: Findings, arm: str) -> tuple[np.ndarray, np.ndarray]:
    several = [one for one in found.located(arm) if len(one)]
    return np.abs(np.concatenate([one.proposal_offset for one in several])), np.abs(np.concatenate([one.offset for one in several]))


def sizes(found: Findings) -> Drawing:
    """By pixels and by cells: one panel where both are the same objects."""
    panels = [(found.by_pixels, "pixels"), (found.by_cells, "cells")]
    equal = all(np.allclose(list(found.by_pixels[a].values()), list(found.by_cells[a].values()), equal_nan=True) for a in found.arms)
    if equal:
        panels = panels[1:]

    def draw(theme: Theme) -> Figure:
        looks = _looks(found, theme)
        figure, all_axes = _new(len(panels) * height(len(found.arms)) + 0.3, panels=len(panels))
        for axes, (by_size, unit) in zip(all_axes, panels, strict=True):
            names = list(next(iter(by_size.values())))
            shapes = dict(zip(names, ("v", "o", "^"), strict=True))
            for y, arm in zip(rows(axes, list(found.arms)), found.arms, strict=True):
                axes.plot(list(by_size[arm].values()), [y] * len(names), color=theme.faint, linewidth=1, zorder=1)
                for name, value in by_size[arm].items():
                    axes.plot(value, y, marker=shapes[name], markersize=6, linestyle="", color=looks[arm].colour)
            axes.set_xlabel(f"AP, percent, by the object's side in {unit}")
            handles = [Line2D([], [], color=theme.ink, marker=shapes[n], linestyle="", markersize=5, label=n) for n in names]
            axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        return figure

    caption = f"A cell has {found.stride} pixels of the network's input; the side is the square root of the area. Mean over seeds."
    if equal:
        caption += " 2 and 6 cells are COCO's 32 and 96 pixels here."
    return Drawing("sizes", "AP by the size of the object", caption, draw)


def misalignment(found: Findings) -> Drawing | None:
    if len(found.misalignment) < 2:
        return None

    def draw(theme: Theme) -> Figure:
        looks = _looks(found, theme)
        figure, (axes,) = _new(3.8)
        x = {arm: row["iou"] for arm, row in found.misalignment.items()}
        y = {arm: found.means["AP75"][arm].value for arm in x}
        for arm in x:
            axes.plot(x[arm], y[arm], linestyle="", markersize=7, **looks[arm].point)
        margin = 0.08 * (max(x.values()) - min(x.values()) + 1e-3)
        axes.set_xlim(min(x.values()) - margin, max(x.values()) + margin)
        axes.set_ylim(min(0, min(y.values())), 1.08 * max(y.values()) + 1)
        axes.set(xlabel="IoU of a RoI with what the operator reads of it, mean", ylabel="AP75, percent")
        axes.grid(linewidth=0.6)
        _label_beside(axes, x, y, theme)
        _key(axes, looks, theme)
        return figure

    caption = (
        f"Before any training: how well what an operator reads fits the RoI, over the RoIs behind {found.reference}'s detections; and "
    )
    caption += "what came of it. Operators that read the same differ by their reduction and their bins."
    return Drawing("misalignment", "Misread RoIs, lost accuracy", caption, draw)


def _label_beside(axes: Axes, x: dict[str, float], y: dict[str, float], theme: Theme) -> None:
    """Names in a column right of the axes, in the order of their height and apart, with a line to each point."""
    low, high = axes.get_ylim()
    gap = (high - low) / 17
    names = sorted(y, key=y.get)
    places = []
    for arm in names:
        places.append(max(y[arm], places[-1] + gap if places else low))
    excess = max(0.0, places[-1] - high)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], (places[i + 1] - gap) if i + 1 < len(places) else places[i] - excess)
    for arm, place in zip(names, places, strict=True):
        axes.annotate(
            arm, (x[arm], y[arm]), xytext=(1.04, place), textcoords=("axes fraction", "data"), va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": theme.faint, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def cross(found: Findings, metric: str = "AP75") -> Drawing | None:
    if not found.cross:
        return None
    matrix, tested = found.cross[metric], tested_operators(found, metric)
    numbers = np.array([[matrix[arm].get(other, np.nan) for other in tested] for arm in matrix])
    many = len(tested) > 4

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = _new(0.3 * len(matrix) + (1.8 if many else 1.2))
        image = axes.imshow(np.ma.masked_invalid(numbers), cmap="cividis", vmin=0, aspect="auto")
        middle = np.nanmax(numbers) / 2
        for (i, j), value in np.ndenumerate(numbers):
            if np.isfinite(value):
                own = list(matrix)[i] == tested[j]
                axes.text(
                    j, i, f"{value:.1f}", ha="center", va="center", color="black" if value > middle else "white",
                    weight="bold" if own else "normal", size="small" if many else None,
                )  # fmt: skip
        axes.set_xticks(range(len(tested)), tested, rotation=90 if many else 0)
        axes.set_yticks(range(len(matrix)), list(matrix))
        axes.set(xlabel="tested with", ylabel="trained with")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, label=f"{metric}, percent", aspect=30)
        bar.outline.set_visible(False)
        return figure

    caption = f"{metric} of weights trained with one operator (row) and used with another (column), mean over seeds; bold where "
    caption += "both are the same."
    return Drawing("cross", "Trained with one operator, tested with another", caption, draw)


def all_drawings(found: Findings) -> Sequence[Drawing]:
    made = (draw(found) for draw in (forest, two_by_two, seeds, thresholds, located, sizes, misalignment, cross))
    return [drawing for drawing in made if drawing is not None]
