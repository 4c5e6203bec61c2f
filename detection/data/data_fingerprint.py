"""Check that a resumed run, or a sweep, has the data that it started with."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import atomic_write, read_json
from roi_quantization.detection.data.coco import CocoDetection
from roi_quantization.detection.data.module import DetectionData

log = logging.getLogger(__name__)

NAME = "data.json"  # in a run folder: split -> digest of the fingerprints of the data that it was trained and evaluated with
SAMPLE = 1000  # images of a split, evenly spaced, whose content and proposals are compared

KINDS = {
    "file": "another file (name or bytes)",
    "content": "another content",
    "annotations": "other annotations",
    "proposals": "other proposals",
}
Fingerprints = dict[str, dict[int, int]]  # kind -> image id -> 64 bits


class DataFingerprint(pl.Callback):
    """Stores fingerprints of the data in the checkpoints, and refuses to resume a run with other data.

    The fingerprint of an image covers the name and size in bytes of its file, its boxes, labels, crowd regions and masks and, for at most
    `SAMPLE` images of a split, the content of the file and its proposals. It takes about three seconds for COCO.

    Args:
        data: the data module, after `setup`.
        required: False resumes with other data, and logs a warning with the differences.
    """

    def __init__(self, data: DetectionData, required: bool = True):
        splits = {name: getattr(data, name) for name in ("train", "val", "test")}
        self.fingerprints = {name: compute_fingerprints(split) for name, split in splits.items() if split is not None}
        self.required = required

    def state_dict(self) -> dict[str, Any]:
        return self.fingerprints

    def write(self, run_dir: Path) -> None:
        """Write `data.json`, from which a sweep knows its data where they have been moved."""
        atomic_write(run_dir / NAME, json.dumps(_digest(self.fingerprints), indent=2).encode())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the data with the fingerprints from a checkpoint.

        Raises:
            ValueError: they differ, and `required` is set.
        """
        empty = {kind: {} for kind in KINDS}
        splits = {**state, **self.fingerprints}
        differences = [text for name in splits for text in _differences(name, state.get(name, empty), self.fingerprints.get(name, empty))]
        if not differences:
            return
        message = f"the data are not those that this run began with: {'; '.join(differences)}"
        if self.required:
            raise InputError(f"{message}. Put the old data back, or set checkpoint.same_data=false to resume with the new data.")
        log.warning("checkpoint.same_data=false: %s", message)


def compute_fingerprints(dataset: CocoDetection) -> Fingerprints:
    """Compute the fingerprints of each image; those of content and proposals for at most `SAMPLE` images."""
    result: Fingerprints = {kind: {} for kind in KINDS}
    categories = json.dumps(dataset.categories).encode()
    step = -(-len(dataset) // SAMPLE)
    for index, record in enumerate(dataset.records):
        result["file"][record.id] = _hash(f"{record.path.stat().st_size} {record.path.name}".encode())
        boxes = (part.numpy().tobytes() for part in dataset.ground_truth(index))
        masks = (json.dumps(segmentation).encode() for segmentation in dataset.segmentations(index))
        result["annotations"][record.id] = _hash(categories, f"{record.width} x {record.height}".encode(), *boxes, *masks)
        if index % step == 0:
            result["content"][record.id] = _hash(record.path.read_bytes())
            result["proposals"][record.id] = _hash(dataset.proposals(record).numpy().tobytes())
    return result


def digest(data: DetectionData) -> dict[str, str]:
    """Return split -> digest of the fingerprints of its images, which a copy of the data in another folder has too."""
    return _digest(DataFingerprint(data).fingerprints)


def recorded_digest(run_dir: Path) -> dict[str, str] | None:
    """Read what `DataFingerprint.write` wrote. None of a run of an earlier version, which wrote nothing."""
    return read_json(run_dir / NAME, dict) if (run_dir / NAME).is_file() else None


def changed_splits(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """List the splits of two `digest`s whose images, annotations or proposals differ."""
    return [split for split in {**recorded, **now} if recorded.get(split) != now.get(split)]


def _digest(fingerprints: Mapping[str, Fingerprints]) -> dict[str, str]:
    return {name: f"{_hash(json.dumps(of_split, sort_keys=True).encode()):016x}" for name, of_split in fingerprints.items()}


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return int.from_bytes(digest.digest())


def _differences(split: str, before: Fingerprints, now: Fingerprints) -> Iterator[str]:
    new, gone = now["file"].keys() - before["file"].keys(), before["file"].keys() - now["file"].keys()
    if new:
        yield f"{split} has {len(new)} new images (the first is {min(new)})"
    if gone:
        yield f"{split} lacks {len(gone)} images (the first is {min(gone)})"
    for kind, what in KINDS.items():
        earlier = before.get(kind, {})  # checkpoints of earlier versions have no content
        both = earlier.keys() & now[kind].keys()
        if other := [image_id for image_id in both if earlier[image_id] != now[kind][image_id]]:
            yield f"{len(other)} images of {split} have {what} (the first is {min(other)})"
