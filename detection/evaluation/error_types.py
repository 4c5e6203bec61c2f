"""Types of detection errors by the definitions of TIDE (Bolya et al., ECCV 2020), and the AP50 that each type costs.

A detection that matches no object at IoU 0.5 is an error of the first type that applies:

- localisation: its best IoU with an object of its class is between 0.1 and 0.5, both ends included;
- classification: its IoU with an object of another class is 0.5 or more;
- duplicate: its IoU with an object of its class, which another detection matches, is 0.5 or more;
- background: its IoU with every object is 0.1 or less;
- both: none of these, so its class is wrong and its IoU is between 0.1 and 0.5.

An object is missed where no detection matches it and no error of localisation or classification has its best IoU with it.

The matches are COCO's. A detection that a crowd region absorbs is no false positive, so it is no error. The package
`tidecv` counts it as one; without crowd regions counts and gains equal those of `tidecv`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from roi_quantization.detection.evaluation.matching import IOU50

ERROR_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(ERROR_TYPES))
CORRECT = -1
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class ErrorSplit:
    """The errors of one detector.

    Attributes:
        ap50: AP at IoU 0.5 in percent, COCO's; NaN without objects.
        counts: error type -> detections of that type, or objects for `missed`.
        gains: error type -> points of AP50 gained by fixing all errors of that type and no other. NaN where no object
            and no detection would be left.
    """

    ap50: float
    counts: dict[str, int]
    gains: dict[str, float]


@dataclass(frozen=True)
class _Detections:
    """D detections by falling score, without those that crowd regions absorb, and O objects."""

    score: np.ndarray  # [D]
    category: np.ndarray  # [D]
    error: np.ndarray  # [D]: CORRECT or an error type
    target: np.ndarray  # [D]: category of the object that a correction matches; -1 where the correction removes the detection
    objects: np.ndarray  # [O]: category of each object
    missed: np.ndarray  # bool [O]


def split_matched(coco_eval: COCOeval) -> ErrorSplit:
    """Split the errors of a detector by type.

    The correction of a localisation or classification error moves the detection onto its object. It removes the detection
    where the object is matched already, or where another error of that object has a higher score. The correction of
    other false positives removes them, that of missed objects removes the objects. A class without objects and
    detections after that is left out of the mean over classes.

    Args:
        coco_eval: of `matching.match` at COCO's thresholds, all sizes together.
    """
    boxes = {key: {a["id"]: a["bbox"] for a in coco.anns.values()} for key, coco in (("dt", coco_eval.cocoDt), ("gt", coco_eval.cocoGt))}
    images = len(coco_eval.params.imgIds)
    per_image = [_split_image([m for m in coco_eval.evalImgs[i::images] if m is not None], boxes["dt"], boxes["gt"]) for i in range(images)]
    found = _concatenate(per_image)

    counts = np.bincount(found.error[found.error != CORRECT], minlength=len(ERROR_TYPES))
    counts[MISSED] = np.count_nonzero(found.missed)
    before = _ap50(found, evaluated=np.unique(found.objects))
    gains = [_ap50(_correct(found, error), np.unique(found.objects)) - before for error in range(len(ERROR_TYPES))]
    return ErrorSplit(before, dict(zip(ERROR_TYPES, counts.tolist(), strict=True)), dict(zip(ERROR_TYPES, gains, strict=True)))


def _split_image(matches: list[Mapping], detection_boxes: Mapping, object_boxes: Mapping) -> _Detections:
    """Find the error type of each detection of an image, from COCOeval's matches of its classes."""

    def gather(key: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.asarray(m[key]).reshape(-1) for m in matches] or [[]]).astype(dtype)

    def gather_at_iou50(key: str) -> np.ndarray:
        return np.concatenate([m[key][IOU50] for m in matches] or [[]]).astype(bool)

    def categories(key: str) -> np.ndarray:
        return np.repeat(np.array([m["category_id"] for m in matches], dtype=np.int64), [len(m[key]) for m in matches])

    is_object = ~gather("gtIgnore", bool)
    objects, matched = categories("gtIds")[is_object], gather_at_iou50("gtMatches")[is_object]
    kept = np.flatnonzero(~gather_at_iou50("dtIgnore"))
    kept = kept[np.argsort(-gather("dtScores", float)[kept], kind="stable")]
    category, is_error = categories("dtIds")[kept], ~gather_at_iou50("dtMatches")[kept]
    error, target = np.full(len(kept), CORRECT), np.full(len(kept), -1)
    missed = ~matched
    if is_error.any() and len(objects):
        ids = gather("dtIds", int)[kept][is_error], gather("gtIds", int)[is_object]
        iou = mask.iou(
            np.array([detection_boxes[i] for i in ids[0]], dtype=float),
            np.array([object_boxes[i] for i in ids[1]], dtype=float),
            np.zeros(len(objects)),
        )
        error[is_error], place = _classify(iou, category[is_error, None] == objects, matched)
        rows, place = np.flatnonzero(is_error)[place >= 0], place[place >= 0]
        place, first = np.unique(place, return_index=True)  # rows are by falling score, so the first of an object has the highest
        target[rows[first]] = np.where(matched[place], -1, objects[place])
        missed[place] = False
    else:
        error[is_error] = BACKGROUND
    return _Detections(gather("dtScores", float)[kept], category, error, target, objects, missed)


def _classify(iou: np.ndarray, same_class: np.ndarray, matched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the error type of each false positive `[F]`, and its object where it can be moved onto one, else -1.

    Args:
        iou: of false positives and objects `[F, O]`.
        same_class: `[F, O]`.
        matched: whether a detection matches the object `[O]`.
    """
    own, other = np.where(same_class, iou, 0), np.where(same_class, 0, iou)
    rules = (
        (LOCALISATION, (own.max(axis=1) >= BACKGROUND_IOU) & (own.max(axis=1) <= FOREGROUND_IOU)),
        (CLASSIFICATION, other.max(axis=1) >= FOREGROUND_IOU),
        (DUPLICATE, (own * matched).max(axis=1) >= FOREGROUND_IOU),
        (BACKGROUND, iou.max(axis=1) <= BACKGROUND_IOU),
    )
    error = np.select([applies for _, applies in rules], [kind for kind, _ in rules], default=BOTH)
    place = np.select([error == LOCALISATION, error == CLASSIFICATION], [own.argmax(axis=1), other.argmax(axis=1)], default=-1)
    return error, place


def _concatenate(per_image: Sequence[_Detections]) -> _Detections:
    """Join the images, by falling score, and among equal scores in the order of the images, which is COCOeval's."""
    parts = {name: np.concatenate([getattr(part, name) for part in per_image]) for name in _Detections.__dataclass_fields__}
    order = np.argsort(-parts["score"], kind="stable")
    return _Detections(**{name: part if name in ("objects", "missed") else part[order] for name, part in parts.items()})


def _correct(found: _Detections, error: int) -> _Detections:
    """Return the detections and objects after all errors of one type have been fixed."""
    if error == MISSED:
        return replace(found, objects=found.objects[~found.missed], missed=found.missed[~found.missed])
    moved = (found.error == error) & (found.target >= 0)
    kept = (found.error != error) | moved
    category, fixed = np.where(moved, found.target, found.category), np.where(moved, CORRECT, found.error)
    return replace(found, score=found.score[kept], category=category[kept], error=fixed[kept], target=found.target[kept])


def _ap50(found: _Detections, evaluated: np.ndarray) -> float:
    """Return the mean of AP50 over the `evaluated` categories in percent."""
    per_class = []
    for category in evaluated:
        correct, objects = found.error[found.category == category] == CORRECT, np.count_nonzero(found.objects == category)
        if len(correct) or objects:
            per_class.append(_average_precision(correct, objects))
    return 100 * float(np.mean(per_class)) if per_class else math.nan


def _average_precision(correct: np.ndarray, objects: int) -> float:
    """Return COCO's AP at one IoU threshold: precision at 101 levels of recall, each the best at that recall or a higher one."""
    if objects == 0:
        return 0.0
    found = np.cumsum(correct)
    best = np.maximum.accumulate((found / np.arange(1, len(found) + 1))[::-1])[::-1]
    at = np.searchsorted(found / objects, _RECALLS)
    return float(best[at[at < len(found)]].sum()) / len(_RECALLS)
