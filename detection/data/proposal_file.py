"""Proposals from a file, whoever made them. The format is described in docs/proposals.md."""

import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.data.images import ImageRecord

log = logging.getLogger(__name__)

SHAPES = {"image_id": "[n]", "size": "[n, 2]", "count": "[n]", "boxes": "[sum(count), 4]"}
OPTIONAL = ("scores", "fingerprint")  # the latter is the cache's own, see `ProposalCache`


class ProposalFile:
    """Windows read from an `.npz` file (docs/proposals.md), cut to their image; those without area are dropped, counted and logged.

    Args:
        path: the file. None is an error only when windows are asked for, so that a split that is not used needs no file.
        max_proposals: keep so many windows of an image: those with the highest scores, or the first ones where the file has no scores.
    """

    def __init__(self, path: Path | str | None, max_proposals: int | None = None):
        self.path = path
        self.max_proposals = max_proposals
        self._arrays: dict[str, np.ndarray] | None = None

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Reads the file, and checks that it has each of these images, at its size."""
        if self.path is None:
            raise ValueError("No proposal file was given for this split: set proposals.<split>.path, or choose proposals=grid.")
        if self._arrays is None:
            self._arrays = _cut_to_images(Path(self.path), read_proposals(self.path))
            self._row = {image_id: row for row, image_id in enumerate(self._arrays["image_id"].tolist())}
            self._starts = np.concatenate([[0], np.cumsum(self._arrays["count"])])
        missing = [image for image in images if image.id not in self._row]
        if missing:
            raise ValueError(
                f"{self.path} has no proposals for {len(missing)} of {len(images)} images; the first is image {missing[0].id} "
                f"({missing[0].path.name}). An image for which nothing was proposed needs an entry with count 0."
            )
        for image in images:
            width, height = self._arrays["size"][self._row[image.id]].tolist()
            if (width, height) != (image.width, image.height):
                raise ValueError(
                    f"{self.path}: the proposals of image {image.id} are for {width} x {height} pixels, but {image.path.name} has "
                    f"{image.width} x {image.height}; they must be in pixels of the image as it lies on disk."
                )

    def __call__(self, image: ImageRecord) -> Tensor:
        row = self._row[image.id]
        here = slice(self._starts[row], self._starts[row + 1])
        boxes = self._arrays["boxes"][here]
        if "scores" in self._arrays:
            boxes = boxes[np.argsort(-self._arrays["scores"][here], kind="stable")]
        return torch.from_numpy(boxes[: self.max_proposals].astype(np.float32))


def write_proposals(
    path: Path | str,
    images: Sequence[ImageRecord],
    boxes: Sequence[np.ndarray],
    scores: Sequence[np.ndarray] | None = None,
    fingerprint: Sequence[int] | None = None,
) -> None:
    """Writes the windows `[L, 4]` of each image (x1, y1, x2, y2 in its pixels), whole or not at all. Windows that are all int16 stay so."""
    arrays = {
        "image_id": np.array([image.id for image in images], dtype=np.int64),
        "size": np.array([(image.width, image.height) for image in images], dtype=np.int32).reshape(-1, 2),
        "count": np.array([len(of_image) for of_image in boxes], dtype=np.int64),
    }
    dtype = np.int16 if all(np.asarray(of_image).dtype == np.int16 for of_image in boxes) else np.float32
    arrays["boxes"] = np.concatenate([np.zeros((0, 4)), *(np.asarray(of_image).reshape(-1, 4) for of_image in boxes)]).astype(dtype)
    if scores is not None:
        arrays["scores"] = np.concatenate([np.zeros(0), *scores]).astype(np.float32)
    if fingerprint is not None:
        arrays["fingerprint"] = np.array(fingerprint, dtype=np.int64)
    path = Path(path)
    _check(path, arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_proposals(path: Path | str) -> dict[str, np.ndarray]:
    """The checked arrays of a proposal file; `ValueError` names the file and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no proposal file at {path}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*SHAPES, *OPTIONAL) if name in file}
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:  # TypeError: a bare .npy is no context manager
        raise ValueError(f"{path} is not a proposal file (.npz, see docs/proposals.md), or was cut short: {error}") from error
    _check(path, arrays)
    return arrays


def _check(path: Path, arrays: dict[str, np.ndarray]) -> None:
    missing = [name for name in SHAPES if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no array {missing[0]!r}; a proposal file has {', '.join(SHAPES)} (docs/proposals.md).")
    images, windows = len(arrays["image_id"]), len(arrays["boxes"])
    expected = {"image_id": (images,), "size": (images, 2), "count": (images,), "boxes": (windows, 4), "scores": (windows,)}
    expected["fingerprint"] = (images,)
    for name, array in arrays.items():
        if array.shape != expected[name]:
            raise ValueError(f"{path}: {name} has shape {array.shape}, expected {expected[name]} ({images} images, {windows} boxes).")
    if (arrays["count"] < 0).any() or arrays["count"].sum() != windows:
        raise ValueError(f"{path}: the counts sum up to {arrays['count'].sum()}, but there are {windows} boxes.")
    ids, times = np.unique(arrays["image_id"], return_counts=True)
    if (times > 1).any():
        raise ValueError(f"{path} has image {ids[times > 1][0]} more than once.")
    for name in ("boxes", "scores"):
        finite = np.isfinite(arrays.get(name, np.zeros((windows, 1)))).reshape(windows, -1).all(axis=1)
        if not finite.all():
            row = np.searchsorted(np.cumsum(arrays["count"]), np.argmin(finite), side="right")
            raise ValueError(f"{path}: {(~finite).sum()} {name} are not finite; the first is of image {arrays['image_id'][row]}.")


def _cut_to_images(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cuts windows to their image and drops those of which nothing is left."""
    images = len(arrays["count"])
    row = np.repeat(np.arange(images), arrays["count"])
    boxes = np.clip(arrays["boxes"], 0, np.tile(arrays["size"], 2)[row]).astype(arrays["boxes"].dtype)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if not kept.all():
        log.warning("%s: dropped %d of %d windows without area or outside their image.", path, (~kept).sum(), len(kept))
    cut = arrays | {"boxes": boxes[kept], "count": np.bincount(row[kept], minlength=images)}
    return cut | ({"scores": arrays["scores"][kept]} if "scores" in arrays else {})
