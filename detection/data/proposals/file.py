"""Proposals from a file. docs/proposals.md describes the format."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roi_quantization.detection.common.configuration import path_setting
from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.common.files import atomic_file
from roi_quantization.detection.data import plausibility
from roi_quantization.detection.data.images import ImageRecord
from roi_quantization.detection.data.proposals.formats import read_detectron, read_mat

log = logging.getLogger(__name__)

SHAPES = {"image_id": "[n]", "size": "[n, 2]", "count": "[n]", "boxes": "[sum(count), 4]"}
DTYPE_KINDS = {"boxes": "iuf", "scores": "iuf", "image_id": "iuU"}  # public formats name images with strings
OPTIONAL = ("scores", "fingerprint")  # `ProposalCache` writes the latter
JUDGED_IMAGES = 1000  # images, evenly spaced, whose windows are judged for plausibility


class ProposalFile:
    """Windows read from a file, cut to their image. Windows without area are dropped, counted and logged.

    An image is found by its id in a `.npz`, and by its name in a `.mat`: the file name with or without extension and folders. A `.pkl` has
    either. Where both fit and give an image different windows the file is refused unless `match_by` is set.

    Args:
        path: `.npz` (docs/proposals.md), Detectron's `.pkl` (`read_detectron`) or MATLAB's `.mat` (`read_mat`). None is an error only when
            the split is used.
        max_proposals: upper limit of the windows of an image: those with the highest scores, or the first ones without scores.
        mat_columns: order of the coordinates in a `.mat`: "yxyx", as in the published files, or "xyxy".
        match_by: "id" or "name", how the file refers to images; None decides as above.
    """

    def __init__(self, path: Path | str | None, max_proposals: int | None = None, mat_columns: str = "yxyx", match_by: str | None = None):
        if mat_columns not in ("yxyx", "xyxy"):
            raise InputError(f"mat_columns={mat_columns}: expected yxyx or xyxy, the order of the coordinates in a .mat file.")
        if match_by not in (None, "id", "name"):
            raise InputError(f"match_by={match_by}: expected id or name, how the file refers to images, or null.")
        self.path = None if path is None else path_setting(path, "proposals.<split>.path")
        self.max_proposals = max_proposals
        self.mat_columns = mat_columns
        self.match_by = match_by
        self._arrays: dict[str, np.ndarray] | None = None
        self._rows: dict[Path, int] = {}

    def prepare(self, images: Sequence[ImageRecord]) -> None:
        """Read the file, and check that it has windows of each of these images, at its size, that are plausible."""
        if self.path is None:
            raise InputError("This split has no proposal file: set proposals.<split>.path, or choose proposals=grid.")
        if self._arrays is None:
            self._arrays = self._read()
            self._starts = np.concatenate([[0], np.cumsum(self._arrays["count"])])
        rows = self._match(images)
        self._judge(images, rows)
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
        return torch.from_numpy(boxes[kept[: self.max_proposals]])

    def _read(self) -> dict[str, np.ndarray]:
        suffix = Path(self.path).suffix.lower()
        if suffix not in (".pkl", ".pickle", ".mat") or not Path(self.path).is_file():
            return read_proposals(self.path)
        arrays = read_mat(self.path, self.mat_columns) if suffix == ".mat" else read_detectron(self.path)
        _check(Path(self.path), arrays)
        return arrays

    def _match(self, images: Sequence[ImageRecord]) -> list[int]:
        """Return the row of each image in the file."""
        row_of = {key: row for row, key in enumerate(self._arrays["image_id"].tolist())}
        suffix, has_names = Path(self.path).suffix.lower(), self._arrays["image_id"].dtype.kind == "U"
        by_default = {".mat": ["name"], ".npz": ["id"]}.get(suffix, ["id", "name"])
        depths = 1 + max((key.count("/") for key in row_of if has_names), default=0)
        ways = [self.match_by] if self.match_by else by_default
        keys = {how: _best(_keys(images, how, has_names, depths), row_of) for how in ways}
        rows = {how: [row_of[key] for key in of_images] for how, of_images in keys.items() if all(key in row_of for key in of_images)}
        if not rows:
            missing = min(
                ([image for image, key in zip(images, of_images, strict=True) if key not in row_of] for of_images in keys.values()), key=len
            )
            raise InputError(
                f"{self.path} has no proposals for {len(missing)} of {len(images)} images; the first is image {missing[0].id} "
                f"({missing[0].path.name}), and the file has {', '.join(map(str, list(row_of)[:3]))}, ...: was it made for another set or "
                "split? Make it for these images; an image without proposals needs an entry without windows (docs/proposals.md)."
            )
        chosen, *others = rows
        for how in others:
            for image, row, other in zip(images, rows[chosen], rows[how], strict=True):
                if row != other:
                    raise InputError(
                        f"{self.path} fits the images by {chosen} and by {how}, and gives image {image.id} ({image.path.name}) different "
                        "windows. Set proposals.<split>.match_by=id or match_by=name."
                    )
        if len(set(rows[chosen])) < len(images):
            first_of: dict[int, ImageRecord] = {}
            one, other = next(
                (first_of[row], image)
                for image, row in zip(images, rows[chosen], strict=True)
                if first_of.setdefault(row, image) is not image
            )
            raise InputError(
                f"{self.path} has one entry for {one.path} and {other.path}, whose names differ in the folder only: name images with their "
                "folder in the file, or use ids."
            )
        return rows[chosen]

    def _judge(self, images: Sequence[ImageRecord], rows: Sequence[int]) -> None:
        """Log what is implausible in the windows of some images, or refuse them. Formats without sizes are checked by `_check_size`."""
        if "size" not in self._arrays:
            return
        sample = range(0, len(images), -(-len(images) // JUDGED_IMAGES))
        counts = [int(self._arrays["count"][rows[index]]) for index in sample]
        windows = np.concatenate([np.zeros((0, 4)), *(self._boxes(rows[index]) for index in sample)])
        of_image = np.repeat(np.array(sample), counts)
        sizes = np.array([(image.width, image.height) for image in images])[of_image]

        def describe(number: int) -> str:
            image = images[of_image[number]]
            return f"{windows[number].tolist()} of image {image.id} ({image.path.name}, {image.width} x {image.height})"

        plausibility.report(plausibility.judge_windows(windows, sizes, describe), self.path)

    def _boxes(self, row: int) -> np.ndarray:
        return self._arrays["boxes"][self._starts[row] : self._starts[row + 1]]

    def _cut(self, image: ImageRecord, row: int) -> np.ndarray:
        """Return the windows of an image cut to it, float32, including those of which nothing is left."""
        boxes = self._boxes(row).astype(np.float64)  # the size may be no number of the windows' type
        return np.clip(boxes, 0, [image.width, image.height] * 2).astype(np.float32)

    def _check_size(self, image: ImageRecord, row: int) -> None:
        """Check the size that the file has for an image; in formats without sizes, that the windows end at most a pixel outside."""
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
                f"they made for other images, or at another size? They must be in pixels of the upright "
                f"image (after its EXIF orientation){more}."
            )


def write_proposals(
    path: Path | str,
    images: Sequence[ImageRecord],
    boxes: Sequence[np.ndarray],
    scores: Sequence[np.ndarray] | None = None,
    fingerprint: Sequence[int] | None = None,
) -> None:
    """Write a proposal file atomically.

    Args:
        path: the file, `.npz`.
        images: the images, in any order.
        boxes: windows `[L, 4]` of each image, x1, y1, x2, y2 in pixels of the upright image (after its EXIF
            orientation). They are stored as int16 if all of them are, else float32.
        scores: `[L]` of each image.
        fingerprint: of each image, see `ProposalCache`.
    """
    for image, of_image in zip(images, map(np.asarray, boxes), strict=True):
        if of_image.size and (of_image.ndim != 2 or of_image.shape[1] != 4):
            raise InputError(f"{path}: the windows of image {image.id} have the shape {list(of_image.shape)}; expected [L, 4].")
    for image, of_image, its_scores in zip(images, boxes, scores or boxes, strict=True):
        if len(its_scores) != len(of_image):
            raise InputError(f"{path}: image {image.id} has {len(of_image)} windows and {len(its_scores)} scores; expected one for each.")
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
    """Read and check the arrays of a proposal file.

    Returns:
        The arrays as they are in the file, except for counts, which are int64, and whole numbers as scores, which are float64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no valid proposal file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no proposal file at {path}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*SHAPES, *OPTIONAL) if name in file}
    except Exception as error:  # what numpy raises depends on where a file is damaged
        raise InputError(f"{path} is not a proposal file (.npz, see docs/proposals.md), or is truncated: {error}") from error
    missing = [name for name in SHAPES if name not in arrays]
    if missing:
        raise InputError(f"{path} has no array {missing[0]!r}; a proposal file has {', '.join(SHAPES)} (docs/proposals.md).")
    _check(path, arrays)
    arrays["count"] = arrays["count"].astype(np.int64)
    if "scores" in arrays and arrays["scores"].dtype.kind != "f":
        arrays["scores"] = arrays["scores"].astype(np.float64)  # unsigned numbers have no negative, by which they are sorted
    return arrays


def _check(path: Path, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        if array.dtype.kind not in DTYPE_KINDS.get(name, "iu"):
            expected = {"image_id": "whole numbers or names", "boxes": "numbers", "scores": "numbers"}.get(name, "whole numbers")
            raise InputError(f"{path}: {name} is of dtype {array.dtype}, expected {expected}.")
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


def _keys(images: Sequence[ImageRecord], how: str, has_names: bool, depths: int) -> list[list[int | str | None]]:
    """Return the ways in which a file can refer to images: a list of keys for each way. Names have up to `depths` parts."""
    if how == "id":
        return [[str(image.id) if has_names else image.id for image in images]]
    if not has_names:
        return [[int(image.path.stem) if image.path.stem.isdecimal() else None for image in images]]
    names = [["/".join(image.path.parts[-depth:]) for image in images] for depth in range(1, depths + 1)]
    return names + [["/".join((*image.path.parts[-depth:-1], image.path.stem)) for image in images] for depth in range(1, depths + 1)]


def _best(ways: list[list], row_of: dict) -> list:
    """Return the keys of the way by which most images are in the file."""
    return max(ways, key=lambda keys: sum(key in row_of for key in keys))


def _has_area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
