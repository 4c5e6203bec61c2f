"""AP by object size in cells of the feature map, the unit in which a RoI operator rounds.

COCO's borders between small, medium and large, 32 and 96 pixels, are 2 and 6 cells at stride 16, and 1 and 3 cells at
stride 32. Strides are compared at equal sizes in cells.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.renamed_targets import rename_targets
from roi_quantization.detection.data.annotations import as_coco
from roi_quantization.detection.evaluation.matching import indices_of, match, percent
from roi_quantization.detection.evaluation.protocol import COCO_PROTOCOL, Protocol

CELLS = (2.0, 6.0)
RESIZE = "roi_quantization.detection.data.transforms.resize_and_flip"


def average_precision_by_cells(
    coco_gt: COCO,
    results: Sequence[Mapping],
    image_ids: Sequence[int],
    stride: int,
    scales: Mapping[int, float] | None = None,
    borders: Sequence[float] = CELLS,
    max_detections: int = 100,
    protocol: Protocol = COCO_PROTOCOL,
) -> dict[str, dict[str, float]]:
    """Compute AP by object size in cells. The size is the square root of the annotated `area`, as in COCO.

    Args:
        coco_gt, results, image_ids, max_detections, protocol: see `roi_quantization.detection.evaluation.coco.evaluate`.
        stride: pixels of the network's input per cell.
        scales: image id -> pixels of the network's input per pixel of the image. None: images are not resized.
        borders: between the sizes, in cells, ascending. An object on a border counts on both sides, as in COCO.

    Returns:
        `"< 2 cells"`, `"2 to 6 cells"`, `"> 6 cells"` -> AP, AP50, AP75 in percent, NaN without objects, and their
        number `objects`.

    Raises:
        ValueError: borders that do not ascend from above 0, or images without scale.
    """
    if list(borders) != sorted(set(borders)) or not borders or borders[0] <= 0:
        raise InputError(f"borders must be positive and ascending, got {list(borders)}")
    if scales is not None:
        missing = sorted(set(image_ids) - set(scales))
        if missing:
            raise InputError(f"scales lacks {len(missing)} of the images, the first is {missing[0]}")
        coco_gt, results = _scaled_truth(coco_gt, image_ids, scales), _scaled(results, scales)
    ends = [0.0, *((border * stride) ** 2 for border in borders), 1e10]
    names = [f"< {borders[0]:g} cells", *(f"{low:g} to {high:g} cells" for low, high in pairwise(borders))]
    names.append(f"> {borders[-1]:g} cells")

    areas = dict(zip(names, pairwise(ends), strict=True))
    coco_eval = match(coco_gt, results, image_ids, max_detections, areas, iou_thresholds=protocol.evaluated_thresholds)
    coco_eval.accumulate()
    precision = coco_eval.eval["precision"][..., -1]  # [IoU threshold, recall, class, size]
    iou50, iou75, *averaged = indices_of(np.asarray(coco_eval.params.iouThrs), (0.5, 0.75, *protocol.iou_thresholds))
    truths = [annotation for annotation in coco_eval.cocoGt.anns.values() if not annotation["iscrowd"]]
    table = {}
    for place, (name, (low, high)) in enumerate(areas.items()):
        of_size = precision[..., place]
        table[name] = {"AP": percent(of_size[averaged]), "AP50": percent(of_size[iou50]), "AP75": percent(of_size[iou75])}
        table[name]["objects"] = sum(low <= annotation["area"] <= high for annotation in truths)
    return table


def resize_sides(transform: Mapping[str, Any] | None) -> tuple[int | None, int | None]:
    """Return `short_side` and `max_side` of the configuration `data.eval_transform`, for `resize_scales`. No transform: both are None.

    Raises:
        InputError: it does not say to what size it resizes an image: it is not `resize_and_flip`, or draws the size from a list.
    """
    if transform is None:
        return None, None
    target = rename_targets({"_target_": transform.get("_target_")})["_target_"]
    if target != RESIZE:
        raise InputError(f"data.eval_transform is {target}: to what size it resizes an image is not known. Only that of {RESIZE} is")
    short_side = transform.get("short_side")
    if isinstance(short_side, Sequence):
        raise InputError(
            f"data.eval_transform.short_side={short_side} is drawn from for each image: its size is not known. Set one number of pixels"
        )
    return short_side, transform.get("max_side")


def resize_scales(coco_gt: COCO, short_side: int | None, max_side: int | None = None) -> dict[int, float] | None:
    """Return image id -> pixels of the resized image per pixel of the original. None where images keep their size.

    The rule is that of `roi_quantization.detection.data.transforms.resize_and_flip`, without rounding to whole pixels.
    """
    if short_side is None and max_side is None:
        return None
    scales = {}
    for image_id, image in coco_gt.imgs.items():
        short, long = sorted((image["width"], image["height"]))
        wanted = 1.0 if short_side is None else short_side / short
        scales[image_id] = min(wanted, (max_side or math.inf) / long)
    return scales


def _scaled_truth(coco_gt: COCO, image_ids: Sequence[int], scales: Mapping[int, float]) -> COCO:
    """Scale the annotations to the network's input. IoUs do not change, areas do."""
    annotations = []
    for image_id in sorted(set(image_ids)):
        for annotation in coco_gt.imgToAnns.get(image_id, []):
            scaled = annotation | {"bbox": _times(annotation["bbox"], scales[image_id])}
            if annotation.get("area") is not None:
                scaled["area"] = annotation["area"] * scales[image_id] ** 2
            annotations.append(scaled)
    images = [coco_gt.imgs[image_id] for image_id in sorted(set(image_ids))]
    return as_coco({"images": images, "annotations": annotations, "categories": list(coco_gt.cats.values())})


def _scaled(results: Sequence[Mapping], scales: Mapping[int, float]) -> list[dict]:
    return [{**result, "bbox": _times(result["bbox"], scales[result["image_id"]])} for result in results if result["image_id"] in scales]


def _times(values: Sequence[float], factor: float) -> list[float]:
    return (np.asarray(values, dtype=np.float64) * factor).tolist()
