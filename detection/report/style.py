"""Style of the report's figures: light and dark themes, phone width, colours that remain distinct to the colour-blind and in grey."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from roi_quantization.detection.alignment.misalignment import Operator, lattice_rule, reduction

WIDTH = 4.7  # inches: text of 9 points is legible when the figure is 360 pixels wide


@dataclass(frozen=True)
class Theme:
    """Colours. `ink` is that of text and axes. `exact`, `rounded` and `floored` show what an operator does to the RoI, `unknown` that it is
    of another project.
    """

    ink: str
    faint: str
    unknown: str
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
            "text.parse_math": False,  # names of arms are text
            "svg.hashsalt": "report",  # the same figure gives the same bytes
        }


LIGHT = Theme(ink="#1c1c1c", faint="#d5d5d5", unknown="#7a7a7a", exact="#00568f", rounded="#e08214", floored="#8c3b7a")
DARK = Theme(ink="#e4e4e4", faint="#444444", unknown="#9a9a9a", exact="#a6d5f7", rounded="#e08214", floored="#e08fc8")


@dataclass(frozen=True)
class ArmStyle:
    """Style of one arm. The colour shows the treatment of the RoI, marker and line that of the bins. Hollow markers are means."""

    colour: str
    marker: str
    line: str
    filled: bool

    @property
    def point(self) -> dict:
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": self.colour if self.filled else "none"}


def arm_style(operator: Operator | None, theme: Theme) -> ArmStyle:
    """Return the style of an arm. None is an operator of another project, whose rounding is not known."""
    if operator is None:
        return ArmStyle(theme.unknown, "D", "-.", filled=True)
    rule = lattice_rule(operator)
    if rule is None:  # PrRoIPool
        return ArmStyle(theme.exact, "o", "-", filled=False)
    colour = {"none": theme.exact, "round": theme.rounded, "floor": theme.floored}[rule.quantize_roi]
    whole = rule.quantize_bins != "none"
    line = ":" if colour == theme.floored else "--" if whole else "-"
    return ArmStyle(colour, "s" if whole else "o", line, reduction(operator) == "max")


def label_rows(axes: Axes, names: list[str]) -> range:
    """Label the y axis with names, the first on top, and return their positions."""
    positions = range(len(names))
    axes.set_yticks(positions, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    return positions


def figure_height(lines: int) -> float:
    """Return the height in inches of a figure with so many rows."""
    return 0.25 * lines + 0.9


def render(draw: Callable[[Theme], Figure], theme: Theme, kind: str, transparent: bool = False) -> bytes:
    """Render a figure to the bytes of an SVG or PNG file, as `kind` says."""
    with matplotlib.rc_context(theme.settings):
        figure = draw(theme)
        buffer = io.BytesIO()
        ground = {"transparent": True} if transparent else {"facecolor": "white"}
        dated = {"metadata": {"Date": None}} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=160, **ground, **dated)
    return buffer.getvalue()
