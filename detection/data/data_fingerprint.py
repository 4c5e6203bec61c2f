"""Whether a run that goes on has the data that it began with."""

import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl

from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.data.module import DetectionData

log = logging.getLogger(__name__)

PROPOSALS = 1000  # images whose windows are compared, spread over the split: some providers compute windows when they are asked for

KINDS = {"file": "another file (name or bytes)", "annotations": "other annotations", "proposals": "other proposals"}
Prints = dict[str, dict[int, int]]  # kind -> image id -> 64 bits


class DataFingerprint(pl.Callback):
    """Keeps fingerprints of the data in the checkpoints, and ends a run that would go on with other data.

    An image counts by its name and size in bytes (its pixels are not read), its boxes, labels and crowd regions, and its windows. That is
    about two seconds for COCO.

    Args:
        data: after `setup`.
        required: False lets a run go on with other data, and tells the differences in the log.
    """

    def __init__(self, data: DetectionData, required: bool = True):
        splits = {name: getattr(data, name) for name in ("train", "val", "test")}
        self.prints = {name: fingerprints(split) for name, split in splits.items() if split is not None}
        self.required = required

    def state_dict(self) -> dict[str, Any]:
        return self.prints

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the data differ from those of the checkpoint that `state` is from."""
        nothing = {kind: {} for kind in KINDS}
        splits = {**state, **self.prints}
        differ = [text for name in splits for text in _differences(name, state.get(name, nothing), self.prints.get(name, nothing))]
        if not differ:
            return
        told = f"the data are not those that this run began with: {'; '.join(differ)}"
        if self.required:
            raise ValueError(f"{told}. Put the old ones back; or go on with these all the same: checkpoint.same_data=false")
        log.warning("checkpoint.same_data=false: %s", told)


def fingerprints(dataset: CocoDetection) -> Prints:
    """Of each image of a set: `{"file": {image id: 64 bits}, "annotations": ..., "proposals": ...}`, the last of some images only."""
    prints: Prints = {kind: {} for kind in KINDS}
    categories = json.dumps(dataset.categories).encode()
    step = -(-len(dataset) // PROPOSALS)
    for index, record in enumerate(dataset.records):
        prints["file"][record.id] = _hash(f"{record.path.stat().st_size} {record.path.name}".encode())
        boxes = (part.numpy().tobytes() for part in dataset.annotated(index))
        prints["annotations"][record.id] = _hash(categories, f"{record.width} x {record.height}".encode(), *boxes)
        if index % step == 0:
            prints["proposals"][record.id] = _hash(dataset.proposals(record).numpy().tobytes())
    return prints


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return int.from_bytes(digest.digest())


def _differences(split: str, before: Prints, now: Prints) -> Iterator[str]:
    new, gone = now["file"].keys() - before["file"].keys(), before["file"].keys() - now["file"].keys()
    if new:
        yield f"{split} has {len(new)} new images (the first is {min(new)})"
    if gone:
        yield f"{split} lacks {len(gone)} images (the first is {min(gone)})"
    for kind, what in KINDS.items():
        both = before[kind].keys() & now[kind].keys()
        if other := [image_id for image_id in both if before[kind][image_id] != now[kind][image_id]]:
            yield f"{len(other)} images of {split} have {what} (the first is {min(other)})"
