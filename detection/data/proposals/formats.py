"""Public formats of proposals, read into the arrays of our own (docs/proposals.md), less `size`, which they do not have."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from roi_quantization.detection.data.proposals.safe_pickle import read_pickle
from roi_quantization.detection.errors import InputError

Arrays = dict[str, np.ndarray]


def read_detectron(path: Path | str) -> Arrays:
    """Proposals as Detectron and Detectron2 keep them: a pickled dict of lists, an entry an image.

    ids (or indexes): int or str. boxes: float `[L, 4]`, (x1, y1, x2, y2). scores or objectness_logits: `[L]`, the higher the better.

    In Detectron a box ends with its last pixel inside, its width being x2 - x1 + 1, so 1 is added to x2 and y2; Detectron2's, which has
    `objectness_logits` or `bbox_mode` (only 0, absolute x1, y1, x2, y2), is continuous.
    Sources: facebookresearch/Detectron, `detectron/datasets/json_dataset.py` (`_add_proposals_from_file`) and `detectron/utils/boxes.py`;
    facebookresearch/detectron2, `detectron2/data/build.py` (`load_proposals_into_dataset`).

    Only containers and numpy arrays are unpickled, see `read_pickle`. Raises `ValueError` that names the file and what is missing.
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
    return _arrays(path, ids, content["boxes"], scores, ends=0 if detectron2 else 1)


IDS, SCORES = ("ids", "indexes"), ("scores", "objectness_logits")


def read_mat(path: Path | str, columns: str) -> Arrays:
    """MATLAB's selective search as it was published with R-CNN and Fast R-CNN (`voc_2007_trainval.mat`, ...).

    boxes: a cell array, `[L, 4]` an image, 1-based and with the last pixel inside, the best first. images: a cell array of their names
    without extension. `columns` tells the order of the four: "yxyx" is (y1, x1, y2, x2), which is that of Uijlings' own code and of the
    published files; "xyxy" is (x1, y1, x2, y2). (x1, y1, x2, y2) becomes the continuous (x1 - 1, y1 - 1, x2, y2).
    Source: rbgirshick/fast-rcnn, `lib/datasets/pascal_voc.py` (`_load_selective_search_roidb`: columns 1, 0, 3, 2, and 1 less).

    Raises `ValueError` that names the file and what is missing.
    """
    try:
        content = loadmat(path, variable_names=("boxes", "images"))
    except NotImplementedError as error:
        raise InputError(f"{path} is of MATLAB's version 7.3: save it again with save(..., '-v7').") from error
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} is not a whole .mat file: {error}") from error
    for name, what in (("boxes", "[L, 4] for each image"), ("images", "the images' names")):
        if name not in content or content[name].dtype != object:
            raise InputError(f"{path} has no cell array {name!r} ({what}): without both nobody can tell which windows are whose.")
    names = [str(np.squeeze(entry)) for entry in content["images"].ravel()]
    order = [1, 0, 3, 2] if columns == "yxyx" else [0, 1, 2, 3]
    arrays = _arrays(path, names, content["boxes"].ravel(), scores=None, ends=0)
    return arrays | {"boxes": arrays["boxes"][:, order] - np.float32([1, 1, 0, 0])}


def _arrays(path: Path | str, ids: Sequence, boxes: Sequence, scores: Sequence | None, ends: int) -> Arrays:
    """One entry an image -> flat arrays. `ends` is added to x2 and y2."""
    lists = {"ids": ids, "boxes": boxes} | ({} if scores is None else {"scores": scores})
    for name, entries in lists.items():
        if not isinstance(entries, list | np.ndarray):
            raise InputError(f"{path}: {name} is of type {type(entries).__name__}; expected a list with an entry for each image.")
    lengths = {name: len(entries) for name, entries in lists.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise InputError(f"{path} has {told}; expected an entry of each for every image.")
    try:
        names = [entry if isinstance(entry, str) else int(entry) for entry in ids]
        boxes = [np.asarray(of_image, np.float32).reshape(-1, 4) for of_image in boxes]
        scores = None if scores is None else [np.asarray(of_image, np.float32).reshape(-1) for of_image in scores]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: expected boxes of four numbers, [L, 4] for each image, scores [L], and ids: {error}") from error
    arrays = {
        "image_id": np.array(names),
        "count": np.array([len(of_image) for of_image in boxes], dtype=np.int64),
        "boxes": np.concatenate([np.zeros((0, 4), np.float32), *boxes]) + np.float32([0, 0, ends, ends]),
    }
    return arrays | ({} if scores is None else {"scores": np.concatenate([np.zeros(0, np.float32), *scores])})
