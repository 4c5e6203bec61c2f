"""pycocotools' matching of detections to ground truth, with its inputs checked and copied.

In pycocotools an empty list of results crashes, an annotation with id 0 is never found, annotations that share an id
disappear, a NaN box matches everything, an empty list of images means all images, and results and annotations are
modified. `match` avoids all of these.
"""

import contextlib
import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from roi_quantization.detection.common.errors import InputError, MissingPackageError
from roi_quantization.detection.data.garbage_collection import without_garbage_collection

log = logging.getLogger(__name__)

IOU50 = 0  # index of the IoU threshold 0.5 among COCOeval's 0.5, 0.55 ... 0.95
Areas = Mapping[str, tuple[float, float]]
Evaluator = Callable[[COCO, COCO, str], COCOeval]


class SilentCOCOeval(COCOeval):
    """pycocotools' COCOeval without its prints of progress."""

    def evaluate(self):
        with contextlib.redirect_stdout(io.StringIO()):
            super().evaluate()

    def accumulate(self, p=None):
        with contextlib.redirect_stdout(io.StringIO()):
            super().accumulate(p)


def faster_coco_eval() -> Evaluator:
    """Return the COCOeval of faster-coco-eval, in C++. Its matches and recalls are equal, its precisions within one ulp.

    It has no `evalImgs`.

    Raises:
        ImportError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        wanted = 'coco_eval=faster needs faster-coco-eval. Run pip install -e ".[faster-evaluation]", or choose coco_eval=pycocotools.'
        raise MissingPackageError(wanted) from error
    return partial(COCOeval_faster, print_function=log.debug)


def match(
    coco_gt: COCO,
    results: Sequence[Mapping],
    image_ids: Sequence[int],
    max_detections: int = 100,
    areas: Areas | None = None,
    coco_eval: Evaluator = SilentCOCOeval,
    iou_thresholds: np.ndarray | None = None,
    masks: bool = False,
) -> COCOeval:
    """Match detections to ground truth per class and image. The caller calls `accumulate()` on what is returned.

    Args:
        coco_gt: the annotations, which are not modified.
        results: COCO's results. Those of other images are left out.
        image_ids: the images to evaluate.
        max_detections: per image and category.
        areas: size ranges by name in square pixels, both ends included. None: COCO's all, small, medium and large.
        coco_eval: `(ground truth, detections, "bbox" or "segm") -> COCOeval`.
        iou_thresholds: ascending. None: COCO's 0.5:0.05:0.95.
        masks: match masks in the place of boxes: `segmentation` of the annotations and of the results, which are RLEs.

    Returns:
        A COCOeval whose `cocoGt` and `cocoDt` are copies with ids from 1.

    Raises:
        ValueError: a result or an image that `coco_gt` does not have, a number that is not finite, or a result without the mask.
    """
    if max_detections < 1:
        raise InputError(f"max_detections must be at least 1, got {max_detections}")
    if len(image_ids) == 0:
        raise InputError("no images to evaluate: image_ids is empty")
    with without_garbage_collection():
        check_results(coco_gt, results)
        ground_truth = _ground_truth(coco_gt, image_ids, masks)
        matched = coco_eval(ground_truth, _detections(ground_truth, results, masks), "segm" if masks else "bbox")
        matched.params.maxDets = sorted({min(k, max_detections) for k in (1, 10, 100)} | {max_detections})
        if areas is not None:
            matched.params.areaRngLbl = list(areas)
            matched.params.areaRng = [list(ends) for ends in areas.values()]
        if iou_thresholds is not None:
            matched.params.iouThrs = np.asarray(iou_thresholds, dtype=np.float64)
        matched.evaluate()
    return matched


def indices_of(thresholds: np.ndarray, wanted: Sequence[float]) -> list[int]:
    """Return where a COCOeval has these IoU thresholds, but for the last bit: COCO's 0.6 is not Python's."""
    return [int(np.abs(thresholds - one).argmin()) for one in wanted]


def percent(values: np.ndarray) -> float:
    """Return the mean of COCOeval's numbers in percent without its -1 for "no ground truth". NaN where nothing is left."""
    measured = values[values > -1]
    return 100.0 * float(measured.mean()) if measured.size else math.nan


def check_results(coco_gt: COCO, results: Sequence[Mapping]) -> None:
    """Raise InputError where a result has an image or a category that `coco_gt` does not have, or a number that is not finite."""
    for index, result in enumerate(results):
        missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in result]
        if missing:
            raise InputError(f"result {index} has no {', '.join(missing)}: expected image_id, category_id, bbox [x, y, w, h] and score")
        for key, known in (("image_id", coco_gt.imgs), ("category_id", coco_gt.cats)):
            if result[key] not in known:
                raise InputError(
                    f"result {index} has {key} {result[key]!r}, which the annotations do not have. Are these results of another data set?"
                )
        box, score = result["bbox"], result["score"]
        if len(box) != 4 or not all(map(math.isfinite, (*box, score))) or box[2] < 0 or box[3] < 0:
            raise InputError(
                f"result {index} (image {result['image_id']}): expected a finite bbox [x, y, w, h] with w, h >= 0 and a finite score, "
                f"got bbox {box} and score {score}"
            )


def _ground_truth(coco_gt: COCO, image_ids: Sequence[int], masks: bool) -> COCO:
    """Copy the annotations of these images, numbered from 1 because COCOeval takes id 0 for "no match"."""
    unknown = [image_id for image_id in image_ids if image_id not in coco_gt.imgs]
    if unknown:
        raise InputError(f"{len(unknown)} of the images to evaluate are not in the annotations, the first is image {unknown[0]}")
    annotations, without_area = [], 0
    for image_id in sorted(set(image_ids)):
        for annotation in coco_gt.imgToAnns.get(image_id, []):
            if len(annotation.get("bbox") or ()) != 4:
                raise InputError(f"annotation {annotation.get('id')} of image {image_id} has no bbox [x, y, w, h]")
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
                | ({"segmentation": annotation["segmentation"]} if masks else {})
            )
    if without_area:
        log.warning("%d annotations have no area. The areas of their boxes decide which are small, medium and large.", without_area)
    return _indexed([coco_gt.imgs[i] for i in sorted(set(image_ids))], list(coco_gt.cats.values()), annotations)


def _detections(ground_truth: COCO, results: Sequence[Mapping], masks: bool) -> COCO:
    """Do as `COCO.loadRes`, for an empty list as well, and without modifying the results. The size of a mask is its own, not its box's."""
    kept = [result for result in results if result["image_id"] in ground_truth.imgs]
    without_mask = next((result for result in kept if masks and "segmentation" not in result), None)
    if without_mask is not None:
        raise InputError(f"a result of image {without_mask['image_id']} has no segmentation, and masks are evaluated")
    areas = [coco_mask.area(result["segmentation"]) if masks else result["bbox"][2] * result["bbox"][3] for result in kept]
    annotations = [
        {**result, "id": number, "area": float(area), "iscrowd": 0}
        for number, (result, area) in enumerate(zip(kept, areas, strict=True), 1)
    ]
    return _indexed(ground_truth.dataset["images"], ground_truth.dataset["categories"], annotations)


def _indexed(images: list[dict], categories: list[dict], annotations: list[dict]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
