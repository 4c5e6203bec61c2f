"""Convert detections to COCO results and these to COCO's metrics, as files and as a table. `matching.py` has the matching."""

import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.evaluation.matching import Evaluator, SilentCOCOeval, indices_of, match, percent
from roi_quantization.detection.evaluation.protocol import (
    ALL_SIZES,
    COCO_AREAS,
    COCO_IOU_THRESHOLDS,
    COCO_MAX_DETECTIONS,
    COCO_PROTOCOL,
    SEGM,
    Protocol,
)

_ALL = 0  # index of the range of all sizes
_WIDTH, _COLUMNS = 9, 6  # of the numbers in the table
_NAME = 15  # columns for a class name in the table, so that two classes side by side fit 80 columns


@dataclass(frozen=True)
class Metrics:
    """COCO's numbers in percent, 0 to 100. NaN where there is no ground truth.

    stats: AP (mean over IoU 0.5:0.05:0.95, or over the thresholds of the protocol), AP50, AP75, AP_small, AP_medium, AP_large, AR_1,
        AR_10, AR_100, AR_small, AR_medium, AR_large, or those of the size ranges of the protocol. Where masks were evaluated the same of
        them, `segm_AP` and so on, and `segm_AP90`.
    per_class: category name -> {AP, AP50, AP75}, in the order of the category ids; and the same of masks.
    image_ids: the evaluated images, ascending. None where the file that this was read from does not have them.
    of: number of images of the split. None where it is unknown.
    protocol: what they were computed of; COCO's unless it says otherwise.
    """

    stats: dict[str, float]
    per_class: dict[str, dict[str, float]]
    image_ids: tuple[int, ...] | None = None
    of: int | None = None
    protocol: Protocol = COCO_PROTOCOL

    @property
    def is_partial(self) -> bool:
        """Whether images of the split were left out."""
        return self.image_ids is not None and self.of is not None and len(self.image_ids) < self.of

    @property
    def coverage(self) -> str:
        """The evaluated images in words: `12 images`, or `4 of 12 images, a partial evaluation`."""
        if self.image_ids is None:
            return "an unknown number of images"
        return f"{len(self.image_ids)} of {self.of} images, a partial evaluation" if self.is_partial else f"{len(self.image_ids)} images"

    @property
    def max_detections(self) -> int:
        return self.protocol.max_detections

    @property
    def labels(self) -> list[str]:
        """What is not COCO's evaluation of the whole split, a sentence each."""
        return ([f"{self.coverage}."] if self.is_partial else []) + self.protocol.deviations

    def first_difference(self, recomputed: Mapping[str, float]) -> str | None:
        """Return the first metric that differs by more than the rounding of another library than pycocotools; None where all are equal."""
        return next((m for m, value in recomputed.items() if not np.isclose(value, self.stats[m], rtol=0, atol=1e-6, equal_nan=True)), None)

    def named(self, split: str) -> dict[str, float]:
        """Return `stats` by the names that loggers and callers get: `test/AP`, see `Protocol.metric`."""
        return {self.protocol.logged(f"{split}/{name}"): value for name, value in self.stats.items()}

    def as_json(self) -> dict:
        """Return the same as plain dicts, with None for NaN, which JSON does not have."""

        def plain(values):
            return {name: None if math.isnan(value) else value for name, value in values.items()}

        content = {"stats": plain(self.stats), "per_class": {name: plain(values) for name, values in self.per_class.items()}}
        content |= self.protocol.as_json()
        if self.image_ids is not None:
            content |= {"images": len(self.image_ids), "of": self.of, "partial": self.is_partial, "image_ids": list(self.image_ids)}
        return content

    @classmethod
    def from_json(cls, content: Mapping) -> "Metrics":
        """Invert `as_json`. Files of earlier versions, which lack the images, are read too."""

        def numbers(values):
            return {name: math.nan if value is None else float(value) for name, value in values.items()}

        return cls(
            numbers(content["stats"]),
            {name: numbers(values) for name, values in content["per_class"].items()},
            image_ids=None if content.get("image_ids") is None else tuple(content["image_ids"]),
            of=content.get("of"),
            protocol=Protocol.from_json(content),
        )


class CocoEvaluation:
    """COCO's metrics, computed by a library from a protocol: the group `coco_eval` of the configuration.

    Args:
        library: pycocotools' COCOeval, or a replacement such as `matching.faster_coco_eval()`.
        iou_thresholds, areas: see `Protocol`.

    Raises:
        InputError: the protocol is not valid.
    """

    def __init__(
        self,
        library: Evaluator = SilentCOCOeval,
        iou_thresholds: Sequence[float] = COCO_IOU_THRESHOLDS,
        areas: Sequence[Sequence] = COCO_AREAS,
    ):
        self.library = library
        self.protocol = Protocol(tuple(iou_thresholds), tuple(tuple(area) if isinstance(area, Sequence) else area for area in areas))

    def __call__(
        self, coco_gt: COCO, results: Sequence[Mapping], image_ids: Sequence[int], max_detections: int, of: int, masks: bool = False
    ) -> Metrics:
        """Return the metrics, see `evaluate`."""
        return evaluate(coco_gt, results, image_ids, max_detections, self.library, of, self.protocol, masks)


def evaluate(
    coco_gt: COCO,
    results: Sequence[Mapping],
    image_ids: Sequence[int],
    max_detections: int = COCO_MAX_DETECTIONS,
    coco_eval: Evaluator = SilentCOCOeval,
    of: int | None = None,
    protocol: Protocol = COCO_PROTOCOL,
    masks: bool = False,
) -> Metrics:
    """Compute COCO's metrics of `results` over the images `image_ids`. Without results AP is 0.

    Args:
        coco_gt: the annotations, which are not modified. Crowd regions (`iscrowd`) absorb detections and are never
            missed. Annotations without `iscrowd` count as single objects. Annotations without `area` get their box's
            area, which only decides the size range.
        results: COCO's results format, dicts of image_id, category_id, bbox `[x, y, w, h]` in pixels of the annotated
            image, and score. Results of images of `coco_gt` that are not in `image_ids` are ignored.
        image_ids: the images to evaluate. Duplicates count once. An image without results has no detections.
        max_detections: per image and category. Detections of lower score are ignored. AR_k is the recall with at most k.
        coco_eval: pycocotools' COCOeval, or a replacement such as `matching.faster_coco_eval()`.
        of: number of images of the split. None: `image_ids` are the whole split.
        protocol: IoU thresholds and size ranges; `max_detections` takes the place of its own.
        masks: evaluate masks as well as boxes: `segmentation` of the annotations and of the results, which are RLEs.

    Raises:
        ValueError: a result or an image that `coco_gt` does not have, or a number that is not finite.
    """
    protocol = replace(protocol, max_detections=max_detections)
    areas = {"all": ALL_SIZES} | protocol.square_pixels
    matched = match(coco_gt, results, image_ids, max_detections, areas, coco_eval, protocol.evaluated_thresholds)
    matched.accumulate()
    stats, per_class = _summarize(matched, protocol)
    if masks:
        matched = match(coco_gt, results, image_ids, max_detections, areas, coco_eval, protocol.evaluated_thresholds, masks=True)
        matched.accumulate()
        (iou90,) = indices_of(np.asarray(matched.params.iouThrs), (0.9,))
        of_masks, of_classes = _summarize(matched, protocol)
        of_masks["AP90"] = percent(matched.eval["precision"][iou90, :, :, _ALL, -1])
        stats |= {f"{SEGM}{name}": value for name, value in of_masks.items()}
        for name, values in of_classes.items():
            per_class[name] |= {f"{SEGM}{metric}": value for metric, value in values.items()}
    evaluated = tuple(sorted(set(image_ids)))
    return Metrics(stats, per_class, evaluated, len(evaluated) if of is None else of, protocol)


def to_coco_results(detections: Mapping[int, Mapping[str, Any]], label_to_category_id: Mapping[int, int]) -> list[dict]:
    """Convert detections to COCO's results format.

    Args:
        detections: image id -> `boxes` [L, 4] xyxy in pixels of the original image, `scores` [L], `labels` [L] in 1..C,
            and optionally `proposals` [L, 4], from which the boxes were regressed, and `masks`, a list of L RLEs. These
            add keys `proposal`, `[x, y, w, h]`, and `segmentation` to each result.
        label_to_category_id: label -> category id of the annotations.

    Returns:
        Results sorted by image id and falling score, equal scores in the given order. Boxes are rounded to 1/1000 pixel
        and scores to 6 decimals, after sorting.

    Raises:
        ValueError: boxes, scores and labels of different lengths, or a label without category.
    """
    results = []
    for image_id in sorted(detections):
        boxes, scores, labels = (detections[image_id][key].detach().cpu() for key in ("boxes", "scores", "labels"))
        if not len(boxes) == len(scores) == len(labels):
            raise InputError(f"image {image_id}: {len(boxes)} boxes, {len(scores)} scores and {len(labels)} labels do not go together")
        order = scores.argsort(descending=True, stable=True)
        more = [{}] * len(order)
        if "proposals" in detections[image_id]:
            more = [{"proposal": xywh} for xywh in _xywh(detections[image_id]["proposals"].detach().cpu()[order])]
        if "masks" in detections[image_id]:
            rles = [detections[image_id]["masks"][index] for index in order.tolist()]
            more = [{**rest, "segmentation": rle} for rest, rle in zip(more, rles, strict=True)]
        columns = _xywh(boxes[order]), scores[order].double().tolist(), labels[order].tolist(), more
        for bbox, score, label, rest in zip(*columns, strict=True):
            if label not in label_to_category_id:
                raise InputError(f"image {image_id}: label {label} has no category; the data set knows {sorted(label_to_category_id)}")
            category_id = int(label_to_category_id[label])
            results.append({"image_id": int(image_id), "category_id": category_id, "bbox": bbox, "score": round(score, 6)} | rest)
    return results


def _xywh(boxes: Tensor) -> list[list[float]]:
    return box_convert(boxes.double().reshape(-1, 4), "xyxy", "xywh").numpy().round(3).tolist()


def class_names(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Return category id -> the name in `Metrics.per_class`: that of the category, with its id where several have the same."""
    counts = Counter(category["name"] for category in categories)
    return {one["id"]: one["name"] if counts[one["name"]] == 1 else f"{one['name']} ({one['id']})" for one in categories}


def write_results(path: str | os.PathLike, results: Sequence[Mapping]) -> None:
    """Write COCO results as one JSON array with a result per line, atomically."""
    lines = ",\n".join(json.dumps(result, allow_nan=False) for result in results)
    atomic_write(path, (f"[\n{lines}\n]\n" if lines else "[]\n").encode())


def write_metrics(path: str | os.PathLike, metrics: Metrics) -> None:
    """Write metrics as JSON, atomically: percentages, null where there is no ground truth.

    `images` is the number of evaluated images, `image_ids` their ids, `of` the number of images of the split, and
    `partial` is true where some were left out.
    """
    content = metrics.as_json()
    image_ids = content.pop("image_ids", None)
    text = json.dumps(content, indent=2, allow_nan=False)
    if image_ids is not None:  # on one line, however many there are
        text = f'{text.removesuffix("}").rstrip()},\n  "image_ids": {json.dumps(image_ids)}\n}}'
    atomic_write(path, f"{text}\n".encode())


def format_table(metrics: Metrics) -> str:
    """Return COCO's metrics and the per-class AP in percent, at most 80 columns wide; "-" where there is no ground truth.

    The first lines say what is not COCO's evaluation of the whole split.
    """
    sizes = [name for name, _, _ in metrics.protocol.areas]
    precision = [(name, metrics.stats[name]) for name in ("AP", "AP50", "AP75")] + [(name, metrics.stats[f"AP_{name}"]) for name in sizes]
    recall = [(f"AR@{k}", metrics.stats[f"AR_{k}"]) for k in (1, 10, 100)] + [(name, metrics.stats[f"AR_{name}"]) for name in sizes]
    lines = [line for label in metrics.labels for line in textwrap.wrap(label, 80)]
    rows = {"average precision": precision, "average recall": recall}
    if f"{SEGM}AP" in metrics.stats:
        names = ("AP", "AP50", "AP75", "AP90", *(f"AP_{name}" for name in sizes))
        rows["AP of masks"] = [(name.removeprefix("AP_"), metrics.stats[f"{SEGM}{name}"]) for name in names]
    for title, numbers in rows.items():
        for start in range(0, len(numbers), _COLUMNS):
            heads, values = zip(*numbers[start : start + _COLUMNS], strict=True)
            lines += [f"{'' if start else title:<18}" + _cells([_name(head, _WIDTH - 1) for head in heads], _WIDTH)]
            lines += [" " * 18 + _cells(values, _WIDTH)]

    classes = [f"{_name(name):<{_NAME}}" + _cells((v["AP"], v["AP50"], v["AP75"]), 7) for name, v in metrics.per_class.items()]
    columns = 1 if len(classes) <= 10 else 2
    height = math.ceil(len(classes) / columns)
    lines += ["", "    ".join([f"{'class':<{_NAME}}" + _cells(("AP", "AP50", "AP75"), 7)] * columns)]
    for row in range(height):  # column by column, so that the classes stay in order when read downwards
        lines.append("    ".join(classes[row::height]))
    return "\n".join(lines)


def _cells(values: Sequence[float | str], width: int) -> str:
    return "".join(f"{_number(value):>{width}}" for value in values)


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "-" if math.isnan(value) else f"{value:.1f}"


def _name(name: str, width: int = _NAME) -> str:
    return name if len(name) <= width else f"{name[: width - 2]}.."


def _summarize(coco_eval: COCOeval, protocol: Protocol) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """`Metrics.stats` and `Metrics.per_class`: COCOeval's own summary takes 100 detections for granted and has no per-class numbers."""
    precision = coco_eval.eval["precision"]  # [IoU threshold, recall, class, area, max detections], -1 where there is no ground truth
    recall = coco_eval.eval["recall"]  # the same without recall
    iou50, iou75, *averaged = indices_of(np.asarray(coco_eval.params.iouThrs), (0.5, 0.75, *protocol.iou_thresholds))
    precisions, recalls = precision[averaged], recall[averaged]
    at = coco_eval.params.maxDets.index
    most = coco_eval.params.maxDets[-1]
    sizes = list(enumerate((name for name, _, _ in protocol.areas), start=_ALL + 1))

    stats = {
        "AP": percent(precisions[:, :, :, _ALL, -1]),
        "AP50": percent(precision[iou50, :, :, _ALL, -1]),
        "AP75": percent(precision[iou75, :, :, _ALL, -1]),
    }
    stats |= {f"AP_{name}": percent(precisions[:, :, :, index, -1]) for index, name in sizes}
    stats |= {f"AR_{k}": percent(recalls[:, :, _ALL, at(min(k, most))]) for k in (1, 10, 100)}
    stats |= {f"AR_{name}": percent(recalls[:, :, index, -1]) for index, name in sizes}
    per_class = {}
    for k, name in enumerate(class_names(coco_eval.cocoGt.loadCats(coco_eval.params.catIds)).values()):
        per_class[name] = {
            "AP": percent(precisions[:, :, k, _ALL, -1]),
            "AP50": percent(precision[iou50, :, k, _ALL, -1]),
            "AP75": percent(precision[iou75, :, k, _ALL, -1]),
        }
    return stats, per_class
