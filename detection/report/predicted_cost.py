"""What quantization will cost, from annotations, proposals and one trained run: docs/predicted_cost.md has the derivation.

The *ceiling* needs nothing trained. It is the accuracy of the ideal localizer with perfect classes and scores. The
*prediction* adds the ideal localizer's errors to the detections of a run that was trained with RoIAlign.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from torch import Tensor, cat, from_numpy
from torchvision.ops import box_iou

from roi_quantization.detection.alignment.ideal_localizer import IdealLocalizer
from roi_quantization.detection.alignment.misalignment import Operator
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.evaluation.bootstrap import MatchedDetections, bootstrap_over_images
from roi_quantization.detection.evaluation.protocol import COCO_PROTOCOL, Protocol
from roi_quantization.detection.evaluation.statistics import Estimate, difference

THRESHOLDS = np.linspace(0.5, 0.95, 10)
SIZES = {"< 2 cells": (0.0, 2.0), "2 to 4": (2.0, 4.0), "4 to 8": (4.0, 8.0), "> 8 cells": (8.0, np.inf)}
SMALL = 4.0  # cells
_ROIS = 32  # of an object, at most: those of highest IoU


@dataclass(frozen=True)
class Foreground:
    """The objects of a data set and the proposals that overlap them by IoU 0.5 or more, in pixels of the network's input.

    Attributes:
        objects: float64 `[M, 4]`, xyxy.
        labels: int `[M]`.
        rois: float64 `[N, 4]`, by object and falling IoU.
        object_of: int `[N]`, index of the object of each RoI, ascending.
    """

    objects: np.ndarray
    labels: np.ndarray
    rois: np.ndarray
    object_of: np.ndarray

    def sizes(self, stride: int) -> np.ndarray:
        """Return widths and heights of the RoIs in cells."""
        return (self.rois[:, 2:] - self.rois[:, :2]).ravel() / stride


@dataclass(frozen=True)
class Ceiling:
    """The IoU that the ideal localizer reaches for each object, 0 where it is missed, and the objects' sizes in cells."""

    iou: np.ndarray
    labels: np.ndarray
    cells: np.ndarray

    def metrics(self, least: float = 0.0, below: float = np.inf) -> dict[str, float]:
        """Return `AP`, `AP50`, `AP75` (percent), `mean_iou` of the objects found and the number of `objects` in a range of sizes.

        With perfect classes and scores AP is the mean over classes of the recall. COCOeval's differs by less than a
        point, as it has 101 levels of recall. NaN without objects.
        """
        chosen = (self.cells >= least) & (self.cells < below)
        iou, labels = self.iou[chosen], self.labels[chosen]
        found = iou[iou >= 0.5]
        recalls = [100 * (iou[labels == label, None] >= THRESHOLDS).mean(axis=0) for label in np.unique(labels)]
        recall = np.mean(recalls, axis=0) if recalls else np.full(len(THRESHOLDS), np.nan)
        mean_iou = float(found.mean()) if len(found) else np.nan
        return {"AP": recall.mean(), "AP50": recall[0], "AP75": recall[5], "mean_iou": mean_iou, "objects": int(chosen.sum())}

    def share_of_small(self, reference: "Ceiling") -> float:
        """Return which share of the loss of AP against the reference is on objects smaller than 4 cells, NaN without a loss."""
        _, place, objects = np.unique(self.labels, return_inverse=True, return_counts=True)
        loss = (reference.iou[:, None] >= THRESHOLDS).sum(axis=1) - (self.iou[:, None] >= THRESHOLDS).sum(axis=1)
        loss = loss / objects[place]  # each class counts alike
        return float(loss[self.cells < SMALL].sum() / loss.sum()) if loss.sum() > 0 else np.nan


def gather_foreground(images: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Foreground:
    """Match proposals to objects.

    Args:
        images: of each image the proposals `[L, 4]`, the boxes of its objects `[G, 4]` and their labels `[G]`.

    Raises:
        InputError: there are no objects, or no proposal overlaps one by IoU 0.5.
    """
    objects, labels, rois, object_of, count = [], [], [], [], 0
    for proposals, boxes, of_boxes in images:
        objects.append(boxes.double())
        labels.append(of_boxes)
        if len(boxes) and len(proposals):
            overlap, order = box_iou(boxes.double(), proposals.double()).topk(min(_ROIS, len(proposals)), dim=1)
            place, rank = (overlap >= 0.5).nonzero(as_tuple=True)
            rois.append(proposals[order[place, rank]].double())
            object_of.append(place + count)
        count += len(boxes)
    if count == 0:
        raise InputError("The data set has no objects, so nothing can be predicted. Choose a split with annotations.")
    if not sum(map(len, rois)):
        raise InputError(
            "No proposal overlaps an object by IoU 0.5, so no object can be found. Look at `python recall.py` and choose others."
        )
    return Foreground(*(cat(parts).numpy() for parts in (objects, labels, rois, object_of)))


def ceiling(foreground: Foreground, operator: Operator, stride: int, output_size: int = 7) -> Ceiling:
    """Compute the best IoU that a head can reach for each object, from the proposal of highest IoU whose sampled region has an extent."""
    localizer = IdealLocalizer(operator, foreground.sizes(stride), output_size)
    truth = foreground.objects[foreground.object_of]
    boxes, is_empty = localizer.localize(foreground.rois / stride, truth / stride)
    iou = np.zeros(len(foreground.objects))
    place, first = np.unique(foreground.object_of[~is_empty], return_index=True)
    iou[place] = _iou(boxes[~is_empty][first] * stride, foreground.objects[place])
    cells = np.sqrt((foreground.objects[:, 2:] - foreground.objects[:, :2]).prod(axis=1)) / stride
    return Ceiling(iou, foreground.labels, cells)


def is_exact(operator: Operator, output_size: int = 7) -> bool:
    """Whether a run with this operator has no error by rounding, so that another operator can be predicted from its detections."""
    return IdealLocalizer(operator, np.array([2.0, 8.0]), output_size).is_exact


def predicted_results(
    results: Sequence[Mapping], operator: Operator, stride: int, scales: Mapping[int, float] | None = None, output_size: int = 7
) -> list[dict]:
    """Move the detections of a run with exact RoIs to where a head with `operator` would have put them at best.

    Detections whose sampled region has no extent are dropped, as they show neither class nor place.

    Args:
        results: COCO's results with a key `proposal`.
        operator: see `misalignment.lattice_rule`.
        stride: pixels of the network's input per cell.
        scales: image id -> pixels of the network's input per pixel of the image. None: images are not resized.
        output_size: bins per side.

    Raises:
        InputError: there are no results, or one has no proposal.
    """
    if not results:
        raise InputError("There are no results to predict from.")
    without = sum("proposal" not in result for result in results)
    if without:
        raise InputError(f"{without} of {len(results)} results have no `proposal`. Evaluate the run with eval.py, which writes them.")
    scale = np.array([1.0 if scales is None else scales[result["image_id"]] for result in results])[:, None] / stride
    detections, rois = (_xyxy([result[key] for result in results]) * scale for key in ("bbox", "proposal"))
    rois[:, 2:] = np.maximum(rois[:, 2:], rois[:, :2] + 1e-3)  # results are rounded to 1/1000 pixel
    localizer = IdealLocalizer(operator, (rois[:, 2:] - rois[:, :2]).ravel(), output_size)
    boxes, is_empty = localizer.localize(rois, detections)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1) / scale
    return [{**result, "bbox": box} for result, box, drop in zip(results, xywh.tolist(), is_empty, strict=True) if not drop]


def predict(
    coco_gt: COCO,
    results: Sequence[Mapping],
    image_ids: Sequence[int],
    operators: Mapping[str, Operator],
    reference: str,
    stride: int,
    scales: Mapping[int, float] | None = None,
    output_size: int = 7,
    resamples: int = 1000,
    protocol: Protocol = COCO_PROTOCOL,
) -> dict[str, dict[str, Estimate]]:
    """Predict the difference of each operator to the reference in AP, AP50 and AP75, with intervals over images.

    Args:
        coco_gt, image_ids: see `roi_quantization.detection.evaluation.coco.evaluate`.
        results: of a run that was trained with the reference.
        operators: by name, without the reference.
        reference: name of the run's operator.
        stride, scales, output_size: see `predicted_results`.
        resamples: of the bootstrap.
        protocol: that the run was evaluated with.

    Returns:
        Operator -> AP, AP50, AP75 -> difference, and the reference -> its own metrics.
    """
    matched = {reference: MatchedDetections(coco_gt, results, image_ids, protocol.max_detections, protocol)}
    for name, operator in operators.items():
        moved = predicted_results(results, operator, stride, scales, output_size)
        matched[name] = MatchedDetections(coco_gt, moved, image_ids, protocol.max_detections, protocol)
    sums = {reference: {reference: 1}} | {name: difference(name, reference) for name in operators}
    return bootstrap_over_images(matched, sums, resamples=resamples)


def _xyxy(xywh: list) -> np.ndarray:
    boxes = np.array(xywh, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return box_iou(from_numpy(a)[:, None], from_numpy(b)[:, None])[:, 0, 0].numpy() if len(a) else np.zeros(0)
