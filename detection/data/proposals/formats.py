"""Read public proposal formats into the arrays of our own format (docs/proposals.md), without `size`, which they lack."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.proposals.safe_pickle import read_pickle

Arrays = dict[str, np.ndarray]


def read_detectron(path: Path | str) -> Arrays:
    """Read the proposals of Detectron or Detectron2: a pickled dict of lists with an entry per image.

    ids (or indexes): int or str. boxes: float `[L, 4]`, (x1, y1, x2, y2). scores or objectness_logits: `[L]`, higher is better.

    In Detectron x2 and y2 are the last pixel inside a box, whose width is x2 - x1 + 1, so 1 is added to them. Boxes of Detectron2, whose
    files have `objectness_logits` or `bbox_mode` (only 0, absolute x1, y1, x2, y2), are continuous.
    Sources: facebookresearch/Detectron, `detectron/datasets/json_dataset.py` (`_add_proposals_from_file`) and `detectron/utils/boxes.py`;
    facebookresearch/detectron2, `detectron2/data/build.py` (`load_proposals_into_dataset`).

    Raises:
        ValueError: the pickle has other contents, or asks for more than containers and numpy arrays (see `read_pickle`).
    """
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected a dict with lists ids, boxes and scores, as Detectron writes.")
    ids, scores = (next((content[key] for key in keys if key in content), None) for keys in (IDS, SCORES))
    if ids is None or "boxes" not in content:
        raise InputError(f"{path} has {', '.join(map(str, content))}; expected ids (or indexes) and boxes, and scores where there are any.")
    if not isinstance(mode := content.get("bbox_mode", 0), int) or mode != 0:
        raise InputError(f"{path} has bbox_mode {mode}; expected 0, absolute (x1, y1, x2, y2): convert its boxes.")
    detectron2 = "objectness_logits" in content or "bbox_mode" in content
    return _arrays(path, ids, content["boxes"], scores, end_offset=0 if detectron2 else 1)


IDS, SCORES = ("ids", "indexes"), ("scores", "objectness_logits")


def read_mat(path: Path | str, columns: str) -> Arrays:
    """Read the selective search that was published with R-CNN and Fast R-CNN (`voc_2007_trainval.mat`, ...).

    boxes: a cell array of `[L, 4]` per image, 1-based with the last pixel inside, best first; (x1, y1, x2, y2) becomes the continuous
    (x1 - 1, y1 - 1, x2, y2). images: a cell array of image names without extension.
    Source: rbgirshick/fast-rcnn, `lib/datasets/pascal_voc.py` (`_load_selective_search_roidb`: columns 1, 0, 3, 2, and 1 less).

    Args:
        path: the file.
        columns: "yxyx" for (y1, x1, y2, x2), as in Uijlings' code and the published files, or "xyxy".

    Raises:
        ValueError: the file is damaged or has other contents.
    """
    try:
        content = loadmat(path, variable_names=("boxes", "images"))
    except NotImplementedError as error:
        raise InputError(f"{path} is of MATLAB's version 7.3: save it again with save(..., '-v7').") from error
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} is not a complete .mat file: {error}") from error
    for name, what in (("boxes", "[L, 4] for each image"), ("images", "the images' names")):
        if name not in content or content[name].dtype != object:
            raise InputError(f"{path} has no cell array {name!r} ({what}); both are needed to tell the images of the windows.")
    names = [str(np.squeeze(entry)) for entry in content["images"].ravel()]
    order = [1, 0, 3, 2] if columns == "yxyx" else [0, 1, 2, 3]
    arrays = _arrays(path, names, content["boxes"].ravel(), scores=None, end_offset=0)
    return arrays | {"boxes": arrays["boxes"][:, order] - np.float32([1, 1, 0, 0])}


def _arrays(path: Path | str, ids: Sequence, boxes: Sequence, scores: Sequence | None, end_offset: int) -> Arrays:
    """Flatten lists with an entry per image, and add `end_offset` to x2 and y2."""
    lists = {"ids": ids, "boxes": boxes} | ({} if scores is None else {"scores": scores})
    for name, entries in lists.items():
        if not isinstance(entries, list | np.ndarray):
            raise InputError(f"{path}: {name} is of type {type(entries).__name__}; expected a list with an entry for each image.")
    lengths = {name: len(entries) for name, entries in lists.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise InputError(f"{path} has {counts}; expected an entry of each for every image.")
    try:
        names = [entry if isinstance(entry, str) else int(entry) for entry in ids]
        boxes = [np.asarray(of_image, np.float32) for of_image in boxes]
        scores = None if scores is None else [np.asarray(of_image, np.float32).reshape(-1) for of_image in scores]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: expected boxes of four numbers, [L, 4] for each image, scores [L], and ids: {error}") from error
    for name, entry in zip(names, ids, strict=True):
        if isinstance(entry, str) != isinstance(ids[0], str) or (not isinstance(entry, str) and name != entry):
            raise InputError(f"{path} has the id {entry!r} beside {ids[0]!r}; expected whole numbers or names, not both.")
    for number, (name, of_image) in enumerate(zip(names, boxes, strict=True)):
        if of_image.size and (of_image.ndim != 2 or of_image.shape[1] != 4):
            shape = list(of_image.shape)
            raise InputError(f"{path}: expected boxes of four numbers, [L, 4] for each image; image {name} has the shape {shape}.")
        boxes[number] = of_image.reshape(-1, 4)
        if scores is not None and len(scores[number]) != len(boxes[number]):
            lengths = f"{len(boxes[number])} boxes and {len(scores[number])} scores"
            raise InputError(f"{path}: image {name} has {lengths}; expected a score for each box.")
    arrays = {
        "image_id": np.array(names),
        "count": np.array([len(of_image) for of_image in boxes], dtype=np.int64),
        "boxes": np.concatenate([np.zeros((0, 4), np.float32), *boxes]) + np.float32([0, 0, end_offset, end_offset]),
    }
    return arrays | ({} if scores is None else {"scores": np.concatenate([np.zeros(0, np.float32), *scores])})
