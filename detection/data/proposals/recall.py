"""Recall of proposals: the share of objects that they cover, by object size and number of windows."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

SIZES = {"all": (0.0, math.inf), "small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, math.inf)}  # COCO's, side in pixels
COCO_IOUS = tuple(number / 100 for number in range(50, 100, 5))


def best_overlaps(windows: Tensor, objects: Tensor) -> Tensor:
    """Return the IoU of each object with its best window: `[L, 4]`, `[G, 4]` -> `[G]`; 0 without windows."""
    return box_iou(objects, windows).amax(dim=1) if len(windows) else objects.new_zeros(len(objects))


def recall(proposals: Iterable[Tensor], boxes: Iterable[Tensor], thresholds: Sequence[float] = (0.5, 0.75)) -> dict[float, float]:
    """Return for each IoU threshold the share of all objects that some window of their image reaches.

    Args:
        proposals: windows `[L, 4]` of each image.
        boxes: objects `[G, 4]` of each image, in the same coordinates.
        thresholds: of the IoU.

    Returns:
        Threshold -> share, 0 to 1; NaN without objects.
    """
    best = [best_overlaps(windows, objects) for windows, objects in zip(proposals, boxes, strict=True)]
    best = torch.cat(best) if best else torch.zeros(0)
    return {threshold: (best >= threshold).double().mean().item() for threshold in thresholds}


def recall_table(images: Iterable[tuple[Tensor, Tensor]], counts: Sequence[int | None]) -> list[dict]:
    """Compute the recall of the first windows of each image, by object size.

    Args:
        images: windows `[L, 4]` and objects `[G, 4]` of each image, in pixels of the upright image (after its EXIF
            orientation), without crowd regions.
        counts: numbers of windows of an image, taken in the provider's order; None means all.

    Returns:
        A row for each count and size: `windows` (the count), `size`, `objects` (their number), and in percent `R50`, `R75` and `AR`, the
        mean over IoU 0.5 to 0.95 as in COCO. The size of an object is the square root of its box's area (in COCO of its segment's); an
        object on the border of two sizes has the larger one. NaN without objects.
    """
    overlaps, sides = {count: [] for count in counts}, []
    for windows, objects in images:
        sides.append(box_area(objects).sqrt())
        for count in counts:
            overlaps[count].append(best_overlaps(windows[:count], objects))
    sides = torch.cat(sides)
    rows = []
    for count in counts:
        best = torch.cat(overlaps[count])
        for size, (low, high) in SIZES.items():
            of_size = best[(sides >= low) & (sides < high)]
            share = {iou: 100 * (of_size >= iou).double().mean().item() for iou in COCO_IOUS}
            shares = {"AR": float(np.mean(list(share.values()))), "R50": share[COCO_IOUS[0]], "R75": share[COCO_IOUS[5]]}
            rows.append({"windows": count, "size": size, "objects": len(of_size)} | shares)
    return rows


def format_recall(rows: Sequence[Mapping]) -> str:
    """Format the rows of `recall_table` in percent: a line for each number of windows, three columns for each object size."""
    sizes = {row["size"]: row["objects"] for row in rows}
    lines = ["objects   " + "".join(f"{f'{size} ({objects})':^21}" for size, objects in sizes.items())]
    lines.append("windows   " + "    AR    R50    R75 " * len(sizes))
    for count in dict.fromkeys(row["windows"] for row in rows):
        cells = [row[name] for row in rows if row["windows"] == count for name in ("AR", "R50", "R75")]
        lines.append(f"{'all' if count is None else count:>7}   " + " ".join("     -" if math.isnan(c) else f"{c:6.1f}" for c in cells))
    return "\n".join(line.rstrip() for line in lines)
