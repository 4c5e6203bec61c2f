"""The ceilings and predictions of `predicted_cost.py` as tables, one sentence and a figure."""

import os
from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.evaluation.statistics import Estimate
from roi_quantization.detection.report.predicted_cost import SIZES, SMALL, Ceiling
from roi_quantization.detection.report.prose import paper_name
from roi_quantization.detection.report.style import LIGHT, WIDTH, figure_height, label_rows, render

Ceilings = Mapping[str, Ceiling]
Differences = Mapping[str, Mapping[str, Estimate]]


def format_ceilings(ceilings: Ceilings, reference: str, stride: int) -> str:
    """Format the ceilings of all operators at one stride as a table of at most 100 columns."""
    head = ("AP", "AP50", "AP75", "mean IoU", f"AP - {reference}", *SIZES)
    form = "{:<16}{:>7}{:>7}{:>7}{:>10}{:>12}" + "{:>10}" * len(SIZES)
    lines = [f"Ceiling at stride {stride}: what a head without other errors reaches; AP by size of the object in cells on the right"]
    lines += [form.format("", *head)]
    best = ceilings[reference].metrics()["AP"]
    for name, of_operator in ceilings.items():
        m = of_operator.metrics()
        change = "" if name == reference else f"{m['AP'] - best:+.1f}"
        sizes = (_number(of_operator.metrics(*ends)["AP"]) for ends in SIZES.values())
        lines.append(form.format(name, *(_number(m[key]) for key in ("AP", "AP50", "AP75")), _number(m["mean_iou"], 3), change, *sizes))
    counts = (str(ceilings[reference].metrics(*ends)["objects"]) for ends in SIZES.values())
    lines.append(form.format("objects", *[""] * 5, *counts))
    return "\n".join(lines)


def format_prediction(predicted: Differences, reference: str, stride: int, images: int) -> str:
    """Format the predicted differences to the reference at one stride as a table."""
    own = predicted[reference]
    lines = [
        f"Prediction at stride {stride} from the detections of {reference}, whose AP is {own['AP'].text()}: differences to it, with 95 %",
        f"intervals over the {images} images",
        f"{'':<16}" + "".join(f"{metric:>24}" for metric in own),
    ]
    for name, of_operator in predicted.items():
        if name != reference:
            lines.append(f"{name:<16}" + "".join(f"{estimate.text(signed=True):>24}" for estimate in of_operator.values()))
    return "\n".join(lines)


def summarize_cost(
    ceilings: Mapping[int, Ceilings], predictions: Mapping[int, Differences], reference: str, stride: int, operator: str = "pool"
) -> str:
    """State what RoIPool, or the operator that loses most, costs at a stride and at half of it, and of a ceiling on which objects."""
    here = ceilings[stride]

    def cost(of: str, at: int) -> float:
        if predictions:
            change = predictions[at][of]["AP"].value
        else:
            change = ceilings[at][of].metrics()["AP"] - ceilings[at][reference].metrics()["AP"]
        return -round(float(change), 1)  # as shown, so that a gain of 0.0 is none

    others = [name for name in here if name != reference]
    if not others:
        return "There is no other operator to compare with."
    name = operator if operator in others else max(others, key=lambda one: cost(one, stride))
    loss, share = cost(name, stride), here[name].share_of_small(here[reference])
    verbs = ("is expected to cost", "is expected to gain") if predictions else ("lowers the ceiling by", "raises the ceiling by")
    words = f"At stride {stride} {paper_name(name)} {verbs[loss < 0]} {abs(loss):.1f} AP on this set"
    if not predictions and not np.isnan(share):  # the share is of the ceilings' difference
        words += f", {share:.0%} of it on objects smaller than {SMALL:g} cells"
    half = stride // 2
    if stride % 2 or half not in ceilings:
        return f"{words}."
    of_half = cost(name, half)
    kind = ("a loss of ", "a gain of ")[of_half < 0] if loss * of_half < 0 else ""
    return f"{words}. A stride of {half} would make it {kind}{abs(of_half):.1f}."


def plot_costs(ceilings: Mapping[int, Ceilings], predictions: Mapping[int, Differences], reference: str, path: str | os.PathLike) -> None:
    """Plot the differences to the reference: of the ceilings (hollow), and predicted ones with their intervals (filled)."""
    names = [name for name in next(iter(ceilings.values())) if name != reference]
    colours = (LIGHT.exact, LIGHT.rounded, LIGHT.floored, LIGHT.ink)

    def draw(_) -> Figure:
        figure = Figure(figsize=(WIDTH, figure_height(len(names) * max(1, len(ceilings) // 2)) + 0.4), layout="constrained")
        axes = figure.subplots()
        for y, name in zip(label_rows(axes, names), names, strict=True):
            for i, (stride, of_stride) in enumerate(ceilings.items()):
                shift = y + 0.22 * (i - (len(ceilings) - 1) / 2)
                colour = colours[i % len(colours)]
                change = of_stride[name].metrics()["AP"] - of_stride[reference].metrics()["AP"]
                axes.plot(change, shift, "o", color=colour, markerfacecolor="none", label=f"ceiling, stride {stride}" if y == 0 else None)
                if stride in predictions:
                    estimate = predictions[stride][name]["AP"]
                    if estimate.has_interval:
                        axes.plot([estimate.low, estimate.high], [shift, shift], color=colour, linewidth=1.6)
                    axes.plot(estimate.value, shift, "s", color=colour, label=f"predicted, stride {stride}" if y == 0 else None)
        axes.axvline(0, color=LIGHT.ink, linewidth=1)
        axes.set_xlabel(f"AP of the operator - AP of {reference}, points")
        if axes.get_legend_handles_labels()[0]:  # none of the reference alone
            figure.legend(loc="outside lower center", ncols=2)
        return figure

    with rc_context({"text.parse_math": False}):
        atomic_write(path, render(draw, LIGHT, "png"))


def _number(value: float, digits: int = 1) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"
