"""The report's tables: formatted text for readers, CSV with all digits for programs."""

import csv
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import spearmanr

from roi_quantization.detection.evaluation.localisation import EDGES
from roi_quantization.detection.evaluation.protocol import SEGM
from roi_quantization.detection.evaluation.statistics import Estimate, estimate_over_seeds_and_images
from roi_quantization.detection.report.findings import METRIC, METRICS, Findings

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
    """A table whose rows hold numbers, which its columns format. `name` is that of its file, `note` stands below it."""

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
        """The table as CSV. An estimate takes five columns: value, low, high, p and n."""
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


def format_number(digits: int = 1, signed: bool = False) -> Callable[[Cell], str]:
    def form(cell: Cell) -> str:
        return "-" if cell == "" or math.isnan(cell) else f"{cell:{'+' if signed else ''}.{digits}f}"

    return form


def format_estimate(signed: bool = False) -> Callable[[Cell], str]:
    """Return a formatter to `76.2 ± 2.1` (half the interval), to both ends where it is not symmetric, or to the value alone."""

    def form(cell: Cell) -> str:
        if not isinstance(cell, Estimate):
            return "reference" if cell == "" else str(cell)
        up, down = cell.high - cell.value, cell.value - cell.low
        if not cell.has_interval or not math.isclose(up, down, rel_tol=1e-6, abs_tol=1e-9):
            return cell.text(signed=signed)
        return f"{cell.value:{'+' if signed else ''}.1f} ± {up:.1f}"

    return form


def format_p_value(cell: Cell) -> str:
    if cell == "" or math.isnan(cell):
        return "-"
    return "< 0.001" if cell < 0.001 else f"{cell:.3f}"


def main_table(findings: Findings) -> Table:
    """Return the metrics of every arm, and the difference of its AP to the reference's."""
    changes = findings.differences[METRIC]
    corrected = findings.corrected_p_values[METRIC]
    of_p = _describe_p_values(corrected)
    rows = []
    for arm in findings.arms:
        change = changes.get(arm, "" if arm == findings.reference else "-")
        p_values = (change.p_value if isinstance(change, Estimate) else "", corrected.get(arm, "")) if of_p else ()
        first, *others = (findings.means[metric][arm] for metric in METRICS)
        rows.append((arm, first, change, *p_values, *others, *findings.describe_operator(arm), len(findings.runs(arm))))
    of_images = "images, a bootstrap. There is one seed, so the variation between trainings is unknown"
    interval = "seeds, Student's t" if findings.varies_over == "seeds" else of_images
    seen = "the same images, proposals and sampled RoIs" if findings.has_given_proposals else "the same images"
    paired = f"Differences are paired: within a seed all operators start from the same weights and see {seen}."
    if not findings.is_controlled:
        paired = "Differences are those of runs with the same seed, and the runs differ in more than the operator."
    first, *others = (Column(metric, format_estimate()) for metric in METRICS)
    apart = Column(f"{METRIC} - {findings.reference}", format_estimate(signed=True))
    numbers = (first, apart, *(Column(name, format_p_value) for name in ("p", "p, Holm") if of_p), *others)
    runs = {arm: len(findings.runs(arm)) for arm in findings.arms}
    fewer = {arm: change.n for arm, change in changes.items() if change.n < max(runs[arm], runs[findings.reference])}
    if fewer and findings.varies_over == "seeds":
        paired += " Of fewer seeds, those of both operators: " + ", ".join(f"{arm} {n}" for arm, n in fewer.items()) + "."
    return Table(
        "main",
        "Accuracy of every operator",
        (Column("operator"), *numbers, *map(Column, ("RoI", "bins", "of a bin", "runs"))),
        tuple(rows),
        f"Percent. ± is the 95 % interval over {interval}. {paired}{of_p}",
    )


def masks_table(findings: Findings) -> Table | None:
    """Return AP, AP75 and AP90 of the masks, each with its difference to the reference's. None where none were evaluated."""
    if not findings.sweep.has_masks:
        return None
    shown, columns = [f"{SEGM}{metric}" for metric in ("AP", "AP75", "AP90")], [Column("operator")]
    for metric in shown:
        columns += [Column(metric, format_estimate()), Column(f"{metric} - {findings.reference}", format_estimate(signed=True))]
    rows = []
    for arm in findings.arms:
        missing = "" if arm == findings.reference else "-"
        cells = ((findings.means[metric][arm], findings.differences[metric].get(arm, missing)) for metric in shown)
        rows.append((arm, *(cell for pair in cells for cell in pair)))
    return Table(
        "masks",
        "Accuracy of the masks",
        tuple(columns),
        tuple(rows),
        "COCO's AP of masks, in percent, with intervals as above. segm_AP90 counts a mask as right from an IoU of 0.9 on: of the three it "
        "depends most on where the boundary is.",
    )


def differences_table(findings: Findings) -> Table:
    """Return the differences to the reference in every metric, with plain and corrected p-values."""
    changes = findings.differences
    corrected = findings.corrected_p_values
    of_p = _describe_p_values(*corrected.values())
    columns, rows = [Column("operator")], {arm: [arm] for arm in changes[METRIC]}
    for metric in METRICS:
        columns += [Column(metric, format_estimate(signed=True))]
        columns += [Column(name, format_p_value) for name in (f"p of {metric}", f"p of {metric}, Holm") if of_p]
        for arm, row in rows.items():
            row += [changes[metric][arm], *((changes[metric][arm].p_value, corrected[metric][arm]) if of_p else ())]
    title = f"Paired differences to {findings.reference}"
    return Table("differences", title, tuple(columns), tuple(map(tuple, rows.values())), f"Points of AP.{of_p}")


def _describe_p_values(*corrected: Mapping[str, float]) -> str:
    """Say what p and Holm's p are, and for how many comparisons a group was corrected. Empty where there are none, as of one seed."""
    if all(math.isnan(p) for group in corrected for p in group.values()):
        return ""
    counts = sorted({len(group) for group in corrected})
    number = " or ".join(map(str, counts))
    return f" p is two-sided and of one comparison. Holm's p is corrected for {number} comparison{'s' * (counts[-1] > 1)}."


def images_table(findings: Findings) -> Table | None:
    """Return the differences with intervals over images. None for one seed, where all intervals are over images already."""
    if findings.varies_over == "images" or not findings.other_arms:
        return None
    changes, over_seeds = findings.differences_over_images, findings.differences[METRIC]
    both = {arm: estimate_over_seeds_and_images(over_seeds[arm], change) for arm, change in changes[METRIC].items()}
    rows = [(arm, *(changes[metric][arm] for metric in METRICS), both[arm]) for arm in both]
    columns = [Column("operator"), *(Column(metric, format_estimate(signed=True)) for metric in METRICS)]
    columns += [Column(f"{METRIC}, new seeds and images", format_estimate(signed=True))]
    return Table(
        "images",
        f"Paired differences to {findings.reference}, with intervals over images",
        tuple(columns),
        tuple(rows),
        f"Points of AP, mean over the same runs. In brackets the 95 % interval over the {len(findings.image_ids)} images, "
        "by a bootstrap that resamples all operators and seeds together: how the difference of these trained weights varies with the "
        "images. The intervals above are over seeds: how it varies from one training to the next on the same images. The last is over "
        "both, of new trainings on new images: the distances of its ends are the roots of the sums of the squares of theirs.",
    )


def costs_table(findings: Findings) -> Table | None:
    """Return the costs of the 2 x 2 factorial design. None where it is incomplete."""
    if not findings.costs:
        return None
    first, *others = (findings.costs[metric] for metric in METRICS)
    has_p = any(not math.isnan(first[name].p_value) for name in COSTS)  # one seed has none
    rows = [
        (words, first[name], *([first[name].p_value] if has_p else []), *(costs[name] for costs in others)) for name, words in COSTS.items()
    ]
    columns = [Column("cost of"), *(Column(metric, format_estimate(signed=True)) for metric in METRICS)]
    of_p = " p is two-sided and not corrected for the number of comparisons." if has_p else ""
    if has_p:
        columns.insert(2, Column("p", format_p_value))
    return Table(
        "costs",
        f"What each quantization costs{', all else equal' if findings.is_controlled else ''}",
        tuple(columns),
        tuple(rows),
        "Points lost to {exact, rounded RoI} x {exact, whole-cell bins} with max pooling and without + 1: align_max, warp_max, pool_bins, "
        f"pool_exclusive{findings.seeds_of_costs}. Whole-cell bins make a RoI of less than a cell one cell, exact bins do not. A negative "
        f"interaction means that the second quantization costs less after the first.{of_p}",
    )


def localisation_table(findings: Findings) -> Table | None:
    """Return localisation errors before and after regression. None where the results have no proposals."""
    rows = []
    for arm in findings.arms:
        of_seeds = findings.localisations(arm)
        summaries = [one.summary() for one in of_seeds if len(one)]
        if not summaries or not all("before" in summary for summary in summaries):
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
            Column("found, %", format_number()),
            Column("IoU before", format_number(3)),
            Column("IoU after", format_number(3)),
            Column("px off before", format_number()),
            Column("px off after", format_number()),
            *(Column(edge, format_number(1, signed=True)) for edge in EDGES),
        ),
        tuple(rows),
        "Of detections matched at IoU 0.5: mean IoU with the object, median distance of the edges in pixels, and the mean signed offset of "
        "each edge after regression (positive: right, down). Mean over the seeds that an operator has.",
    )


def sizes_table(findings: Findings) -> Table:
    of_pixels, of_cells = next(iter(findings.by_pixels.values())), next(iter(findings.by_cells.values()))
    rows = [(arm, *findings.by_pixels[arm].values(), *findings.by_cells[arm].values()) for arm in findings.arms]
    names = [f"AP {size}" for size in (*of_pixels, *of_cells)]
    cells = f", and in cells of {findings.stride} pixels of the network's input" if of_cells else ""
    return Table(
        "sizes",
        "AP by the size of the object",
        (Column("operator"), *(Column(name, format_number()) for name in names)),
        tuple(rows),
        f"Size is the square root of the object's area: in pixels of the image{cells}. Mean over the seeds that an operator has.",
    )


def cross_table(findings: Findings, metric: str = METRIC) -> Table | None:
    """Return the cross-evaluation, trained in rows, tested in columns. None where there is none."""
    if not findings.cross:
        return None
    matrix = findings.cross[metric]
    tested = tested_operators(findings, metric)
    rows = [(arm, *(matrix[arm].get(other, "") for other in tested)) for arm in matrix]
    return Table(
        "cross",
        f"Trained with one operator, tested with another: {metric}",
        (Column("trained with"), *(Column(f"tested: {name}", format_number()) for name in tested)),
        tuple(rows),
        "Mean over the seeds that an operator has.",
    )


def tested_operators(findings: Findings, metric: str = METRIC) -> list[str]:
    """Return the operators that another arm was tested with, in the order of the arms, others last."""
    matrix = findings.cross[metric]
    others = {other for arm, of_arm in matrix.items() for other in of_arm if other != arm}
    return [*(arm for arm in findings.arms if arm in others), *sorted(others - set(findings.arms))]


def misalignment_table(findings: Findings) -> Table | None:
    if not findings.misalignment:
        return None
    keys = {"iou": 3, "bin_iou": 3, "lost": 1, "gained": 1, "shift_x": 1, "shift_y": 1, "distance": 1}
    names = ("IoU of RoI", "IoU of bins", "lost, %", "gained, %", "right, px", "down, px", "centre off, px")
    rows = [(arm, *(findings.misalignment[arm][key] for key in keys), findings.means[METRIC][arm].value) for arm in findings.misalignment]
    columns = [Column(n, format_number(d, n.endswith("px") and "centre" not in n)) for n, d in zip(names, keys.values(), strict=True)]
    boxes = next(iter(findings.misalignment.values()))["boxes"]
    return Table(
        "misalignment",
        "Sampled region of each operator, before any training",
        (Column("operator"), *columns, Column(METRIC, format_number())),
        tuple(rows),
        f"Mean over the {boxes} RoIs of {findings.reference}'s detections: IoU of the RoI, and of each bin, with the sampled region. "
        "The RoI's area outside that region and the region's area outside the RoI, in percent of the RoI. The centre's offset.",
    )


def predicted_table(findings: Findings) -> Table | None:
    """Return the predicted differences to the reference beside the measured ones. None where nothing can be predicted."""
    predicted = findings.predicted
    if not predicted:
        return None
    rows = []
    for arm, of_arm in predicted.items():
        measured = findings.differences[METRIC][arm]
        others = (cell for metric in METRICS[1:] for cell in (of_arm[metric], findings.differences[metric][arm]))
        rows.append((arm, of_arm[METRIC], measured, of_arm[METRIC] - measured.value, *others))
    error = np.mean([abs(row[3]) for row in rows])
    note = (
        f"Points. The prediction adds the errors that each operator makes unavoidable to {findings.reference}'s own detections, without "
        f"training (docs/predicted_cost.md). Mean absolute error in {METRIC}: {error:.1f} points."
    )
    ranked = np.round([(row[1], row[2].value) for row in rows], 6)  # predictions of 0 are equal but for the last bits
    if len(rows) > 2 and np.ptp(ranked, axis=0).all():
        note += f" Rank correlation: {spearmanr(*ranked.T).statistic:.2f}."
    columns = [Column("operator"), Column(f"predicted {METRIC}", format_number(1, signed=True))]
    columns += [Column(f"measured {METRIC}", format_estimate(signed=True)), Column("error", format_number(1, signed=True))]
    for metric in METRICS[1:]:
        columns += [Column(f"predicted {metric}", format_number(1, signed=True))]
        columns += [Column(f"measured {metric}", format_estimate(signed=True))]
    return Table("predicted", f"Predicted and measured differences to {findings.reference}", tuple(columns), tuple(rows), note)


def make_tables(findings: Findings) -> dict[str, Table]:
    make = (
        main_table,
        masks_table,
        costs_table,
        images_table,
        differences_table,
        localisation_table,
        sizes_table,
        misalignment_table,
        predicted_table,
        cross_table,
    )
    tables = [table for table in (build(findings) for build in make) if table is not None]
    return {table.name: _mark_partial(table, findings.sweep.partial) for table in tables}


def _mark_partial(table: Table, partial: str) -> Table:
    """Name a partial evaluation in the title, and in a column of its own, which the CSV has too."""
    if not partial:
        return table
    columns, rows = (*table.columns, Column("evaluated on")), tuple((*row, partial) for row in table.rows)
    return replace(table, title=f"{table.title} ({partial})", columns=columns, rows=rows)
