"""Localisation errors of matched detections, before and after box regression.

The errors are in pixels, for each edge. The signed mean is a bias, as a systematic shift of the features causes. The
median absolute error is a scatter, as rounding causes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from pycocotools.coco import COCO
from torch import from_numpy
from torchvision.ops import box_convert, box_iou

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.evaluation.matching import IOU50, match
from roi_quantization.detection.evaluation.protocol import ALL_SIZES

EDGES = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class Localisation:
    """The N detections that match an object at IoU 0.5. Boxes are float64 `[N, 4]`, xyxy, in pixels of the original image.

    Attributes:
        image_id, category_id, score: `[N]`.
        truth: the object's box.
        detection: the box after regression.
        proposal: the box before regression, which is the RoI. None where the results lack it.
        objects: number of annotated objects. N / objects is the recall.
    """

    image_id: np.ndarray
    category_id: np.ndarray
    score: np.ndarray
    truth: np.ndarray
    detection: np.ndarray
    proposal: np.ndarray | None
    objects: int

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def iou(self) -> np.ndarray:
        """`[N]`: IoU of detection and object, at least 0.5."""
        return _iou(self.detection, self.truth)

    @property
    def offset(self) -> np.ndarray:
        """`[N, 4]`: edges of the detection minus those of the object, in pixels. Positive is right or down."""
        return self.detection - self.truth

    @property
    def proposal_iou(self) -> np.ndarray | None:
        """`[N]`: IoU of proposal and object, which may be below 0.5."""
        return None if self.proposal is None else _iou(self.proposal, self.truth)

    @property
    def proposal_offset(self) -> np.ndarray | None:
        """`[N, 4]`: edges of the proposal minus those of the object, in pixels."""
        return None if self.proposal is None else self.proposal - self.truth

    @property
    def size(self) -> np.ndarray:
        """`[N]`: square root of the area of the object's box, in pixels."""
        return np.sqrt((self.truth[:, 2:] - self.truth[:, :2]).prod(axis=1))

    def where(self, chosen: np.ndarray) -> "Localisation":
        """Select rows by a mask or by indices, for example `where(found.size < 64)`. `objects` is unchanged."""
        rows = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "objects"}
        return Localisation(**{name: None if value is None else value[chosen] for name, value in rows.items()}, objects=self.objects)

    def summary(self) -> dict[str, dict[str, float]]:
        """Summarize the errors `after` regression, and `before` it where the proposals are known. NaN without matches.

        The numbers are `iou` (mean), `iou_median`, `iou_above_75` (percent), for each edge `bias_<edge>` (mean offset in
        pixels) and `off_<edge>` (median absolute offset in pixels), and `off` (median absolute offset over all edges).
        """
        parts = {"before": (self.proposal_iou, self.proposal_offset), "after": (self.iou, self.offset)}
        return {name: _summary(iou, offset) for name, (iou, offset) in parts.items() if iou is not None}


def localisation(coco_gt: COCO, results: Sequence[Mapping], image_ids: Sequence[int], max_detections: int = 100) -> Localisation:
    """Match detections to objects as COCO does at IoU 0.5: per class, by falling score, each object once, without crowds.

    Operators find different objects, and one that misses the difficult ones looks better than it is. State the recall
    `len(found) / found.objects` as well.

    Args:
        coco_gt, results, image_ids, max_detections: see `roi_quantization.detection.evaluation.coco.evaluate`. All of the
            results or none have a key `proposal`, `[x, y, w, h]` in pixels of the original image.

    Raises:
        ValueError: some of the results have no proposal, or see `evaluate`.
    """
    with_proposal = sum("proposal" in result for result in results)
    if 0 < with_proposal < len(results):
        raise InputError(f"{len(results) - with_proposal} of {len(results)} results have no proposal, and the others have one")
    coco_eval = match(coco_gt, results, image_ids, max_detections, areas={"all": ALL_SIZES})
    truths, detections = coco_eval.cocoGt.anns, coco_eval.cocoDt.anns
    pairs, objects = [], 0
    for matches in filter(None, coco_eval.evalImgs):
        objects += int(np.count_nonzero(matches["gtIgnore"] == 0))
        found = (matches["dtMatches"][IOU50] > 0) & ~matches["dtIgnore"][IOU50].astype(bool)
        ids = zip(np.array(matches["dtIds"])[found], matches["dtMatches"][IOU50][found], strict=True)
        pairs += [(detections[int(detection)], truths[int(truth)]) for detection, truth in ids]
    pairs.sort(key=lambda pair: pair[0]["id"])  # in the order of the results
    return Localisation(
        image_id=np.array([d["image_id"] for d, _ in pairs], dtype=np.int64),
        category_id=np.array([d["category_id"] for d, _ in pairs], dtype=np.int64),
        score=np.array([d["score"] for d, _ in pairs], dtype=np.float64),
        truth=_boxes([t["bbox"] for _, t in pairs]),
        detection=_boxes([d["bbox"] for d, _ in pairs]),
        proposal=_boxes([d["proposal"] for d, _ in pairs]) if with_proposal else None,
        objects=objects,
    )


def _boxes(xywh: list) -> np.ndarray:
    return box_convert(from_numpy(np.array(xywh, dtype=np.float64).reshape(-1, 4)), "xywh", "xyxy").numpy()


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute IoU row by row."""
    return box_iou(from_numpy(a)[:, None], from_numpy(b)[:, None])[:, 0, 0].numpy() if len(a) else np.zeros(0)


def _summary(iou: np.ndarray, offset: np.ndarray) -> dict[str, float]:
    if len(iou) == 0:
        iou, offset = np.full(1, np.nan), np.full((1, 4), np.nan)
    numbers = {"iou": iou.mean(), "iou_median": np.median(iou), "iou_above_75": 100 * np.where(np.isnan(iou), np.nan, iou >= 0.75).mean()}
    numbers |= {f"bias_{edge}": value for edge, value in zip(EDGES, offset.mean(axis=0), strict=True)}
    numbers |= {f"off_{edge}": value for edge, value in zip(EDGES, np.median(np.abs(offset), axis=0), strict=True)}
    numbers["off"] = np.median(np.abs(offset))
    return {name: float(value) for name, value in numbers.items()}
