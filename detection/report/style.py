"""How the report's figures look: on light and on dark ground, in the width of a phone, to the colour-blind and in grey."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig

WIDTH = 4.7  # inches; at 9 points a text can still be read when 360 pixels show it all


@dataclass(frozen=True)
class Theme:
    """ink: of text and axes. exact, rounded, floored: what an operator does to the RoI; colours apart in hue and,
    for what is compared most, in lightness."""

    ink: str
    faint: str
    exact: str
    rounded: str
    floored: str

    @property
    def settings(self) -> dict:
        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
        return dict.fromkeys(inked, self.ink) | {
            "grid.color": self.faint,
            "font.size": 9,
            "axes.titlesize": 9.5,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "report",  # the same figure is the same file
        }


LIGHT = Theme(ink="#1c1c1c", faint="#d5d5d5", exact="#00568f", rounded="#e08214", floored="#8c3b7a")
DARK = Theme(ink="#e4e4e4", faint="#444444", exact="#a6d5f7", rounded="#e08214", floored="#e08fc8")


@dataclass(frozen=True)
class Look:
    """One arm's: the colour says what becomes of the RoI; the marker and the line what becomes of its bins; hollow is a mean."""

    colour: str
    marker: str
    line: str
    filled: bool

    @property
    def point(self) -> dict:
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": self.colour if self.filled else "none"}


def look(roi: DictConfig, theme: Theme) -> Look:
    colour = {"none": theme.exact, "round": theme.rounded, "floor": theme.floored}[roi.get("quantize_roi", "none")]
    whole = roi.get("quantize_bins", "none") != "none"
    line = ":" if colour == theme.floored else "--" if whole else "-"
    return Look(colour, "s" if whole else "o", line, roi.get("reduce") == "max")


def rows(axes: Axes, names: list[str]) -> range:
    """Makes the y axis a list of names, the first on top, and returns their places."""
    places = range(len(names))
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    return places


def height(lines: int) -> float:
    """Inches of a figure with so many rows."""
    return 0.25 * lines + 0.9


def rendered(draw: Callable[[Theme], Figure], theme: Theme, kind: str, transparent: bool = False) -> bytes:
    """A figure as a file: `kind` svg or png."""
    with matplotlib.rc_context(theme.settings):
        figure = draw(theme)
        buffer = io.BytesIO()
        ground = {"transparent": True} if transparent else {"facecolor": "white"}
        dated = {"metadata": {"Date": None}} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=160, **ground, **dated)
    return buffer.getvalue()
