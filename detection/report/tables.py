"""The report's tables: as text for people, as CSV with all digits for programs."""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from roi_quantization.detection.evaluation.localisation import EDGES
from roi_quantization.detection.evaluation.statistics import Estimate
from roi_quantization.detection.report.findings import METRICS, Findings

Cell = str | int | float | Estimate
COSTS = {
    "projection": "rounding the RoI alone",
    "bins": "quantizing its bins alone",
    "both": "both together",
    "interaction": "interaction: both - sum of the two",
}


@dataclass(frozen=True)
class Column:
    name: str
    form: Callable[[Cell], str] = str

    @property
    def is_text(self) -> bool:
        return self.form is str


@dataclass(frozen=True)
class Table:
    """name: of its file. note: what a reader has to know beneath it. Rows hold numbers, which columns turn to text."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    @property
    def texts(self) -> list[list[str]]:
        return [[column.form(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]

    @property
    def csv(self) -> str:
        """Estimates become five columns: value, low, high, p and n."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        parts = ("", " low", " high", " p", " n")
        wide = [any(isinstance(row[i], Estimate) for row in self.rows) for i in range(len(self.columns))]
        writer.writerow([c.name + part for c, w in zip(self.columns, wide, strict=True) for part in (parts if w else parts[:1])])
        for row in self.rows:
            cells = []
            for cell, is_wide in zip(row, wide, strict=True):
                if isinstance(cell, Estimate):
                    cells += [cell.value, cell.low, cell.high, cell.p_value, cell.n]
                else:
                    cells += [cell] + [""] * (4 if is_wide else 0)
            writer.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in cells])
        return file.getvalue()


def number(digits: int = 1, signed: bool = False) -> Callable[[Cell], str]:
    def form(cell: Cell) -> str:
        return "-" if cell == "" or math.isnan(cell) else f"{cell:{'+' if signed else ''}.{digits}f}"

    return form


def estimate(signed: bool = False) -> Callable[[Cell], str]:
    """`76.2 ± 2.1`, the half width of the interval; with both ends where it is not symmetric, and alone where there is none."""

    def form(cell: Cell) -> str:
        if not isinstance(cell, Estimate):
            return "reference" if cell == "" else str(cell)
        up, down = cell.high - cell.value, cell.value - cell.low
        if not cell.has_interval or not math.isclose(up, down, rel_tol=1e-6, abs_tol=1e-9):
            return cell.text(signed=signed)
        return f"{cell.value:{'+' if signed else ''}.1f} ± {up:.1f}"

    return form


def p_value(cell: Cell) -> str:
    if cell == "" or math.isnan(cell):
        return "-"
    return "< 0.001" if cell < 0.001 else f"{cell:.3f}"


def main_table(found: Findings) -> Table:
    """Every arm: its metrics, and how its AP75 differs from the reference's."""
    rows = []
    for arm in found.arms:
        change = found.differences["AP75"].get(arm, "" if arm == found.reference else "-")
        p = change.p_value if isinstance(change, Estimate) else ""
        mean = {metric: found.means[metric][arm] for metric in METRICS}
        rows.append((arm, mean["AP75"], change, p, mean["AP"], mean["AP50"], *found.knobs(arm), len(found.runs(arm))))
    of_images = "images, a bootstrap: there is one seed, and how training varies is not known"
    interval = "seeds, Student's t" if found.over == "seeds" else of_images
    score, apart = estimate(), Column(f"AP75 - {found.reference}", estimate(signed=True))
    numbers = (Column("AP75", score), apart, Column("p", p_value), Column("AP", score), Column("AP50", score))
    return Table(
        "main",
        "Accuracy of every operator",
        (Column("operator"), *numbers, *map(Column, ("RoI", "bins", "of a bin", "runs"))),
        tuple(rows),
        f"Percent; ± is the 95 % interval over {interval}. Differences are paired: within a seed all operators start from the same weights "
        "and see the same images, proposals and sampled RoIs. p is two-sided and not corrected for the number of comparisons.",
    )


def differences_table(found: Findings) -> Table:
    rows = []
    for arm in found.others:
        changes = [found.differences[metric].get(arm) for metric in METRICS]
        if all(changes):
            rows.append((arm, *(cell for change in changes for cell in (change, change.p_value))))
    columns = [column for metric in METRICS for column in (Column(metric, estimate(signed=True)), Column(f"p of {metric}", p_value))]
    return Table("differences", f"Paired differences to {found.reference}", (Column("operator"), *columns), tuple(rows), "Points of AP.")


def images_table(found: Findings) -> Table | None:
    """The differences once more, with intervals over images; None where there is one seed, and all intervals are over images already."""
    if found.over == "images" or not found.others:
        return None
    changes = found.differences_over_images
    rows = [(arm, *(changes[metric][arm] for metric in METRICS)) for arm in changes["AP"]]
    return Table(
        "images",
        f"Paired differences to {found.reference}, had other images been drawn",
        (Column("operator"), *(Column(metric, estimate(signed=True)) for metric in METRICS)),
        tuple(rows),
        f"Points of AP, mean over the same runs. In brackets the 95 % interval of a bootstrap over the {len(found.image_ids)} images, all "
        "operators and seeds resampled together: how sure the difference is for these very weights. The intervals above say how it varies "
        "from one training to the next, on these very images.",
    )


def costs_table(found: Findings) -> Table | None:
    """The 2 x 2; None where it is not complete."""
    if not found.costs:
        return None
    costs = {metric: found.costs[metric] for metric in ("AP75", "AP", "AP50")}
    rows = [
        (words, costs["AP75"][name], costs["AP75"][name].p_value, costs["AP"][name], costs["AP50"][name]) for name, words in COSTS.items()
    ]
    change = estimate(signed=True)
    return Table(
        "costs",
        "What each quantization costs, all else equal",
        (Column("cost of"), Column("AP75", change), Column("p", p_value), Column("AP", change), Column("AP50", change)),
        tuple(rows),
        "Points lost to {exact, rounded RoI} x {exact, whole-cell bins} with the largest value of a bin and no + 1: align_max, warp_max, "
        "pool_bins, pool_exclusive. A negative interaction: the second quantization hurts less once the first has been done.",
    )


def localisation_table(found: Findings) -> Table | None:
    """Before and after regression; None where the results do not name their proposals."""
    rows = []
    for arm in found.arms:
        of_seeds = found.located(arm)
        summaries = [one.summary() for one in of_seeds if len(one)]
        if not summaries or "before" not in summaries[0]:
            continue
        recall = 100 * np.mean([len(one) / max(one.objects, 1) for one in of_seeds])
        numbers = [
            float(np.mean([s[when][key] for s in summaries]))
            for when, key in (("before", "iou"), ("after", "iou"), ("before", "off"), ("after", "off"))
        ]
        bias = [float(np.mean([s["after"][f"bias_{edge}"] for s in summaries])) for edge in EDGES]
        rows.append((arm, float(recall), *numbers, *bias))
    if not rows:
        return None
    return Table(
        "localisation",
        "Localisation of the objects found, before and after box regression",
        (
            Column("operator"),
            Column("found, %", number()),
            Column("IoU before", number(3)),
            Column("IoU after", number(3)),
            Column("px off before", number()),
            Column("px off after", number()),
            *(Column(edge, number(1, signed=True)) for edge in EDGES),
        ),
        tuple(rows),
        "Of detections matched at IoU 0.5: mean IoU with the object and median distance of its edges in pixels; then the mean offset of "
        "each edge after regression (positive: right, down), which is a bias and not a scatter. Mean over seeds.",
    )


def sizes_table(found: Findings) -> Table:
    of_pixels, of_cells = next(iter(found.by_pixels.values())), next(iter(found.by_cells.values()))
    rows = [(arm, *found.by_pixels[arm].values(), *found.by_cells[arm].values()) for arm in found.arms]
    names = [f"AP {size}" for size in (*of_pixels, *of_cells)]
    return Table(
        "sizes",
        "AP by the size of the object",
        (Column("operator"), *(Column(name, number()) for name in names)),
        tuple(rows),
        f"Size is the square root of the object's area: in pixels of the image, and in cells of {found.stride} pixels of the network's "
        "input. Mean over seeds.",
    )


def cross_table(found: Findings, metric: str = "AP75") -> Table | None:
    """Rows are trained, columns are tested; None where nothing was cross-evaluated."""
    if not found.cross:
        return None
    matrix = found.cross[metric]
    tested = tested_operators(found, metric)
    rows = [(arm, *(matrix[arm].get(other, "") for other in tested)) for arm in matrix]
    return Table(
        "cross",
        f"Trained with one operator, tested with another: {metric}",
        (Column("trained with"), *(Column(f"tested: {name}", number()) for name in tested)),
        tuple(rows),
        "Mean over seeds.",
    )


def tested_operators(found: Findings, metric: str = "AP75") -> list[str]:
    """In the order of the arms, those that are no arm behind; only operators that some other arm was tested with."""
    matrix = found.cross[metric]
    others = {other for arm, of_arm in matrix.items() for other in of_arm if other != arm}
    return [*(arm for arm in found.arms if arm in others), *sorted(others - set(found.arms))]


def misalignment_table(found: Findings) -> Table | None:
    if not found.misalignment:
        return None
    keys = {"iou": 3, "bin_iou": 3, "lost": 1, "gained": 1, "shift_x": 1, "shift_y": 1, "distance": 1}
    names = ("IoU of RoI", "IoU of bins", "lost, %", "gained, %", "right, px", "down, px", "centre off, px")
    rows = [(arm, *(found.misalignment[arm][key] for key in keys), found.means["AP75"][arm].value) for arm in found.misalignment]
    columns = [Column(n, number(d, n.endswith("px") and "centre" not in n)) for n, d in zip(names, keys.values(), strict=True)]
    boxes = next(iter(found.misalignment.values()))["boxes"]
    return Table(
        "misalignment",
        "What each operator really reads of a RoI, before any training",
        (Column("operator"), *columns, Column("AP75", number())),
        tuple(rows),
        f"Mean over {boxes} RoIs, those that {found.reference}'s detections were regressed from: overlap of the RoI, and of its bins one "
        "by one, with what the operator reads of them; the share of the RoI's area that is not read, and that is read beside it; how far "
        "the centre moves.",
    )


def all_tables(found: Findings) -> dict[str, Table]:
    make = (main_table, costs_table, images_table, differences_table, localisation_table, sizes_table, misalignment_table, cross_table)
    return {table.name: table for table in (build(found) for build in make) if table is not None}
