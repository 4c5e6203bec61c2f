"""Convert detections to COCO results and these to COCO's metrics, as files and as a table. `matching.py` has the matching."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.evaluation.matching import IOU50, IOU75, Evaluator, SilentCOCOeval, match, percent

_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # indices of COCOeval's size ranges: small is below 32^2 pixels, large above 96^2
COCO_MAX_DETECTIONS = 100  # of an image and category
_NAME = 15  # columns for a class name in the table, so that two classes side by side fit 80 columns


@dataclass(frozen=True)
class Metrics:
    """COCO's numbers in percent, 0 to 100. NaN where there is no ground truth.

    stats: AP (mean over IoU 0.5:0.05:0.95), AP50, AP75, AP_small, AP_medium, AP_large, AR_1, AR_10, AR_100, AR_small, AR_medium, AR_large.
    per_class: category name -> {AP, AP50, AP75}, in the order of the category ids.
    image_ids: the evaluated images, ascending. None where the file that this was read from does not have them.
    of: number of images of the split. None where it is unknown.
    max_detections: maximum number of detections evaluated per image and category. 100 in COCO.
    """

    stats: dict[str, float]
    per_class: dict[str, dict[str, float]]
    image_ids: tuple[int, ...] | None = None
    of: int | None = None
    max_detections: int = COCO_MAX_DETECTIONS

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

    def as_json(self) -> dict:
        """Return the same as plain dicts, with None for NaN, which JSON does not have."""

        def plain(values):
            return {name: None if math.isnan(value) else value for name, value in values.items()}

        content = {"stats": plain(self.stats), "per_class": {name: plain(values) for name, values in self.per_class.items()}}
        content["max_detections"] = self.max_detections
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
            max_detections=content.get("max_detections", COCO_MAX_DETECTIONS),
        )


def evaluate(
    coco_gt: COCO,
    results: Sequence[Mapping],
    image_ids: Sequence[int],
    max_detections: int = COCO_MAX_DETECTIONS,
    coco_eval: Evaluator = SilentCOCOeval,
    of: int | None = None,
) -> Metrics:
    """Compute COCO's box metrics of `results` over the images `image_ids`. Without results AP is 0.

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

    Raises:
        ValueError: a result or an image that `coco_gt` does not have, or a number that is not finite.
    """
    matched = match(coco_gt, results, image_ids, max_detections, coco_eval=coco_eval)
    matched.accumulate()
    stats, per_class = _summarize(matched)
    evaluated = tuple(sorted(set(image_ids)))
    return Metrics(stats, per_class, evaluated, len(evaluated) if of is None else of, max_detections)


def to_coco_results(detections: Mapping[int, Mapping[str, Tensor]], label_to_category_id: Mapping[int, int]) -> list[dict]:
    """Convert detections to COCO's results format.

    Args:
        detections: image id -> `boxes` [L, 4] xyxy in pixels of the original image, `scores` [L], `labels` [L] in 1..C,
            and optionally `proposals` [L, 4], from which the boxes were regressed. These add a key `proposal`,
            `[x, y, w, h]`, to each result.
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
        columns = _xywh(boxes[order]), scores[order].double().tolist(), labels[order].tolist(), more
        for bbox, score, label, rest in zip(*columns, strict=True):
            if label not in label_to_category_id:
                raise InputError(f"image {image_id}: label {label} has no category; the data set knows {sorted(label_to_category_id)}")
            category_id = int(label_to_category_id[label])
            results.append({"image_id": int(image_id), "category_id": category_id, "bbox": bbox, "score": round(score, 6)} | rest)
    return results


def _xywh(boxes: Tensor) -> list[list[float]]:
    return box_convert(boxes.double().reshape(-1, 4), "xyxy", "xywh").numpy().round(3).tolist()


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

    The first line says so where images were left out, or where more detections of an image and class count than COCO's 100.
    """
    rows = [
        ("AP", "AP50", "AP75", "small", "medium", "large"),
        tuple(metrics.stats[key] for key in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")),
        ("AR@1", "AR@10", "AR@100", "small", "medium", "large"),
        tuple(metrics.stats[key] for key in ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")),
    ]
    names = ("average precision", "", "average recall", "")
    lines = [f"{metrics.coverage}."] if metrics.is_partial else []
    if metrics.max_detections != COCO_MAX_DETECTIONS:
        lines.append(f"Up to {metrics.max_detections} detections of an image and class count, where COCO has {COCO_MAX_DETECTIONS}.")
    lines += [f"{name:<18}" + _cells(row, 9) for name, row in zip(names, rows, strict=True)]

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


def _summarize(coco_eval: COCOeval) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """`Metrics.stats` and `Metrics.per_class`: COCOeval's own summary takes 100 detections for granted and has no per-class numbers."""
    precision = coco_eval.eval["precision"]  # [IoU threshold, recall, class, area, max detections], -1 where there is no ground truth
    recall = coco_eval.eval["recall"]  # the same without recall
    at = coco_eval.params.maxDets.index
    most = coco_eval.params.maxDets[-1]

    stats = {
        "AP": percent(precision[:, :, :, _ALL, -1]),
        "AP50": percent(precision[IOU50, :, :, _ALL, -1]),
        "AP75": percent(precision[IOU75, :, :, _ALL, -1]),
        "AP_small": percent(precision[:, :, :, _SMALL, -1]),
        "AP_medium": percent(precision[:, :, :, _MEDIUM, -1]),
        "AP_large": percent(precision[:, :, :, _LARGE, -1]),
        "AR_1": percent(recall[:, :, _ALL, at(1)]),
        "AR_10": percent(recall[:, :, _ALL, at(min(10, most))]),
        "AR_100": percent(recall[:, :, _ALL, at(min(100, most))]),
        "AR_small": percent(recall[:, :, _SMALL, -1]),
        "AR_medium": percent(recall[:, :, _MEDIUM, -1]),
        "AR_large": percent(recall[:, :, _LARGE, -1]),
    }
    categories = coco_eval.cocoGt.loadCats(coco_eval.params.catIds)
    names = [category["name"] for category in categories]
    per_class = {}
    for k, category in enumerate(categories):
        name = category["name"] if names.count(category["name"]) == 1 else f"{category['name']} ({category['id']})"
        per_class[name] = {
            "AP": percent(precision[:, :, k, _ALL, -1]),
            "AP50": percent(precision[IOU50, :, k, _ALL, -1]),
            "AP75": percent(precision[IOU75, :, k, _ALL, -1]),
        }
    return stats, per_class
