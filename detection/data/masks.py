"""Masks of objects: COCO's segmentations, which are polygons or run lengths (RLE), to pixels and back. pycocotools computes both."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

EXPECTED = "a list of polygons [x1, y1, x2, y2, x3, y3, ...] in pixels, or an RLE {size: [height, width], counts}"


def find_fault(segmentation: Any, height: int, width: int) -> str | None:
    """Say what is wrong with a segmentation of an image of this size; None where nothing is."""
    if isinstance(segmentation, list) and segmentation:
        return next((fault for polygon in segmentation if (fault := _fault_of_polygon(polygon))), None)
    if isinstance(segmentation, dict) and segmentation.keys() >= {"size", "counts"}:
        return _fault_of_rle(segmentation, height, width)
    return f"is {segmentation!r:.80}; expected {EXPECTED}"


def _fault_of_polygon(polygon: Any) -> str | None:
    if not isinstance(polygon, list) or not all(isinstance(value, int | float) and math.isfinite(value) for value in polygon):
        return f"has the polygon {polygon!r:.80}; expected finite numbers [x1, y1, x2, y2, x3, y3, ...]"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"has a polygon of {len(polygon)} numbers; expected x and y of at least three corners"
    return None


def _fault_of_rle(rle: dict, height: int, width: int) -> str | None:
    size, counts = rle["size"], rle["counts"]
    if size != [height, width]:
        return f"has an RLE of size {size!r:.80}; expected that of its image, [height, width] = [{height}, {width}]"
    if isinstance(counts, list):
        if all(type(count) is int and count >= 0 for count in counts) and sum(counts) == height * width:
            return None
        return f"has an RLE whose counts are not whole numbers that add up to the {height * width} pixels of its image"
    try:
        coco_mask.decode({"size": size, "counts": counts})
    except (TypeError, ValueError) as error:
        return f"has an RLE that does not decode ({error}); expected counts as pycocotools encodes them"
    return None


def to_masks(segmentations: Sequence[Any], height: int, width: int) -> Tensor:
    """Draw segmentations in the pixels of their image: uint8 `[G, height, width]`, 1 inside."""
    masks = np.zeros((len(segmentations), height, width), dtype=np.uint8)
    for drawn, segmentation in zip(masks, segmentations, strict=True):
        rle = segmentation
        if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
            rle = coco_mask.frPyObjects(segmentation, height, width)
        drawn[:] = coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle)
    return torch.from_numpy(masks)


def encode(masks: Tensor) -> list[dict]:
    """Return masks `[D, H, W]` as RLEs `{"size": [H, W], "counts": text}`, which take the memory of their outlines."""
    found = coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8))) if len(masks) else []
    return [{"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()} for rle in found]


def decode(rles: Iterable[dict]) -> np.ndarray:
    """Return RLEs as masks, bool `[D, H, W]`. There must be at least one."""
    return coco_mask.decode(list(rles)).transpose(2, 0, 1).astype(bool)
