"""The report's figures. Each function returns one, or None where the sweep lacks its data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from roi_quantization.detection.evaluation.localisation import Localisation
from roi_quantization.detection.evaluation.protocol import COCO_AREAS
from roi_quantization.detection.evaluation.statistics import Estimate, TwoByTwo
from roi_quantization.detection.report.findings import METRIC, Findings
from roi_quantization.detection.report.style import WIDTH, ArmStyle, Theme, arm_style, figure_height, label_rows
from roi_quantization.detection.report.tables import tested_operators

THRESHOLDS = np.linspace(0.5, 0.95, 10)


@dataclass(frozen=True)
class ReportFigure:
    """A figure to draw. `name` is that of its files, `caption` explains how to read it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Theme], Figure]


def _styles(findings: Findings, theme: Theme) -> dict[str, ArmStyle]:
    return {arm: arm_style(findings.operators.get(arm), theme) for arm in findings.arms}


def _panels(lines: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, lines), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(panels, 1)))


def _add_legend(axes: Axes, styles: dict[str, ArmStyle], theme: Theme) -> None:
    """Add a legend of the colours and markers that occur."""
    colours = {theme.exact: "RoI exact", theme.rounded: "RoI rounded", theme.floored: "RoI floored", theme.unknown: "another operator"}
    entries = [Line2D([], [], color=c, linewidth=4, label=n) for c, n in colours.items() if c in {one.colour for one in styles.values()}]
    for marker, name in (("o", "bins exact"), ("s", "bins of whole cells")):
        if marker in {one.marker for one in styles.values()}:
            entries.append(Line2D([], [], color=theme.ink, marker=marker, linestyle="", markersize=5, label=name))
    if not all(one.filled for one in styles.values()):
        entries.append(
            Line2D([], [], color=theme.ink, marker="o", markerfacecolor="none", linestyle="", markersize=5, label="hollow: mean")
        )
    axes.figure.legend(handles=entries, loc="outside lower center", ncols=2 if len(entries) < 5 else 3, columnspacing=1.2, handlelength=1.5)


def _plot_interval(axes: Axes, estimate: Estimate, y: float, one: ArmStyle, size: float = 6) -> None:
    if estimate.has_interval:
        axes.plot([estimate.low, estimate.high], [y, y], color=one.colour, linewidth=1.6)
    axes.plot(estimate.value, y, markersize=size, **one.point)


def plot_differences(findings: Findings) -> ReportFigure | None:
    changes = findings.differences[METRIC]
    if not changes:
        return None

    def draw(theme: Theme) -> Figure:
        styles = _styles(findings, theme)
        figure, (axes,) = _panels(figure_height(len(changes)) + 0.4)
        for y, arm in zip(label_rows(axes, list(changes)), changes, strict=True):
            _plot_interval(axes, changes[arm], y, styles[arm])
        axes.axvline(0, color=theme.ink, linewidth=1)
        axes.set_xlabel(f"{METRIC} of the operator - {METRIC} of {findings.reference}, points")
        _add_legend(axes, {arm: styles[arm] for arm in changes}, theme)
        return figure

    caption = f"Difference of each operator to {findings.reference}, paired, with its 95 % interval over {findings.varies_over}. "
    caption += "An interval that excludes 0 shows a difference, if it is the only one looked at: the table has p corrected for all."
    return ReportFigure("differences", f"Difference to {findings.reference}", caption, draw)


def plot_seeds(findings: Findings) -> ReportFigure:
    def draw(theme: Theme) -> Figure:
        styles = _styles(findings, theme)
        figure, (axes,) = _panels(figure_height(len(findings.arms)) + 0.4)
        for y, arm in zip(label_rows(axes, list(findings.arms)), findings.arms, strict=True):
            values = list(findings.values[METRIC][arm].values())
            axes.plot(np.mean(values), y, marker="|", markersize=15, markeredgewidth=1.5, color=theme.ink)
            axes.plot(values, [y] * len(values), linestyle="", markersize=5, alpha=0.9, **styles[arm].point)
        axes.set_xlabel(f"{METRIC}, percent")
        _add_legend(axes, styles, theme)
        return figure

    return ReportFigure("seeds", f"{METRIC} of every run", "A dot is one seed, the stroke is the mean.", draw)


def plot_factorial(findings: Findings) -> ReportFigure | None:
    if not findings.costs:
        return None
    cells = TwoByTwo()

    def draw(theme: Theme) -> Figure:
        styles = _styles(findings, theme)
        figure, (axes,) = _panels(3.1)
        lines = ((cells.exact, cells.rounded_roi, "bins exact"), (cells.quantized_bins, cells.both, "bins of whole cells"))
        for shift, (left, right, name) in zip((-0.02, 0.02), lines, strict=True):
            estimates = [findings.means_of_costs[METRIC][arm] for arm in (left, right)]
            axes.plot(
                [shift, 1 + shift], [e.value for e in estimates], color=theme.ink, linestyle=styles[left].line, linewidth=1.2, label=name
            )
            for x, arm, e in zip((shift, 1 + shift), (left, right), estimates, strict=True):
                if e.has_interval:
                    axes.plot([x, x], [e.low, e.high], color=styles[arm].colour, linewidth=1.6)
                axes.plot(x, e.value, markersize=7, **styles[arm].point)
                axes.annotate(
                    f"{arm} {e.value:.1f}", (x, e.value), xytext=(-9 if x < 0.5 else 9, 0), textcoords="offset points", va="center",
                    ha="right" if x < 0.5 else "left",
                )  # fmt: skip
        axes.set_xticks([0, 1], ["RoI exact", "RoI rounded"])
        axes.set_xlim(-0.75, 1.75)
        axes.set_ylabel(f"{METRIC}, percent")
        axes.grid(axis="y", linewidth=0.6)
        axes.legend(loc="upper right")
        return figure

    caption = "The two quantizations, separately and together, all with max pooling and without Caffe's + 1. Without interaction the lines "
    caption += f"are parallel. Bars: 95 % intervals over {findings.varies_over}{findings.seeds_of_costs}."
    return ReportFigure("two_by_two", "The 2 x 2 of the two quantizations", caption, draw)


def plot_thresholds(findings: Findings) -> ReportFigure:
    def draw(theme: Theme) -> Figure:
        styles = _styles(findings, theme)
        figure, (axes,) = _panels(3.6)
        order = sorted(findings.arms, key=lambda arm: -findings.curves[arm][5])
        for arm in order:
            one = styles[arm]
            axes.plot(THRESHOLDS, findings.curves[arm], linestyle=one.line, linewidth=1.3, markersize=4, label=arm, **one.point)
        axes.set(xlabel="IoU threshold", ylabel="AP, percent", ylim=(0, None))
        axes.grid(linewidth=0.6)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, columnspacing=1.2)
        return figure

    caption = "AP at stricter IoU thresholds. Colours as above. Dashed lines with squares: bins of whole cells."
    return ReportFigure("thresholds", "AP at every IoU threshold", caption, draw)


def plot_localisation(findings: Findings) -> ReportFigure | None:
    found = {arm: _found(findings, arm) for arm in findings.arms}
    arms = [arm for arm, several in found.items() if several and all(one.proposal is not None for one in several)]
    if not arms:
        return None

    def draw(theme: Theme) -> Figure:
        styles = _styles(findings, theme)
        figure, panels = _panels(2 * figure_height(len(arms)) + 0.4, panels=2)
        for axes, of, label in zip(
            panels, (_ious, _offsets), ("IoU with the object", "distance of an edge from the object's, pixels"), strict=True
        ):
            for y, arm in zip(label_rows(axes, arms), arms, strict=True):
                for values, shift, colour, filled in zip(
                    of(findings, arm), (-0.17, 0.17), (theme.ink, styles[arm].colour), (False, True), strict=True
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

    caption = "Detections matched at IoU 0.5: median and interquartile range, before and after box regression, all seeds. "
    caption += "An operator that finds fewer objects is shown on the easier ones: the table has the share found."
    return ReportFigure("localisation", "Localisation errors", caption, draw)


def _found(findings: Findings, arm: str) -> list[Localisation]:
    return [one for one in findings.localisations(arm) if len(one)]


def _ious(findings: Findings, arm: str) -> tuple[np.ndarray, np.ndarray]:
    several = _found(findings, arm)
    return np.concatenate([one.proposal_iou for one in several]), np.concatenate([one.iou for one in several])


def _offsets(findings: Findings, arm: str) -> tuple[np.ndarray, np.ndarray]:
    several = _found(findings, arm)
    return np.abs(np.concatenate([one.proposal_offset for one in several])), np.abs(np.concatenate([one.offset for one in several]))


def plot_sizes(findings: Findings) -> ReportFigure:
    """Plot AP by size in pixels and in cells, in one panel where both divide the objects alike or the size of a cell is not known."""
    has_cells = any(findings.by_cells.values())
    panels = [(findings.by_pixels, "pixels"), (findings.by_cells, "cells")]
    equal = (
        has_cells
        and findings.protocol.areas == COCO_AREAS
        and all(
            np.allclose(list(findings.by_pixels[a].values()), list(findings.by_cells[a].values()), equal_nan=True) for a in findings.arms
        )
    )
    if not has_cells:
        panels = panels[:1]
    elif equal:
        panels = panels[1:]

    def draw(theme: Theme) -> Figure:
        styles = _styles(findings, theme)
        figure, all_axes = _panels(len(panels) * figure_height(len(findings.arms)) + 0.3, panels=len(panels))
        for axes, (by_size, unit) in zip(all_axes, panels, strict=True):
            names = list(next(iter(by_size.values())))
            shapes = dict(zip(names, cycle("vo^sDP"), strict=False))
            for y, arm in zip(label_rows(axes, list(findings.arms)), findings.arms, strict=True):
                axes.plot(list(by_size[arm].values()), [y] * len(names), color=theme.faint, linewidth=1, zorder=1)
                for name, value in by_size[arm].items():
                    axes.plot(value, y, marker=shapes[name], markersize=6, linestyle="", color=styles[arm].colour)
            axes.set_xlabel(f"AP, percent, by the object's side in {unit}")
            handles = [Line2D([], [], color=theme.ink, marker=shapes[n], linestyle="", markersize=5, label=n) for n in names]
            axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        return figure

    caption = "The side is the square root of the area. Mean over the seeds that an operator has."
    if has_cells:
        caption = f"A cell has {findings.stride} pixels of the network's input. {caption}"
    if equal:
        caption += " 2 and 6 cells are COCO's 32 and 96 pixels here."
    return ReportFigure("sizes", "AP by the size of the object", caption, draw)


def plot_misalignment(findings: Findings) -> ReportFigure | None:
    if len(findings.misalignment) < 2:
        return None

    def draw(theme: Theme) -> Figure:
        styles = _styles(findings, theme)
        figure, (axes,) = _panels(3.8)
        x = {arm: row["iou"] for arm, row in findings.misalignment.items()}
        y = {arm: findings.means[METRIC][arm].value for arm in x}
        for arm in x:
            axes.plot(x[arm], y[arm], linestyle="", markersize=7, **styles[arm].point)
        margin = 0.08 * (max(x.values()) - min(x.values()) + 1e-3)
        axes.set_xlim(min(x.values()) - margin, max(x.values()) + margin)
        axes.set_ylim(min(0, min(y.values())), 1.08 * max(y.values()) + 1)
        axes.set(xlabel="mean IoU of RoI and sampled region", ylabel=f"{METRIC}, percent")
        axes.grid(linewidth=0.6)
        _label_beside(axes, x, y, theme)
        _add_legend(axes, styles, theme)
        return figure

    caption = f"Horizontal: how well the sampled region fits the RoI, before training, over the RoIs of {findings.reference}'s detections. "
    caption += "Vertical: the accuracy after training. Operators with equal regions differ in their reduction and bins."
    return ReportFigure("misalignment", "Misalignment and accuracy", caption, draw)


def plot_predicted(findings: Findings) -> ReportFigure | None:
    if not findings.predicted:
        return None

    def draw(theme: Theme) -> Figure:
        styles = _styles(findings, theme)
        figure, (axes,) = _panels(3.8)
        x = {arm: of_arm[METRIC] for arm, of_arm in findings.predicted.items()}
        measured = {arm: findings.differences[METRIC][arm] for arm in x}
        for arm, estimate in measured.items():
            if estimate.has_interval:
                axes.plot([x[arm]] * 2, [estimate.low, estimate.high], color=styles[arm].colour, linewidth=1.6)
            axes.plot(x[arm], estimate.value, linestyle="", markersize=7, **styles[arm].point)
        ends = [min(*x.values(), *(e.value for e in measured.values())) - 2, 2]
        axes.plot(ends, ends, color=theme.faint, linewidth=1, zorder=0)
        axes.set_xlim(*ends)
        axes.set(xlabel=f"predicted difference in {METRIC} to {findings.reference}, points", ylabel="measured difference, points")
        axes.grid(linewidth=0.6)
        _label_beside(axes, x, {arm: estimate.value for arm, estimate in measured.items()}, theme)
        _add_legend(axes, {arm: styles[arm] for arm in x}, theme)
        return figure

    caption = f"Predicted from {findings.reference}'s own runs, without training the others. On the line both are equal. "
    caption += f"Bars: 95 % intervals over {findings.varies_over}."
    return ReportFigure("predicted", "Predicted", caption, draw)


def _label_beside(axes: Axes, x: dict[str, float], y: dict[str, float], theme: Theme) -> None:
    """Write the names in a column right of the axes, in order of height, with a line to each point."""
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


def plot_cross_evaluation(findings: Findings, metric: str = METRIC) -> ReportFigure | None:
    if not findings.cross:
        return None
    matrix, tested = findings.cross[metric], tested_operators(findings, metric)
    numbers = np.array([[matrix[arm].get(other, np.nan) for other in tested] for arm in matrix])
    many = len(tested) > 4

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = _panels(0.3 * len(matrix) + (1.8 if many else 1.2))
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
    return ReportFigure("cross", "Trained with one operator, tested with another", caption, draw)


def make_figures(findings: Findings) -> list[ReportFigure]:
    """Return the figures that the sweep has the data for. A partial evaluation is named in each."""
    made = (
        plot(findings)
        for plot in (
            plot_differences,
            plot_factorial,
            plot_seeds,
            plot_thresholds,
            plot_localisation,
            plot_sizes,
            plot_misalignment,
            plot_predicted,
            plot_cross_evaluation,
        )
    )
    return [_mark_partial(figure, findings.sweep.partial) for figure in made if figure is not None]


def _mark_partial(figure: ReportFigure, partial: str) -> ReportFigure:
    if not partial:
        return figure

    def draw(theme: Theme) -> Figure:
        drawn = figure.draw(theme)
        drawn.suptitle(partial, fontsize="small")
        return drawn

    return replace(figure, draw=draw, caption=f"{figure.caption} Of {partial}.")
