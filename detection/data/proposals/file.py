"""Proposals from a file, whoever made them. The format is described in docs/proposals.md."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roi_quantization.detection.data.images import ImageRecord
from roi_quantization.detection.data.proposals.formats import read_detectron, read_mat
from roi_quantization.detection.errors import InputError, MissingFileError
from roi_quantization.detection.files import atomic_file

log = logging.getLogger(__name__)

SHAPES = {"image_id": "[n]", "size": "[n, 2]", "count": "[n]", "boxes": "[sum(count), 4]"}
KINDS = {"boxes": "iuf", "scores": "iuf", "image_id": "iuU"}  # numpy's kinds; names of images, in public formats, are strings
OPTIONAL = ("scores", "fingerprint")  # the latter is the cache's own, see `ProposalCache`


class ProposalFile:
    """Windows read from a file, cut to their image; those without area are dropped, counted and logged.

    Args:
        path: `.npz` (docs/proposals.md), Detectron's `.pkl` (`read_detectron`) or MATLAB's `.mat` (`read_mat`). None is an error only when
            windows are asked for, so that a split that is not used needs no file.
        max_proposals: keep so many windows of an image: those with the highest scores, or the first ones where the file has no scores.
        mat_columns: order of the coordinates in a `.mat`: "yxyx", as the published files have it, or "xyxy".

    Images are found by their id; in files that name images, by `str(id)`, file name or file name without extension, whichever fits.
    """

    def __init__(self, path: Path | str | None, max_proposals: int | None = None, mat_columns: str = "yxyx"):
        if mat_columns not in ("yxyx", "xyxy"):
            raise InputError(f"mat_columns={mat_columns}: expected yxyx or xyxy, the order of the coordinates in a .mat file.")
        self.path = path
        self.max_proposals = max_proposals
        self.mat_columns = mat_columns
        self._arrays: dict[str, np.ndarray] | None = None
        self._rows: dict[Path, int] = {}

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Reads the file, and checks that it has each of these images, at its size."""
        if self.path is None:
            raise InputError("No proposal file was given for this split: set proposals.<split>.path, or choose proposals=grid.")
        if self._arrays is None:
            self._arrays = self._read()
            self._starts = np.concatenate([[0], np.cumsum(self._arrays["count"])])
        rows = self._find(images)
        dropped = 0
        for image, row in zip(images, rows, strict=True):
            self._check_size(image, row)
            dropped += int((~_has_area(self._cut(image, row))).sum())
        if dropped:
            total = int(self._arrays["count"][rows].sum())
            log.warning("%s: dropped %d of %d windows without area or outside their image.", self.path, dropped, total)
        self._rows |= {image.path: row for image, row in zip(images, rows, strict=True)}

    def __call__(self, image: ImageRecord) -> Tensor:
        row = self._rows[image.path]
        boxes = self._cut(image, row)
        kept = np.flatnonzero(_has_area(boxes))
        if "scores" in self._arrays:
            kept = kept[np.argsort(-self._arrays["scores"][self._starts[row] :][kept], kind="stable")]
        return torch.from_numpy(boxes[kept[: self.max_proposals]].astype(np.float32))

    def _read(self) -> dict[str, np.ndarray]:
        suffix = Path(self.path).suffix.lower()
        if suffix not in (".pkl", ".pickle", ".mat") or not Path(self.path).is_file():
            return read_proposals(self.path)
        arrays = read_mat(self.path, self.mat_columns) if suffix == ".mat" else read_detectron(self.path)
        _check(Path(self.path), arrays)
        return arrays

    def _find(self, images: Sequence[ImageRecord]) -> list[int]:
        """The row of each image."""
        there = {key: row for row, key in enumerate(self._arrays["image_id"].tolist())}
        names = ([image.id for image in images], [str(image.id) for image in images])
        names += ([image.path.name for image in images], [image.path.stem for image in images])
        fitting = max(names, key=lambda keys: sum(key in there for key in keys))
        missing = [image for image, key in zip(images, fitting, strict=True) if key not in there]
        if missing:
            raise InputError(
                f"{self.path} has no proposals for {len(missing)} of {len(images)} images; the first is image {missing[0].id} "
                f"({missing[0].path.name}), and the file has {', '.join(map(str, list(there)[:3]))}, ...: was it made for another set or "
                "split? Make it for these images; one for which nothing was proposed needs an entry without windows (docs/proposals.md)."
            )
        return [there[key] for key in fitting]

    def _boxes(self, row: int) -> np.ndarray:
        return self._arrays["boxes"][self._starts[row] : self._starts[row + 1]]

    def _cut(self, image: ImageRecord, row: int) -> np.ndarray:
        """The windows cut to their image, those of which nothing is left included."""
        return np.clip(self._boxes(row), 0, np.array([image.width, image.height] * 2, self._arrays["boxes"].dtype))

    def _check_size(self, image: ImageRecord, row: int) -> None:
        """The size, or, in formats that tell none, whether the windows lie in the image; to a pixel, since conventions differ by one."""
        if "size" in self._arrays:
            width, height = self._arrays["size"][row].tolist()
            fits = (width, height) == (image.width, image.height)
            found = f"are for {width} x {height} pixels"
        else:
            boxes = self._boxes(row)
            low, right, bottom = boxes.min(initial=0), boxes[:, 2].max(initial=0), boxes[:, 3].max(initial=0)
            fits = low >= -1 and right <= image.width + 1 and bottom <= image.height + 1
            found = f"reach to x = {right:g}, y = {bottom:g}" if low >= -1 else f"begin at {low:g}"
        if not fits:
            more = ", and in the order of the columns that proposals.<split>.mat_columns says" if str(self.path).endswith(".mat") else ""
            raise InputError(
                f"{self.path}: the proposals of image {image.id} {found}, but {image.path.name} has {image.width} x {image.height}: were "
                f"they made for other images, or at another size? They must be in pixels of the image as it lies on disk{more}."
            )


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
    _check(Path(path), arrays)
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def read_proposals(path: Path | str) -> dict[str, np.ndarray]:
    """The checked arrays of a proposal file; `ValueError` names the file and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no proposal file at {path}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*SHAPES, *OPTIONAL) if name in file}
    except Exception as error:  # what numpy raises depends on where a file is damaged
        raise InputError(f"{path} is not a proposal file (.npz, see docs/proposals.md), or was cut short: {error}") from error
    missing = [name for name in SHAPES if name not in arrays]
    if missing:
        raise InputError(f"{path} has no array {missing[0]!r}; a proposal file has {', '.join(SHAPES)} (docs/proposals.md).")
    _check(path, arrays)
    return arrays


def _check(path: Path, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if array.dtype.kind not in KINDS.get(name, "iu"):
            raise InputError(f"{path}: {name} is of dtype {array.dtype}, expected {'whole ' if name not in KINDS else ''}numbers.")
    images, windows = arrays["image_id"].size, len(np.atleast_1d(arrays["boxes"]))
    expected = {"image_id": (images,), "size": (images, 2), "count": (images,), "boxes": (windows, 4), "scores": (windows,)}
    expected["fingerprint"] = (images,)
    for name, array in arrays.items():
        if array.shape != expected[name]:
            raise InputError(f"{path}: {name} has shape {array.shape}, expected {expected[name]} ({images} images, {windows} boxes).")
    if (arrays["count"] < 0).any() or (arrays["count"] > windows).any() or arrays["count"].sum() != windows:
        raise InputError(f"{path}: the counts sum up to {arrays['count'].sum()}, but there are {windows} boxes.")
    ids, times = np.unique(arrays["image_id"], return_counts=True)
    if (times > 1).any():
        raise InputError(f"{path} has image {ids[times > 1][0]} more than once.")
    for name in ("boxes", "scores"):
        finite = np.isfinite(arrays.get(name, np.zeros((windows, 1))))
        finite = finite.all(axis=tuple(range(1, finite.ndim)))
        if not finite.all():
            row = np.searchsorted(np.cumsum(arrays["count"]), np.argmin(finite), side="right")
            raise InputError(f"{path}: {(~finite).sum()} {name} are not finite; the first is of image {arrays['image_id'][row]}.")


def _has_area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
