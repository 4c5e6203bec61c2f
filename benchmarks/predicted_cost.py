"""How well is the cost of quantization predicted? Predicted beside measured differences to RoIAlign, as tables and a picture.

    python benchmarks/predicted_cost.py                           # the tables and the picture of docs/predicted_cost.md
    python benchmarks/predicted_cost.py --rough /data/coco/annotations/instances_val2017.json     # Mask R-CNN's table 2d, roughly
    python benchmarks/predicted_cost.py --rough /data/voc_animals/annotations/instances_val.json --stride 16 --sides 240 400 --ap 55.9 21.6

The numbers are in benchmarks/predicted_cost.csv, in AP: predictions of predict_cost.py with intervals over images, and what trained runs
differed by with intervals over seeds, or over images where there is one seed. A row without `measured` is a prediction of data that
nobody has trained on yet.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from scipy.stats import spearmanr
from torch import from_numpy
from torchvision.ops import box_iou

from roi_quantization.detection.alignment.ideal_localizer import IdealLocalizer
from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.data.annotations import as_coco, read_instances
from roi_quantization.detection.evaluation.sizes import resize_scales
from roi_quantization.detection.model.build import instantiate, read_operator
from roi_quantization.detection.report.style import LIGHT, WIDTH, render

HERE = Path(__file__).parent
COLOURS = (LIGHT.rounded, LIGHT.exact, LIGHT.floored, "#8c6bb1", "#5a9e6f", LIGHT.ink, "#b5485d")
THRESHOLDS = np.linspace(0.5, 0.95, 10)
ROUGH = ("pool", "warp", "pool_bins")


class Row(NamedTuple):
    """Differences to RoIAlign in AP, each (value, low, high). NaN where there is none."""

    setting: str
    operator: str
    predicted: tuple[float, float, float]
    measured: tuple[float, float, float]

    @property
    def error(self) -> float:
        return self.predicted[0] - self.measured[0]


def read_rows(path: Path) -> list[Row]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))

    def numbers(row: dict[str, str], name: str) -> tuple[float, float, float]:
        return tuple(float(row[key] or "nan") for key in (name, f"{name}_low", f"{name}_high"))

    return [Row(row["setting"], row["operator"], numbers(row, "predicted"), numbers(row, "measured")) for row in rows]


def format_tables(rows: list[Row]) -> str:
    """Format the rows, and the errors of each setting and of all, as Markdown."""
    lines = ["| setting | operator | predicted | measured | error |", "|---|---|---|---|---|"]
    for row in rows:
        error = "not measured yet" if np.isnan(row.error) else f"{row.error:+.1f}"
        lines.append(f"| {row.setting} | `{row.operator}` | {_text(row.predicted)} | {_text(row.measured)} | {error} |")
    lines += ["", "| setting | operators | mean absolute error | rank correlation |", "|---|---|---|---|"]
    measured = [row for row in rows if not np.isnan(row.error)]
    groups = {name: list(some) for name, some in groupby(measured, key=lambda row: row.setting)}
    for name, some in {**groups, "all": measured}.items():
        rank = spearmanr([row.predicted[0] for row in some], [row.measured[0] for row in some]).statistic if len(some) > 3 else np.nan
        correlation = "-" if np.isnan(rank) else f"{rank:.2f}"
        lines.append(f"| {name} | {len(some)} | {np.mean([abs(row.error) for row in some]):.2f} | {correlation} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Plot predicted against measured differences with their intervals. On the diagonal the prediction is right."""
    measured = [row for row in rows if not np.isnan(row.error)]

    def draw(_) -> Figure:
        figure = Figure(figsize=(WIDTH, WIDTH + 0.8), layout="constrained")
        axes = figure.subplots()
        settings = groupby(measured, key=lambda row: row.setting)
        for (name, some), colour, marker in zip(settings, cycle(COLOURS), cycle("osDP^vX*"), strict=False):
            some = list(some)
            predicted, found = np.array([row.predicted for row in some]).T, np.array([row.measured for row in some]).T
            spans = [np.nan_to_num(np.abs(ends[1:] - ends[0])) for ends in (predicted, found)]
            axes.errorbar(
                predicted[0], found[0], xerr=spans[0], yerr=spans[1], fmt=marker, color=colour, markersize=4.5, elinewidth=0.7, label=name
            )
        ends = [min(min(row.predicted[0], row.measured[0]) for row in measured) - 4, 6]
        axes.plot(ends, ends, color=LIGHT.faint, linewidth=1, zorder=0)
        axes.set(xlim=ends, ylim=ends, aspect="equal", xlabel="predicted AP - AP of RoIAlign, points", ylabel="measured, points")
        figure.legend(loc="outside lower center", ncols=2, fontsize="small", columnspacing=1, handlelength=1)
        return figure

    atomic_write(path, render(draw, LIGHT, "png"))


def rough_prediction(
    coco: COCO, measured: Mapping[str, float], stride: int, short_side: int, max_side: int, operators: Sequence[str], draws: int = 20
) -> tuple[float, dict[str, np.ndarray]]:
    """Predict differences to RoIAlign from the objects' sizes and three numbers of a RoIAlign detector, without its detections.

    Each object is detected with an error of its edges that is normal, in proportion to the object's side. One number, the spread of the
    errors, is chosen so that AP75 / AP50 is that of the detector. RoIs are objects moved by a tenth of their side. The share of the
    objects that is found and classified is the detector's AP50, whatever their size.

    Args:
        coco: annotations.
        measured: AP50 and AP75 of the detector with RoIAlign.
        stride, short_side, max_side: of the detector.
        operators: names in configs/roi.
        draws: of each object's place in its cell, RoI and error.

    Returns:
        The AP of RoIAlign that follows, and for each operator the differences in AP, AP50 and AP75.
    """
    scales = resize_scales(coco, short_side, max_side)
    xywh = [np.array(a["bbox"]) * scales[a["image_id"]] / stride for a in coco.anns.values() if not a["iscrowd"]]
    corners, sides = np.split(np.tile(xywh, (draws, 1)), 2, axis=1)
    rng, sides = np.random.default_rng(0), np.tile(sides, 2)
    corners = corners + rng.uniform(0, 1, corners.shape)
    objects = np.concatenate([corners, corners + sides[:, 2:]], axis=1)
    rois, noise = objects + 0.1 * sides * rng.normal(size=objects.shape), sides * rng.normal(size=objects.shape)
    usable = (_iou(rois, objects) >= 0.5) & (rois[:, 2:] > rois[:, :2]).all(axis=1)
    objects, rois, noise = objects[usable], rois[usable], noise[usable]

    def recall(detections: np.ndarray) -> np.ndarray:
        return (_iou(detections, objects)[:, None] >= THRESHOLDS).mean(axis=0)

    spreads = np.linspace(0.01, 0.4, 196)
    curves = [recall(objects + spread * noise) for spread in spreads]
    best = int(np.argmin([abs(curve[5] / curve[0] - measured["AP75"] / measured["AP50"]) for curve in curves]))
    scale = measured["AP50"] / curves[best][0]
    changes = {}
    for name in operators:
        localizer = IdealLocalizer(instantiate(read_operator(name)), (rois[:, 2:] - rois[:, :2]).ravel())
        moved, is_empty = localizer.localize(rois, objects + spreads[best] * noise)
        moved[is_empty] = 0
        change = scale * (recall(moved) - curves[best])
        changes[name] = np.array([change.mean(), change[0], change[5]])
    return scale * curves[best].mean(), changes


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return box_iou(from_numpy(a)[:, None], from_numpy(b)[:, None])[:, 0, 0].numpy()


def _text(interval: tuple[float, float, float]) -> str:
    value, low, high = interval
    if np.isnan(value):
        return ""
    return f"{value:+.1f}" + ("" if np.isnan(low) else f" [{low:+.1f}, {high:+.1f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=HERE / "predicted_cost.csv", help="the numbers")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs/images/predicted_cost.png")
    parser.add_argument("--rough", type=Path, help="annotations: predict roughly from the sizes of their objects instead")
    parser.add_argument("--ap", type=float, nargs=2, default=(55.3, 36.4), help="AP50 and AP75 of a detector with RoIAlign (Mask R-CNN's)")
    parser.add_argument("--stride", type=int, default=32)
    parser.add_argument("--sides", type=int, nargs=2, default=(800, 1333), help="shorter side of the images, and limit of the longer one")
    arguments = parser.parse_args()
    if arguments.rough:
        measured, coco = dict(zip(("AP50", "AP75"), arguments.ap, strict=True)), as_coco(read_instances(arguments.rough))
        level, changes = rough_prediction(coco, measured, arguments.stride, *arguments.sides, ROUGH)
        print(f"With RoIAlign AP would be {level:.1f}. Differences to it in AP, AP50 and AP75:")
        print("\n".join(f"{name:<12}" + "".join(f"{value:+7.1f}" for value in change) for name, change in changes.items()))
        return
    rows = read_rows(arguments.rows)
    print(format_tables(rows))
    plot(rows, arguments.picture)


if __name__ == "__main__":
    main()
