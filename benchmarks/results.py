"""The measurements of `roi_operators.py` as text, 110 columns wide, and as a figure."""

import io
import math
import textwrap
from collections import defaultdict

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

WIDTH = 110
MEASURED = {  # quantity -> its title, and what the right half of its table shows; in the order of printing
    "called": ("ms, as called", "backward"),
    "gpu": ("ms, the GPU alone", "backward"),
    "memory": ("peak memory, MiB", "forward and backward"),
}
OURS, TORCHVISION, GREY = "#00568f", "#e08214", "#d5d5d5"  # differ in hue and lightness, and the markers in shape


def table(found: dict) -> str:
    """Format one table for each quantity, then the list of failures."""
    notes = (
        f"a large copy runs at {found['copy_gb_s']:.1f} GB/s. floor: the time that the bytes that must move take at this speed (of memory: "
        "the results alone), as a share of ours. In brackets: the operator of torchvision that is nearest, where it has not the same"
    )
    parts = [f"{textwrap.fill(found['machine'], WIDTH)}\n{textwrap.fill(notes, WIDTH)}"]
    parts += [_quantity_table(what, found["rows"]) for what in MEASURED if what in found["rows"][0]]
    if found["failures"]:
        parts.append(_failures(found["failures"]))
    return "\n\n".join(parts)


def _quantity_table(what: str, rows: list[dict]) -> str:
    title, right = MEASURED[what]
    half = f"{'ours':>9}{'theirs':>9}{'ratio':>10}{'floor':>8}"
    lines = [f"{title:36}{'forward':^36} {right:^36}".rstrip(), f"{'shape':12}{'operator':11}{'theirs':12}{half}{half}"]
    for row in rows:
        cells = [row[what].get(direction, {}) for direction in ("forward", "backward")]
        theirs = row["against"] if row["alike"] else f"({row['against']})"
        lines.append(f"{row['shape']:12}{row['operator']:11}{theirs:12}" + "".join(_direction_cells(**cell) for cell in cells))
    return "\n".join(lines)


def _direction_cells(ours: float | None = None, theirs: float | None = None, floor: float | None = None) -> str:
    ratio = f"{_digits(theirs / ours)} x" if ours and theirs else "-"
    return f"{_digits(ours):>9}{_digits(theirs):>9}{ratio:>10}{f'{floor / ours:.0%}' if ours else '-':>8}"


def _digits(number: float | None) -> str:
    """Format a number with three significant digits and no exponent."""
    if number is None:
        return "-"
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}" if number > 0 else "0"


def _failures(failures: list[dict]) -> str:
    """List the failures; one line for the same failure of several shapes."""
    shapes = defaultdict(list)
    for failure in failures:
        shapes[failure["operator"], failure["what"], failure["why"]].append(failure["shape"])
    lines = [f"{who}, {what} ({', '.join(where)}): {' '.join(why.split())}" for (who, what, why), where in shapes.items()]
    return "\n".join(["not measured:", *(textwrap.shorten(line, WIDTH - 2, placeholder=" ...") for line in lines)])


def picture(found: dict) -> bytes:
    """Draw the times of all rows: those of the GPU alone where there are any, else as called. Returns a PNG."""
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
        axes.grid(axis="x", color=GREY, linewidth=0.5)
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
    """Return the y coordinate of each row, and the labels by theirs: the name of a shape stands above its operators."""
    places, labels, y, shape = [], {}, 0.0, None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            y += 0.5
            labels[y] = shape
            y += 1
        labels[y] = row["operator"]
        places.append(y)
        y += 1
    return places, labels


def _draw(
    axes: Axes, place: float, alike: bool, ours: float | None = None, theirs: float | None = None, floor: float | None = None
) -> None:
    if ours and theirs:
        axes.plot([ours, theirs], [place, place], color=GREY, linewidth=2, zorder=1)
    if theirs:
        axes.plot(theirs, place, "s", color=TORCHVISION, markerfacecolor=TORCHVISION if alike else "white", markersize=5)
    if floor:
        axes.plot(floor, place, "|", color="black", markersize=8)
    if ours:
        axes.plot(ours, place, "o", color=OURS, markersize=5)


def _legend() -> list[Line2D]:
    def mark(marker: str, colour: str, label: str, fill: str | None = None) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=colour, markerfacecolor=fill or colour, label=label)

    return [
        mark("o", OURS, "ours"),
        mark("s", TORCHVISION, "torchvision"),
        mark("s", TORCHVISION, "the nearest of torchvision", "white"),
        mark("|", "black", "floor: the bytes that must move"),
    ]
