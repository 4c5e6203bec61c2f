"""Detections -> COCO results -> COCO's metrics.

The matching and the averaging are pycocotools' own; this module only keeps its traps away from the caller. In pycocotools an empty list of
results crashes, an annotation with id 0 counts as never found, annotations that share an id disappear, a NaN box matches everything, an
empty list of images means all images, and results and annotations are written into. None of that happens here.
"""

import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert

from detection.evaluation.files import write_whole

log = logging.getLogger(__name__)

_IOU50, _IOU75 = 0, 5  # places of the IoU thresholds 0.5 and 0.75 among COCOeval's 0.5, 0.55 ... 0.95
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # and of its size ranges: small is below 32^2 pixels, large above 96^2
_NAME = 15  # columns for a class name in the table, so that two classes side by side fit 80 columns


@dataclass(frozen=True)
class Metrics:
    """COCO's numbers in percent, 0 to 100; NaN where there is no ground truth to measure against.

    stats: AP (mean over IoU 0.5:0.05:0.95), AP50, AP75, AP_small, AP_medium, AP_large, AR_1, AR_10, AR_100, AR_small, AR_medium, AR_large.
    per_class: category name -> {AP, AP50, AP75}, in the order of the category ids.
    """

    stats: dict[str, float]
    per_class: dict[str, dict[str, float]]

    def as_json(self) -> dict:
        """The same as plain dicts with None for NaN, which JSON does not have."""

        def plain(values):
            return {name: None if math.isnan(value) else value for name, value in values.items()}

        return {"stats": plain(self.stats), "per_class": {name: plain(values) for name, values in self.per_class.items()}}


def evaluate(coco_gt: COCO, results: Sequence[Mapping], image_ids: Sequence[int], max_detections: int = 100) -> Metrics:
    """COCO's box metrics of `results` over the images `image_ids`.

    coco_gt: the annotations, unchanged by the call. Crowd regions (`iscrowd`) absorb detections and are never missed. Annotations without
        `iscrowd` count as single objects; those without `area` get their box's area, which decides nothing but the size range.
    results: COCO's results format, dicts of image_id, category_id, bbox `[x, y, w, h]` in pixels of the annotated image, score. Results of
        images that `coco_gt` knows but `image_ids` leaves out are ignored, so that one list of results serves every subset.
    image_ids: the images to evaluate; an image that is found twice counts once, one without results counts as one without detections.
    max_detections: per image *and category*, as COCO has it; those of lower score are not looked at. AR_k is the recall with k at most.

    No results at all give AP 0. Raises ValueError where a result or an image does not belong to `coco_gt`, or a number is not finite.
    """
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    if len(image_ids) == 0:
        raise ValueError("no images to evaluate: image_ids is empty")
    _check_results(coco_gt, results)
    ground_truth = _ground_truth(coco_gt, image_ids)
    detections = _detections(ground_truth, results)

    with contextlib.redirect_stdout(io.StringIO()):  # COCOeval prints its progress
        coco_eval = COCOeval(ground_truth, detections, "bbox")
        coco_eval.params.maxDets = sorted({min(k, max_detections) for k in (1, 10, 100)} | {max_detections})
        coco_eval.evaluate()
        coco_eval.accumulate()
    return _summarize(coco_eval)


def to_coco_results(detections: Mapping[int, Mapping[str, Tensor]], label_to_category_id: Mapping[int, int]) -> list[dict]:
    """Detections by image id -> list in COCO's results format.

    detections: image id -> {boxes [L, 4] xyxy in pixels of the original image, scores [L], labels [L] in 1..C}.
    label_to_category_id: label -> category id of the annotations.

    Sorted by image id and then by falling score, equal scores in the given order: the same detections give the same list. Boxes are
    rounded to 1/1000 pixel and scores to 6 decimals, after sorting.
    """
    results = []
    for image_id in sorted(detections):
        boxes, scores, labels = (detections[image_id][key].detach().cpu() for key in ("boxes", "scores", "labels"))
        if not len(boxes) == len(scores) == len(labels):
            raise ValueError(f"image {image_id}: {len(boxes)} boxes, {len(scores)} scores and {len(labels)} labels do not go together")
        order = scores.argsort(descending=True, stable=True)
        xywh = box_convert(boxes[order].double().reshape(-1, 4), "xyxy", "xywh").numpy().round(3).tolist()
        for bbox, score, label in zip(xywh, scores[order].double().tolist(), labels[order].tolist(), strict=True):
            if label not in label_to_category_id:
                raise ValueError(f"image {image_id}: label {label} has no category; the data set knows {sorted(label_to_category_id)}")
            category_id = int(label_to_category_id[label])
            results.append({"image_id": int(image_id), "category_id": category_id, "bbox": bbox, "score": round(score, 6)})
    return results


def write_results(path: str | os.PathLike, results: Sequence[Mapping]) -> None:
    """Writes COCO results as one json array, a result per line. The file is there whole or not at all."""
    lines = ",\n".join(json.dumps(result, allow_nan=False) for result in results)
    write_whole(path, (f"[\n{lines}\n]\n" if lines else "[]\n").encode())


def write_metrics(path: str | os.PathLike, metrics: Metrics) -> None:
    """Writes `{"stats": ..., "per_class": ...}` in percent, null where there is no ground truth. The file is there whole or not at all."""
    write_whole(path, (json.dumps(metrics.as_json(), indent=2, allow_nan=False) + "\n").encode())


def format_table(metrics: Metrics) -> str:
    """COCO's metrics and the per-class AP in percent, at most 80 columns wide; "-" where there is no ground truth."""
    rows = [
        ("AP", "AP50", "AP75", "small", "medium", "large"),
        tuple(metrics.stats[key] for key in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")),
        ("AR@1", "AR@10", "AR@100", "small", "medium", "large"),
        tuple(metrics.stats[key] for key in ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")),
    ]
    names = ("average precision", "", "average recall", "")
    lines = [f"{name:<18}" + _cells(row, 9) for name, row in zip(names, rows, strict=True)]

    classes = [_name(name) + _cells((v["AP"], v["AP50"], v["AP75"]), 7) for name, v in metrics.per_class.items()]
    columns = 1 if len(classes) <= 10 else 2
    height = math.ceil(len(classes) / columns)
    lines += ["", "    ".join([_name("class") + _cells(("AP", "AP50", "AP75"), 7)] * columns)]
    for row in range(height):  # column by column, so that the classes stay in order when read downwards
        lines.append("    ".join(classes[row::height]))
    return "\n".join(lines)


def _cells(values: Sequence[float | str], width: int) -> str:
    return "".join(f"{_number(value):>{width}}" for value in values)


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "-" if math.isnan(value) else f"{value:.1f}"


def _name(name: str) -> str:
    return f"{name if len(name) <= _NAME else name[: _NAME - 2] + '..':<{_NAME}}"


def _check_results(coco_gt: COCO, results: Sequence[Mapping]) -> None:
    for index, result in enumerate(results):
        missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in result]
        if missing:
            raise ValueError(f"result {index} has no {', '.join(missing)}: expected image_id, category_id, bbox [x, y, w, h] and score")
        for key, known in (("image_id", coco_gt.imgs), ("category_id", coco_gt.cats)):
            if result[key] not in known:
                raise ValueError(
                    f"result {index} has {key} {result[key]!r}, which the annotations do not know: are these results of another data set?"
                )
        box, score = result["bbox"], result["score"]
        if len(box) != 4 or not all(map(math.isfinite, (*box, score))) or box[2] < 0 or box[3] < 0:
            raise ValueError(
                f"result {index} (image {result['image_id']}): expected a finite bbox [x, y, w, h] with w, h >= 0 and a finite score, "
                f"got bbox {box} and score {score}"
            )


def _ground_truth(coco_gt: COCO, image_ids: Sequence[int]) -> COCO:
    """A private copy of the annotations of these images, numbered from 1 because COCOeval takes id 0 for "no match"."""
    unknown = [image_id for image_id in image_ids if image_id not in coco_gt.imgs]
    if unknown:
        raise ValueError(f"{len(unknown)} of the images to evaluate are not in the annotations, the first is image {unknown[0]}")
    annotations, without_area = [], 0
    for image_id in sorted(set(image_ids)):
        for annotation in coco_gt.imgToAnns.get(image_id, []):
            if len(annotation.get("bbox") or ()) != 4:
                raise ValueError(f"annotation {annotation.get('id')} of image {image_id} has no bbox [x, y, w, h]")
            area = annotation.get("area")
            if area is None:
                area = annotation["bbox"][2] * annotation["bbox"][3]
                without_area += 1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": annotation["category_id"],
                    "bbox": annotation["bbox"],
                    "area": area,
                    "iscrowd": int(annotation.get("iscrowd") or 0),
                }
            )
    if without_area:
        log.warning("%d annotations have no area: their boxes' areas decide which are small, medium and large", without_area)
    return _indexed([coco_gt.imgs[i] for i in sorted(set(image_ids))], list(coco_gt.cats.values()), annotations)


def _detections(ground_truth: COCO, results: Sequence[Mapping]) -> COCO:
    """What `COCO.loadRes` makes of results, for an empty list as well and without writing into it."""
    kept = [result for result in results if result["image_id"] in ground_truth.imgs]
    annotations = [
        {**result, "id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0} for number, result in enumerate(kept, 1)
    ]
    return _indexed(ground_truth.dataset["images"], ground_truth.dataset["categories"], annotations)


def _indexed(images: list[dict], categories: list[dict], annotations: list[dict]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _summarize(coco_eval: COCOeval) -> Metrics:
    """COCOeval's own summary takes 100 detections for granted and has no per-class numbers."""
    precision = coco_eval.eval["precision"]  # [IoU threshold, recall, class, area, max detections], -1 where there is no ground truth
    recall = coco_eval.eval["recall"]  # the same without recall
    at = coco_eval.params.maxDets.index
    most = coco_eval.params.maxDets[-1]

    stats = {
        "AP": _percent(precision[:, :, :, _ALL, -1]),
        "AP50": _percent(precision[_IOU50, :, :, _ALL, -1]),
        "AP75": _percent(precision[_IOU75, :, :, _ALL, -1]),
        "AP_small": _percent(precision[:, :, :, _SMALL, -1]),
        "AP_medium": _percent(precision[:, :, :, _MEDIUM, -1]),
        "AP_large": _percent(precision[:, :, :, _LARGE, -1]),
        "AR_1": _percent(recall[:, :, _ALL, at(1)]),
        "AR_10": _percent(recall[:, :, _ALL, at(min(10, most))]),
        "AR_100": _percent(recall[:, :, _ALL, at(min(100, most))]),
        "AR_small": _percent(recall[:, :, _SMALL, -1]),
        "AR_medium": _percent(recall[:, :, _MEDIUM, -1]),
        "AR_large": _percent(recall[:, :, _LARGE, -1]),
    }
    categories = coco_eval.cocoGt.loadCats(coco_eval.params.catIds)
    names = [category["name"] for category in categories]
    per_class = {}
    for k, category in enumerate(categories):
        name = category["name"] if names.count(category["name"]) == 1 else f"{category['name']} ({category['id']})"
        per_class[name] = {
            "AP": _percent(precision[:, :, k, _ALL, -1]),
            "AP50": _percent(precision[_IOU50, :, k, _ALL, -1]),
            "AP75": _percent(precision[_IOU75, :, k, _ALL, -1]),
        }
    return Metrics(stats, per_class)


def _percent(values: np.ndarray) -> float:
    measured = values[values > -1]
    return 100.0 * float(measured.mean()) if measured.size else math.nan
