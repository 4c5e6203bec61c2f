"""What the benchmark found, as text for a terminal of 110 columns and as a picture."""

import io
import math
import textwrap
from collections import defaultdict

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

WIDTH = 110
MEASURED = {  # in the order of printing: what it is, and what the right half tells
    "called": ("ms, as called", "backward"),
    "gpu": ("ms, the GPU alone", "backward"),
    "memory": ("peak memory, MiB", "forward and backward"),
}
OURS, THEIRS, FAINT = "#00568f", "#e08214", "#d5d5d5"  # apart in hue and in lightness; shapes tell them apart as well


def table(found: dict) -> str:
    """A part for each thing measured, then what could not be."""
    notes = (
        f"a large copy runs at {found['copy_gb_s']:.1f} GB/s; floor: the time of the bytes that must move at this speed (of memory: the "
        "results alone), as a share of ours; in brackets: the nearest that torchvision has"
    )
    parts = [f"{textwrap.fill(found['machine'], WIDTH)}\n{textwrap.fill(notes, WIDTH)}"]
    parts += [_part(what, found["rows"]) for what in MEASURED if what in found["rows"][0]]
    if found["failures"]:
        parts.append(_failures(found["failures"]))
    return "\n\n".join(parts)


def _part(what: str, rows: list[dict]) -> str:
    title, right = MEASURED[what]
    half = f"{'ours':>9}{'theirs':>9}{'ratio':>10}{'floor':>8}"
    lines = [f"{title:36}{'forward':^36} {right:^36}".rstrip(), f"{'shape':12}{'operator':11}{'theirs':12}{half}{half}"]
    for row in rows:
        cells = [row[what].get(direction, {}) for direction in ("forward", "backward")]
        theirs = row["against"] if row["alike"] else f"({row['against']})"
        lines.append(f"{row['shape']:12}{row['operator']:11}{theirs:12}" + "".join(_half(**cell) for cell in cells))
    return "\n".join(lines)


def _half(ours: float | None = None, theirs: float | None = None, floor: float | None = None) -> str:
    ratio = f"{_digits(theirs / ours)} x" if ours and theirs else "-"
    return f"{_digits(ours):>9}{_digits(theirs):>9}{ratio:>10}{f'{floor / ours:.0%}' if ours else '-':>8}"


def _digits(number: float | None) -> str:
    """Three significant ones, without an exponent."""
    if number is None:
        return "-"
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}" if number > 0 else "0"


def _failures(failures: list[dict]) -> str:
    """The same failure of several shapes is told once."""
    shapes = defaultdict(list)
    for failure in failures:
        shapes[failure["operator"], failure["what"], failure["why"]].append(failure["shape"])
    lines = [f"{who}, {what} ({', '.join(where)}): {' '.join(why.split())}" for (who, what, why), where in shapes.items()]
    return "\n".join(["could not be measured:", *(textwrap.shorten(line, WIDTH - 2, placeholder=" ...") for line in lines)])


def picture(found: dict) -> bytes:
    """Times of every row as a PNG: the GPU's alone where there are any, else as called."""
    rows = found["rows"]
    what = "gpu" if any(row.get("gpu", {}).get("forward", {}).get("ours") for row in rows) else "called"
    places, labels = _places(rows)
    figure = Figure(figsize=(8.5, 0.17 * max(places) + 1.6), layout="constrained")
    for axes, direction in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        for place, row in zip(places, rows, strict=True):
            _draw(axes, place, row["alike"], **row[what].get(direction, {}))
        axes.set_xscale("log")
        axes.set_title(direction, fontsize=10)
        axes.set_xlabel(MEASURED[what][0], fontsize=9)
        axes.grid(axis="x", color=FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(labelsize=8, labeltop=True)
        axes.tick_params(axis="y", length=0)
        axes.set_yticks(list(labels), list(labels.values()))
    axes.set_ylim(max(places) + 0.8, min(labels) - 0.8)
    for label in axes.get_yticklabels() + figure.axes[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in {row["shape"] for row in rows} else "normal")
    figure.legend(handles=_legend(), loc="outside upper center", ncols=4, frameon=False, fontsize=8.5)
    figure.supxlabel(found["machine"], fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _places(rows: list[dict]) -> tuple[list[float], dict[float, str]]:
    """Where each row is drawn, and the labels on the way: a shape's name above its operators."""
    places, labels, at, shape = [], {}, 0.0, None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            at += 0.5
            labels[at] = shape
            at += 1
        labels[at] = row["operator"]
        places.append(at)
        at += 1
    return places, labels


def _draw(
    axes: Axes, place: float, alike: bool, ours: float | None = None, theirs: float | None = None, floor: float | None = None
) -> None:
    if ours and theirs:
        axes.plot([ours, theirs], [place, place], color=FAINT, linewidth=2, zorder=1)
    if theirs:
        axes.plot(theirs, place, "s", color=THEIRS, markerfacecolor=THEIRS if alike else "white", markersize=5)
    if floor:
        axes.plot(floor, place, "|", color="black", markersize=8)
    if ours:
        axes.plot(ours, place, "o", color=OURS, markersize=5)


def _legend() -> list[Line2D]:
    def mark(marker: str, colour: str, label: str, fill: str | None = None) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=colour, markerfacecolor=fill or colour, label=label)

    return [
        mark("o", OURS, "ours"),
        mark("s", THEIRS, "torchvision"),
        mark("s", THEIRS, "the nearest it has", "white"),
        mark("|", "black", "floor: the bytes that must move"),
    ]
