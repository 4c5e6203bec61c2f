"""Figures of a run: loss and AP curves, and detections on images.

Figures are built without pyplot, which keeps a reference to each and needs a display. The colours are Okabe and Ito's,
which remain distinct under the common kinds of colour blindness ("Color Universal Design", 2008).
"""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.data.images import ImageRecord, read_image
from roi_quantization.detection.data.masks import decode
from roi_quantization.detection.evaluation.fonts import plain_text

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
DPI = 130
MASK_OPACITY = 0.45


def plot_curves(metrics_csv: str | os.PathLike, path: str | os.PathLike) -> None:
    """Plot losses, and AP, AP50 and AP75 on the validation split, over the optimizer's steps.

    Args:
        metrics_csv: file of Lightning's CSVLogger with the columns `step` and `train/loss` (or `train/loss_step`). The
            columns `val/loss`, `val/AP`, `val/AP50` and `val/AP75` are drawn where they exist, and `val/AP_iou...` with its name.
        path: of the figure.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no training loss.
    """
    logged = _read_columns(metrics_csv)
    train = next((name for name in ("train/loss", "train/loss_step") if name in logged), None)
    if train is None:
        raise InputError(
            f"{metrics_csv} has no values of train/loss, only of {sorted(logged)}. Is it a CSVLogger's file of a training run?"
        )

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    losses, precision = figure.subplots(1, 2)

    steps, values = logged[train]
    window = max(1, len(values) // 25)
    smooth_steps, smooth = (np.convolve(x, np.full(window, 1 / window), mode="valid") for x in (steps, values))
    losses.plot(steps, values, color=COLOURS[1], linewidth=0.8, alpha=0.5)
    losses.plot(smooth_steps, smooth, color=COLOURS[6], label="train" if window == 1 else f"train, mean of {window} logged values")
    highest = smooth.max()
    if "val/loss" in logged:
        losses.plot(*logged["val/loss"], color=COLOURS[5], marker="o", markersize=4, label="val")
        highest = max(highest, logged["val/loss"][1].max())
    if math.isfinite(highest) and highest > 0:
        losses.set_ylim(0, 1.1 * highest)  # large losses of the first steps must not flatten the rest
    losses.set(title="Loss", xlabel="step")
    losses.legend(frameon=False)

    mean = next((name.removeprefix("val/") for name in logged if name.startswith("val/AP_iou")), "AP")  # over other thresholds than COCO's
    for name, colour, marker in (("AP50", COLOURS[2], "s"), ("AP75", COLOURS[0], "^"), (mean, "black", "o")):
        if f"val/{name}" in logged:
            steps, values = logged[f"val/{name}"]
            precision.plot(steps, values, color=colour, marker=marker, markersize=4, label=f"{name}, last {values[-1]:.1f}")
    precision.set(title="Average precision on val, percent", xlabel="step", ylim=(0, 100))
    if precision.lines:
        precision.legend(frameon=False)
    else:
        precision.text(0.5, 0.5, "no validation was logged", ha="center", va="center", transform=precision.transAxes)

    last = max(steps.max() for steps, _ in logged.values())
    for axes in (losses, precision):
        axes.set_xlim(0, max(last, 1) * 1.02)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_detection_sheet(
    dataset: CocoDetection,
    detections: Mapping[int, Mapping[str, Any]],
    path: str | os.PathLike,
    count: int = 12,
    score_threshold: float = 0.5,
) -> None:
    """Draw `count` images, evenly spread over the data set, with ground truth (dashed) and detections (coloured by class).

    Masks are drawn as areas where the detections have them.

    Args:
        dataset: the images and their annotations.
        detections: image id -> `boxes` [L, 4] xyxy in pixels of the original image, `scores` [L], `labels` [L], and perhaps
            `masks`, a list of L RLEs. Images may be missing.
        path: of the figure.
        count: number of images.
        score_threshold: detections of lower score are not drawn.
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    records = _spread(dataset.records, count)
    with plain_text(category["name"] for category in dataset.categories):
        _save(_detection_sheet(dataset, detections, records, score_threshold), path)


def _detection_sheet(
    dataset: CocoDetection, detections: Mapping[int, Mapping[str, Any]], records: Sequence[ImageRecord], score_threshold: float
) -> Figure:
    drawn = {record.id: _above(detections.get(record.id), score_threshold) for record in records}
    truth = {record.id: dataset.coco.imgToAnns.get(record.id, []) for record in records}
    labels = sorted({label for found in drawn.values() for _, _, label, _ in found})
    colour = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    names = {label: category["name"] for label, category in enumerate(dataset.categories, 1)}

    columns = min(4, len(records))
    rows = math.ceil(len(records) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * rows + 0.6), layout="constrained")
    tiles = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in tiles:
        axes.axis("off")
    for axes, record in zip(tiles, records, strict=False):
        axes.imshow(read_image(record).permute(1, 2, 0).numpy())
        for annotation in truth[record.id]:
            _draw_ground_truth(axes, annotation)
        for box, score, label, mask in drawn[record.id]:
            _draw_detection(axes, box, f"{names[label]} {score:.2f}", colour[label], mask)
        objects = sum(not annotation.get("iscrowd") for annotation in truth[record.id])
        axes.set_title(f"image {record.id}: {objects} annotated, {len(drawn[record.id])} detected", fontsize=8)

    entries = [Line2D([], [], color="black", linewidth=2, linestyle=(0, (3, 2)), label="ground truth")]
    if any(annotation.get("iscrowd") for annotations in truth.values() for annotation in annotations):
        entries.append(Line2D([], [], color="black", linewidth=2, linestyle=":", label="crowd region, not counted"))
    if len(labels) <= len(COLOURS):
        entries += [Patch(color=colour[label], label=names[label]) for label in labels]
    else:
        entries.append(Patch(color="grey", label=f"detections: {len(labels)} classes, colours repeat"))
    figure.legend(handles=entries, loc="outside lower center", ncols=2 * columns + 1, frameon=False)
    figure.suptitle(f"Detections with a score of at least {score_threshold:g}", fontsize=11)
    return figure


def plot_detections(
    pixels: Tensor,
    found: Mapping[str, Any],
    names: Mapping[int, str],
    path: str | os.PathLike,
    score_threshold: float = 0.5,
) -> None:
    """Draw detections on one image, 1000 pixels on its longer side. A class has the same colour in all pictures.

    An image with a side ratio above 20 is stretched, so that its detections remain visible.

    Args:
        pixels: uint8 RGB `[3, H, W]`.
        found: `boxes` [L, 4] xyxy in pixels of the image, `scores` [L], `labels` [L], and perhaps `masks`, a list of L RLEs.
        names: label -> class name.
        path: of the picture.
        score_threshold: detections of lower score are not drawn.
    """
    height, width = pixels.shape[1:]
    longer = max(height, width)
    with plain_text(names.values()):
        figure = Figure(figsize=[1000 / DPI * max(side / longer, 1 / 20) for side in (width, height)])
        _draw_picture(figure, pixels, found, names, score_threshold)
        _save(figure, path)


def _draw_picture(figure: Figure, pixels: Tensor, found: Mapping[str, Any], names: Mapping[int, str], score_threshold: float) -> None:
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.imshow(pixels.permute(1, 2, 0).numpy(), aspect="auto")
    for box, score, label, mask in _above(found, score_threshold):
        _draw_detection(axes, box, f"{names[label]} {score:.2f}", COLOURS[int(label) % len(COLOURS)], mask, fontsize=8)


def _read_columns(metrics_csv: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read column -> (steps, values). CSVLogger leaves a cell empty where a column was not logged in that row."""
    if not Path(metrics_csv).is_file():
        raise MissingFileError(f"{metrics_csv} does not exist. Expected the metrics.csv of Lightning's CSVLogger.")
    columns: dict[str, list[tuple[float, float]]] = {}
    with open(metrics_csv, newline="") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if cell and row.get("step") and math.isfinite(float(cell)):
                    columns.setdefault(name, []).append((float(row["step"]), float(cell)))
    return {name: tuple(np.array(points).T) for name, points in columns.items()}


def _spread(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """Return `count` records at even distances."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _above(found: Mapping[str, Any] | None, threshold: float) -> list[tuple[list[float], float, int, dict | None]]:
    """Return (box, score, label, mask) of the detections to draw by rising score, so that the highest is on top."""
    if found is None:
        return []
    scores = found["scores"].tolist()
    detections = zip(found["boxes"].tolist(), scores, found["labels"].tolist(), found.get("masks", [None] * len(scores)), strict=True)
    return sorted((detection for detection in detections if detection[1] >= threshold), key=lambda detection: detection[1])


def _draw_ground_truth(axes: Axes, annotation: Mapping) -> None:
    x, y, width, height = annotation["bbox"]
    dashes = ":" if annotation.get("iscrowd") else (0, (3, 2))
    corner = (x - 0.5, y - 0.5)  # imshow puts the centre of the first pixel at 0; boxes have its corner there
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="black", linewidth=1.8))
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=1.2, linestyle=dashes))


def _draw_detection(axes: Axes, box: Sequence[float], text: str, colour: str, mask: dict | None, fontsize: int = 6) -> None:
    if mask is not None:
        (inside,) = decode([mask])
        axes.imshow(np.where(inside[..., None], (*to_rgb(colour), MASK_OPACITY), 0.0), aspect=axes.get_aspect(), interpolation="nearest")
    x1, y1, x2, y2 = (edge - 0.5 for edge in box)
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.6))
    inside = y1 < 0.06 * axes.get_ylim()[0]  # no room above the box (the y axis of an image points down)
    dark = np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) < 0.5
    axes.text(
        x1, y1, text, fontsize=fontsize, va="top" if inside else "bottom", color="white" if dark else "black", clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _save(figure: Figure, path: str | os.PathLike) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png", dpi=DPI)
    atomic_write(path, buffer.getvalue())
