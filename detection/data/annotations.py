"""Read, check and subset the instances json of a data set in COCO's layout."""

import contextlib
import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from operator import index
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.data.garbage_collection import without_garbage_collection
from roi_quantization.detection.data.images import check_size
from roi_quantization.detection.data.masks import find_fault, to_masks

log = logging.getLogger(__name__)

LAYOUT = """\
COCO's layout is folders of images, and an instances json for each. Say where they are with data.root=<root>.
data=custom:
    <root>/train/, <root>/val/, <root>/annotations/instances_train.json, ..._val.json
data=coco, the three archives of https://cocodataset.org/#download:
    <root>/train2017/000000000009.jpg ...                        from train2017.zip
    <root>/val2017/000000000139.jpg ...                          from val2017.zip
    <root>/annotations/instances_train2017.json, ..._val2017.json    from annotations_trainval2017.zip"""

PER_SPLIT_HINT = "Set it for one split with +data.val.subset=20 or +data.test.ids=[...]."

REQUIRED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def read_instances(path: Path | str, masks: bool = False) -> dict:
    """Read and check an instances json.

    Missing `id`, `area` (of the mask, or else of the box) and `iscrowd` of annotations are filled in. Boxes without area inside their
    image are dropped, counted and logged.

    Args:
        path: the file.
        masks: keep segmentations, of which each annotation needs one. They are removed else: they are most of the memory of COCO's json.

    Returns:
        `{"images": [...], "annotations": [...], "categories": [...]}`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not a valid instances json; the message names the file and the key, id or box.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} is not there.\n{LAYOUT}")
    try:
        with without_garbage_collection():
            instances = json.loads(path.read_text("utf-8-sig"), object_hook=None if masks else _without_segmentation)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a json file, or is truncated: {error}") from error

    instances = _check_keys(path, instances)
    _check_ids(path, instances)
    for image in instances["images"]:
        _check_image(path, image)
    for number, annotation in enumerate(instances["annotations"]):
        _check_annotation(path, number, annotation)
    _drop_boxes_without_area(path, instances)
    without_area = [annotation for annotation in instances["annotations"] if "area" not in annotation]
    _fill_in(path, instances["annotations"])
    if masks:
        _check_masks(path, instances)
        sizes = {image["id"]: (image["height"], image["width"]) for image in instances["images"]}
        for annotation in without_area:  # COCO's area is that of the mask, by which detections of masks are sorted into sizes
            annotation["area"] = float(to_masks([annotation["segmentation"]], *sizes[annotation["image_id"]]).sum())
    return instances


def _without_segmentation(entry: dict) -> dict:
    """Drop segmentations while the file is parsed."""
    entry.pop("segmentation", None)
    return entry


def restrict(instances: dict, image_ids: Sequence[int]) -> dict:
    """Return the instances of these images only, in this order, with all categories."""
    images = {image["id"]: image for image in instances["images"]}
    wanted = set(image_ids)
    return {
        "images": [images[image_id] for image_id in image_ids],
        "annotations": [annotation for annotation in instances["annotations"] if annotation["image_id"] in wanted],
        "categories": instances["categories"],
    }


def choose_classes(instances: dict, classes: Sequence[str] | None) -> dict:
    """Return the instances of these categories only, with all images; None keeps all. Objects of other categories become background.

    Raises:
        InputError: there is no such category; the message lists those that there are.
    """
    if classes is None:
        return instances
    present = [category["name"] for category in instances["categories"]]
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
        raise InputError(f"classes={classes}: expected a list of names, such as [{', '.join(present[:2])}]")
    classes = [str(name) for name in classes]  # YAML and Hydra read a name such as 0 as a number
    unknown = [name for name in classes if name not in present]
    if unknown:
        raise InputError(f"classes: there is no category {unknown[0]}. Choose from {', '.join(present)}")
    categories = [category for category in instances["categories"] if category["name"] in classes]
    chosen = {category["id"] for category in categories}
    annotations = [annotation for annotation in instances["annotations"] if annotation["category_id"] in chosen]
    return {"images": instances["images"], "annotations": annotations, "categories": categories}


def as_coco(instances: dict) -> COCO:
    """Build pycocotools' `COCO`, without its output on stdout."""
    coco = COCO()
    coco.dataset = instances
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def choose_images(
    instances: dict,
    part: tuple[float, float] | None = None,
    keep_empty: bool = True,
    subset: int | None = None,
    ids: Sequence[int] | Path | str | None = None,
    seed: int = 0,
) -> list[int]:
    """Return the ids of the images to use, ascending.

    First `part` is taken (see `choose_part`), then images without objects are removed unless `keep_empty`, then `subset` or `ids` are
    taken (see `choose_ids`). Crowd regions are not objects.
    """
    available = [image["id"] for image in instances["images"]]
    if part is not None:
        if not isinstance(part, Sequence) or len(part) != 2 or not all(map(_is_finite, part)):
            raise InputError(f"part={part}: expected two shares of the images, such as [0, 0.8], or null for all")
        available = choose_part(available, *part, seed=seed)
    if not keep_empty:
        filled = {annotation["image_id"] for annotation in instances["annotations"] if not annotation["iscrowd"]}
        available = [image_id for image_id in available if image_id in filled]
    return choose_ids(available, subset, ids, seed)


def choose_part(ids: Sequence[int], low: float, high: float, seed: int = 0) -> list[int]:
    """Return the ids in the part `[low, high)` of an order shuffled with `seed`, ascending.

    [0, 0.8] and [0.8, 1] are a training set and the images held out of it: parts that do not overlap have no image in common, and parts
    that meet leave none out. The order depends on the ids and on `seed` only.
    """
    if not 0 <= low < high <= 1:
        raise InputError(f"part=[{low}, {high}]: expected two shares of the images, 0 <= low < high <= 1.")
    shuffled = np.random.RandomState(seed).permutation(sorted(ids))
    return sorted(shuffled[round(low * len(shuffled)) : round(high * len(shuffled))].tolist())


def choose_ids(
    available: Sequence[int], subset: int | None = None, ids: Sequence[int] | Path | str | None = None, seed: int = 0
) -> list[int]:
    """Return the image ids to use, ascending: all, `subset` of them drawn with `seed`, or those in `ids` (a list, or a text file).

    The draw depends on the available ids and on `seed` only, so that the same subset is drawn everywhere.
    """
    available = sorted(available)
    if subset is not None and ids is not None:
        raise InputError("subset (how many images) and ids (which images) exclude each other: set one to null.")
    if subset is not None:
        if type(subset) is not int or not 0 < subset <= len(available):
            raise InputError(
                f"subset={subset} of {len(available)} images: choose a whole number between 1 and {len(available)}. {PER_SPLIT_HINT}"
            )
        # numpy keeps the stream of RandomState fixed (NEP 19), so the subset is the same with every version
        return sorted(np.random.RandomState(seed).permutation(available)[:subset].tolist())
    if ids is not None:
        try:
            wanted = _read_ids(ids) if isinstance(ids, Path | str) else [index(image_id) for image_id in ids]
        except TypeError as error:
            raise InputError(f"ids={ids}: expected a list of image ids, such as [1,2], or a text file of them") from error
        unknown = sorted(set(wanted) - set(available))
        if unknown:
            raise InputError(
                f"ids: {len(unknown)} of {len(wanted)} image ids are not in the annotations; the first is {unknown[0]}. {PER_SPLIT_HINT}"
            )
        return sorted(set(wanted))
    return available


def _read_ids(path: Path | str) -> list[int]:
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingFileError(f"ids={path}: there is no such file. Expected a text file of image ids, or a list of them, such as [1,2]")
    try:
        return [int(word) for word in path.read_text().split()]
    except ValueError as error:
        raise InputError(f"{path}: expected image ids, one per line: {error}") from error


def _check_keys(path: Path, instances: object) -> dict:
    if not isinstance(instances, dict):
        raise InputError(f"{path} holds a {type(instances).__name__}; an instances json holds an object with {', '.join(REQUIRED)}.")
    for section, keys in REQUIRED.items():
        if not isinstance(instances.get(section), list):
            found = ", ".join(instances) or "nothing"
            raise InputError(f"{path} has no list {section!r}; an instances json has {', '.join(REQUIRED)} (this file: {found}).")
        for number, entry in enumerate(instances[section]):
            missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if missing:
                raise InputError(f"{path}: {section}[{number}] has no {missing[0]!r}; each needs {', '.join(keys)}.")
    return {section: instances[section] for section in REQUIRED}


def _check_ids(path: Path, instances: dict) -> None:
    annotations = instances["annotations"]
    for section, key in (("images", "id"), ("categories", "id"), ("annotations", "image_id"), ("annotations", "category_id")):
        for entry in instances[section]:
            if type(entry[key]) is not int or abs(entry[key]) >= 2**63:
                kind = "ids" if key == "id" else f"{key}s"
                raise InputError(f"{path}: the {kind} of {section} must be integers, but one is {_abbreviate(entry[key])}.")
    images, categories = ({entry["id"] for entry in instances[section]} for section in ("images", "categories"))
    for section, ids in (("images", images), ("categories", categories)):
        if len(ids) != len(instances[section]):
            twice, count = Counter(entry["id"] for entry in instances[section]).most_common(1)[0]
            names = [
                _abbreviate(entry["file_name" if section == "images" else "name"]) for entry in instances[section] if entry["id"] == twice
            ]
            raise InputError(
                f"{path}: {count} {section} have the id {twice} ({', '.join(names[:3])}); give each of the {len(instances[section])} "
                f"{section} an id of its own ({len(ids)} are used)."
            )
    for category in instances["categories"]:
        if not isinstance(category["name"], str):
            raise InputError(f"{path}: category {category['id']} has the name {_abbreviate(category['name'])}; expected a string.")
    for key, known in (("image_id", images), ("category_id", categories)):
        lost = [annotation[key] for annotation in annotations if annotation[key] not in known]
        if lost:
            raise InputError(f"{path}: {len(lost)} of {len(annotations)} annotations have an unknown {key}; the first is {lost[0]}.")


def _check_image(path: Path, image: dict) -> None:
    """Refuse names that lead out of the folder of images. Links inside that folder are followed, because its owner made them."""
    name = image["file_name"]
    parts = PurePath(name).parts if isinstance(name, str) and "\0" not in name else ()
    if not parts or ".." in parts or PurePath(name).is_absolute() or PureWindowsPath(name).is_absolute():
        raise InputError(
            f"{path}: image {image['id']} has file_name {_abbreviate(name)}; expected a name in the folder of images. Link images that lie "
            "elsewhere into that folder."
        )
    for side in ("width", "height"):
        if isinstance(image[side], float) and image[side].is_integer():  # as pandas and MATLAB write them
            image[side] = int(image[side])
    width, height = image["width"], image["height"]
    if not all(type(side) is int and side > 0 for side in (width, height)):
        raise InputError(f"{path}: image {image['id']} has size {_abbreviate(width)} x {_abbreviate(height)}; expected whole pixels.")
    try:
        check_size(width, height)
    except ValueError as error:
        raise InputError(f"{path}: image {image['id']} ({name}): {error}.") from error


def _check_annotation(path: Path, number: int, annotation: dict) -> None:
    box, area = annotation["bbox"], annotation.get("area", 0)
    wrong = None
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
        wrong = f"bbox {_abbreviate(box)}; expected four finite numbers [x, y, width, height]"
    elif not _is_finite(area) or area < 0:
        wrong = f"area {_abbreviate(area)}; expected a number of pixels"
    elif annotation.get("iscrowd", 0) not in (0, 1):
        wrong = f"iscrowd {_abbreviate(annotation['iscrowd'])}; expected 0 or 1"
    elif "id" in annotation and type(annotation["id"]) is not int:
        wrong = f"id {_abbreviate(annotation['id'])}; expected an integer"
    if wrong:
        name = f"annotation {annotation['id']}" if type(annotation.get("id")) is int else f"annotations[{number}]"
        raise InputError(f"{path}: {name} of image {annotation['image_id']} has {wrong}.")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _abbreviate(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _drop_boxes_without_area(path: Path, instances: dict) -> None:
    annotations, sizes = instances["annotations"], {image["id"]: (image["width"], image["height"]) for image in instances["images"]}
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    ends = np.array([sizes[annotation["image_id"]] for annotation in annotations]).reshape(-1, 2)
    low, high = np.maximum(boxes[:, :2], 0), np.minimum(boxes[:, :2] + boxes[:, 2:], ends)
    has_area = (high.astype(np.float32) > low.astype(np.float32)).all(axis=1)  # boxes are float32 from here on
    kept = [annotation for annotation, has in zip(annotations, has_area.tolist(), strict=True) if has]
    dropped = len(annotations) - len(kept)
    if dropped:
        log.warning("%s: dropped %d boxes without area or outside their image (%d are left).", path, dropped, len(kept))
    instances["annotations"] = kept


def _fill_in(path: Path, annotations: list[dict]) -> None:
    ids = {annotation.get("id") for annotation in annotations}
    if None in ids:
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
    elif len(ids) != len(annotations):
        twice, count = Counter(annotation["id"] for annotation in annotations).most_common(1)[0]
        raise InputError(
            f"{path}: {count} annotations have the id {twice}; give each of the {len(annotations)} an id of its own ({len(ids)} are used)."
        )
    for annotation in annotations:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])


def _check_masks(path: Path, instances: dict) -> None:
    images, annotations = {image["id"]: image for image in instances["images"]}, instances["annotations"]

    def name(annotation: dict) -> str:
        return f"annotation {annotation['id']} of image {annotation['image_id']} ({images[annotation['image_id']]['file_name']})"

    lacking = [annotation for annotation in annotations if not annotation.get("segmentation")]
    if lacking:
        raise InputError(
            f"{path}: {len(lacking)} of {len(annotations)} annotations have a bbox only; the first is {name(lacking[0])}. "
            "detector.masks=true needs a segmentation of each. Set detector.masks=false, or use annotations with masks"
        )
    for annotation in annotations:
        image = images[annotation["image_id"]]
        if fault := find_fault(annotation["segmentation"], image["height"], image["width"]):
            raise InputError(f"{path}: the segmentation of {name(annotation)} {fault}.")
