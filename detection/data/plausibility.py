"""Judge whether a data set that is valid is plausible too, when it is opened.

Boxes in other units or another order of coordinates, objects listed twice and training images in the test split are all valid, and make
the results wrong without an error. The checks work on arrays of all boxes and read no image.
"""

import filecmp
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roi_quantization.detection.common.errors import InputError

log = logging.getLogger(__name__)

TOLERANCE = 1.0  # pixels that a box may end outside its image: conventions differ by one
MIN_BOXES = 20  # fewer boxes are warned of and not refused: what they have in common may be chance
MAX_COPIES = 1000  # pairs of files of the same name and size whose bytes are compared


@dataclass(frozen=True)
class Finding:
    """Something implausible: what and how often, the first case, and what to do. `is_fatal` if nothing sound is left."""

    text: str
    is_fatal: bool = False


def report(findings: Iterable[Finding], source: object) -> None:
    """Log each finding as a warning that begins with `source`.

    Raises:
        ValueError: one of them is fatal.
    """
    for finding in findings:
        if finding.is_fatal:
            raise InputError(f"{source}: {finding.text}")
        log.warning("%s: %s", source, finding.text)


def judge_instances(instances: Mapping) -> Iterator[Finding]:
    """Judge the images, categories and annotations that `annotations.read_instances` returns."""
    annotations, images = instances["annotations"], instances["images"]
    index_of = {image["id"]: index for index, image in enumerate(images)}
    indices = np.array([index_of[annotation["image_id"]] for annotation in annotations], dtype=np.int64)
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([(image["width"], image["height"]) for image in images]).reshape(-1, 2)[indices]
    category_ids = np.array([annotation["category_id"] for annotation in annotations], dtype=np.int64)

    def describe(number: int) -> str:
        annotation, image = annotations[number], images[indices[number]]
        return f"annotation {annotation['id']} of image {image['id']} ({image['file_name']}), bbox {annotation['bbox']}"

    names = {image["id"]: image["file_name"] for image in images}
    yield from judge_images(names, {category["id"]: category["name"] for category in instances["categories"]})
    yield from judge_boxes(boxes, sizes, describe)
    yield from judge_annotations(indices, category_ids, boxes, describe)
    yield from judge_areas(annotations, describe)


def judge_boxes(boxes: np.ndarray, sizes: np.ndarray, describe: Callable[[int], str]) -> Iterator[Finding]:
    """Judge annotated boxes.

    Args:
        boxes: `[n, 4]`, x, y, width, height in pixels, as annotated.
        sizes: `[n, 2]`, width and height of the image of each box.
        describe: names box i with its image, for the messages.
    """
    if len(boxes) == 0:
        return
    if finding := _below_a_pixel(boxes[:, 2:], boxes, "boxes", describe):
        yield finding
    ends = boxes[:, :2] + boxes[:, 2:]
    fits = _fits(boxes[:, :2], ends, sizes)
    if not fits.all():
        text = f"{np.sum(~fits)} of {len(boxes)} boxes reach more than a pixel out of their image; the first is "
        text += describe(int(np.argmin(fits)))
        if remedy := _better_order(boxes, sizes, fits):
            yield Finding(f"{text}. {remedy}", is_fatal=len(boxes) >= MIN_BOXES)
        else:
            yield Finding(f"{text}. They are cut to the image. Was the image resized after it was annotated?")
    if finding := _short_reach(ends / sizes, describe):
        yield finding


def judge_detections(boxes: np.ndarray, sizes: np.ndarray, describe: Callable[[int], str]) -> Iterator[Finding]:
    """Judge detected boxes by what most of them have in common: a sound detector may find some outside their image. None is fatal.

    Args:
        boxes: `[n, 4]`, x, y, width, height in pixels.
        sizes: `[n, 2]`, width and height of the image of each box.
        describe: names box i with its image, for the messages.
    """
    if len(boxes) == 0:
        return
    if (finding := _below_a_pixel(boxes[:, 2:], boxes, "boxes", describe)) and finding.is_fatal:
        yield Finding(finding.text)
        return
    ends = boxes[:, :2] + boxes[:, 2:]
    fits = _fits(boxes[:, :2], ends, sizes)
    remedy = _better_order(boxes, sizes, fits)
    if remedy or fits.mean() < 0.5:
        yield Finding(
            f"{np.sum(~fits)} of {len(boxes)} boxes have no area or reach more than a pixel out of their image; the first is "
            f"{describe(int(np.argmin(fits)))}. {remedy or 'Were they made for other images, or at another size?'}"
        )
    if finding := _short_reach(ends / sizes, describe):
        yield finding


def judge_annotations(
    image_ids: np.ndarray, category_ids: np.ndarray, boxes: np.ndarray, describe: Callable[[int], str]
) -> Iterator[Finding]:
    """Find objects that are annotated twice: image, category and box are the same. Below 1 % of all objects it is no finding."""
    rows = np.column_stack([image_ids, category_ids, boxes])
    sums = (rows * np.sqrt([2, 3, 5, 7, 11, 13])).sum(axis=1)  # equal rows have equal sums: one number sorts faster than six
    order = np.argsort(sums, kind="stable")
    repeated = (rows[order][1:] == rows[order][:-1]).all(axis=1)
    if repeated.sum() > 0.01 * len(rows):
        first = describe(int(order[1:][repeated].min()))
        yield Finding(f"{repeated.sum()} of {len(rows)} objects are annotated more than once; the first is {first}. Remove the copies")


def judge_areas(annotations: Sequence[Mapping], describe: Callable[[int], str]) -> Iterator[Finding]:
    """Find annotations whose `area` is 0 though their box has one, and those with `ignore` that are no crowd regions."""
    no_area = [number for number, annotation in enumerate(annotations) if annotation["area"] == 0]
    if no_area:
        yield Finding(
            f"{len(no_area)} of {len(annotations)} annotations have area 0, though their boxes have one; the first is "
            f"{describe(no_area[0])}. They count as small objects: write the area in pixels, or leave it out for that of the box"
        )
    ignored = [number for number, annotation in enumerate(annotations) if annotation.get("ignore") and not annotation["iscrowd"]]
    if ignored:
        yield Finding(
            f"{len(ignored)} of {len(annotations)} annotations have ignore and not iscrowd; the first is {describe(ignored[0])}. "
            "They count as objects, as in COCO's metrics: set iscrowd to 1 where they are to be ignored"
        )


def judge_images(names: Mapping[int, str], categories: Mapping[int, str]) -> Iterator[Finding]:
    """Find files that several images name, and names that several categories have.

    Args:
        names: image id -> file name.
        categories: category id -> name.
    """
    files = {image_id: os.path.normpath(name) for image_id, name in names.items()}
    for kind, of_id, remedy in (
        ("images have the file", files, "Objects of one id are background under the other: merge their annotations"),
        ("categories have the name", categories, "A detector cannot tell them apart: merge them"),
    ):
        counts = Counter(of_id.values())
        if surplus := len(of_id) - len(counts):
            first = next(name for name, count in counts.items() if count > 1)
            ids = ", ".join(str(key) for key, name in of_id.items() if name == first)
            yield Finding(f"{surplus} of {len(of_id)} {kind} of another; the first is {first!r} with the ids {ids}. {remedy}")


def judge_splits(files: Mapping[str, Sequence[Path]]) -> Iterator[Finding]:
    """Find images of the first of two splits in the second: the same file, or a copy with the same name.

    Args:
        files: split -> its images, of train, val and test in this order.
    """
    first, second = files
    earlier, later = (_real_paths(files[split]) for split in (first, second))
    by_name = {path.name: path for path in earlier.values()}
    shared = [path for path in later if path in earlier]
    pairs = [(by_name[path.name], path) for key, path in later.items() if key not in earlier and path.name in by_name]
    shared += [str(path) for seen, path in pairs[:MAX_COPIES] if _are_copies(seen, path)]
    if shared:
        found = f"{len(shared)} of {len(later)} images of {second} are"
        yield Finding(
            f"{found} training images; the first is {shared[0]}. Results on them are too good: remove them from one of the splits"
            if first == "train"
            else f"{found} images of {first}, on which the best checkpoint is chosen; the first is {shared[0]}. Results on them are a "
            f"little too good: hold out another part of the images with data.{first}.part, or set data.{first}=null"
        )


def judge_windows(windows: np.ndarray, sizes: np.ndarray, describe: Callable[[int], str]) -> Iterator[Finding]:
    """Judge proposals.

    Args:
        windows: `[n, 4]`, x1, y1, x2, y2 in pixels.
        sizes: `[n, 2]`, width and height of the image of each window.
        describe: names window i with its image, for the messages.
    """
    if len(windows) == 0:
        return
    sides = windows[:, 2:] - windows[:, :2]
    if finding := _below_a_pixel(np.abs(sides), windows, "windows", describe):
        yield finding
    fits = _fits(windows[:, :2], windows[:, 2:], sizes)
    if fits.all():
        return
    as_xywh = _fits(windows[:, :2], windows[:, :2] + windows[:, 2:], sizes).mean()
    text = (
        f"{np.sum(~fits)} of {len(windows)} windows have no area or reach more than a pixel out of their image; the first is "
        f"{describe(int(np.argmin(fits)))}"
    )
    many = len(windows) >= MIN_BOXES
    if as_xywh >= 0.99 and fits.mean() < 0.95:
        yield Finding(f"{text}. They are more plausible as [x, y, width, height]: convert them to [x1, y1, x2, y2]", is_fatal=many)
    elif fits.mean() < 0.5:
        yield Finding(f"{text}. They were made for other images, at another size, or are not [x1, y1, x2, y2]", is_fatal=many)
    else:
        yield Finding(f"{text}. They are cut to the image, and dropped where nothing is left")


def _below_a_pixel(sides: np.ndarray, boxes: np.ndarray, what: str, describe: Callable[[int], str]) -> Finding | None:
    tiny = ((sides < 1) & (sides > 0)).all(axis=1)
    are_normalised = np.abs(boxes).max() <= 1.01 and tiny.any()
    if are_normalised or tiny.all():
        remedy = "are normalised: multiply them by" if are_normalised else "are not in pixels: were they divided by"
        text = f"all {len(boxes)} {what} are below a pixel; the first is {describe(0)}. They {remedy} the width and height of the image"
        return Finding(text, is_fatal=what == "boxes" or len(boxes) >= MIN_BOXES)
    if tiny.any():
        first = describe(int(np.argmax(tiny)))
        return Finding(f"{tiny.sum()} of {len(boxes)} {what} are smaller than a pixel; the first is {first}. Are they in pixels?")
    return None


def _better_order(boxes: np.ndarray, sizes: np.ndarray, fits: np.ndarray) -> str | None:
    """Name the order of coordinates in which nearly all boxes lie in their image, where as [x, y, width, height] too few do."""
    if fits.mean() >= 0.95:
        return None
    others = {
        "[x1, y1, x2, y2]": _fits(boxes[:, :2], boxes[:, 2:], sizes),
        "[centre x, centre y, width, height]": _fits(boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2, sizes),
    }
    better = " or ".join(f"{order} ({fit.mean():.0%} fit)" for order, fit in others.items() if fit.mean() >= 0.99)
    return f"They are more plausible as {better}: convert them to [x, y, width, height]" if better else None


def _short_reach(ends: np.ndarray, describe: Callable[[int], str]) -> Finding | None:
    """Judge where boxes end, `[n, 2]` as shares of the width and height of their image."""
    reach = ends.max(axis=0)
    if len(ends) < MIN_BOXES or (reach >= 2 / 3).any():
        return None
    return Finding(
        f"no box ends beyond {reach[0]:.0%} of the width and {reach[1]:.0%} of the height of its image; the first is {describe(0)}. "
        "Were they made for smaller images, or are they percentages?"
    )


def _fits(low: np.ndarray, high: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Tell which boxes have an area and lie in their image."""
    return ((high > low) & (low >= -TOLERANCE) & (high <= sizes + TOLERANCE)).all(axis=1)


def _real_paths(paths: Sequence[Path]) -> dict[str, Path]:
    """Real path -> path. Links between folders are resolved, those of single files are not: that would read the disk for each image."""
    real = {folder: os.path.realpath(folder) for folder in {path.parent for path in paths}}
    return {os.path.join(real[path.parent], path.name): path for path in paths}


def _are_copies(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and filecmp.cmp(one, other, shallow=False)
