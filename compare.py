"""Compare detectors by their results on the same images: AP with intervals, paired differences and types of errors.

python compare.py --annotations instances.json a/results.json b/results.json ...
"""

import roi_quantization  # noqa: F401 -- first, because it says so where the package is not installed

# isort: split
import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import atomic_write, read_json
from roi_quantization.detection.data import plausibility
from roi_quantization.detection.data.annotations import as_coco, choose_classes, read_instances, restrict
from roi_quantization.detection.evaluation.bootstrap import (
    METRICS,
    MOST_IMAGES_FOR_BCA,
    MatchedDetections,
    bootstrap_method,
    bootstrap_over_images,
)
from roi_quantization.detection.evaluation.coco import Metrics, class_names
from roi_quantization.detection.evaluation.error_types import ERROR_TYPES, ErrorSplit, split_matched
from roi_quantization.detection.evaluation.matching import check_results, match
from roi_quantization.detection.evaluation.protocol import ALL_SIZES, COCO_PROTOCOL
from roi_quantization.detection.evaluation.results_file import read_metrics, read_results
from roi_quantization.detection.evaluation.statistics import Estimate, difference
from roi_quantization.detection.runs.errors import handle_errors

log = logging.getLogger(__name__)

NAME_WIDTH = 20  # of the names in the tables, which fit 100 columns


@dataclasses.dataclass(frozen=True)
class Compared:
    """What is known of one detector."""

    name: str
    path: str
    detections: int
    images: int  # with at least one detection
    ap: dict[str, Estimate]  # AP, AP50, AP75
    minus_first: dict[str, Estimate] | None  # None for the first
    errors: ErrorSplit
    run_on: str | None = None  # "60 of 100 images and 1 of 2 classes", by metrics.json beside the file. None: all, or it is not known


@dataclasses.dataclass(frozen=True)
class _RunOn:
    """The ids of the annotations' images and categories that a detector was run on."""

    images: set[int]
    classes: set[int]

    @classmethod
    def of(cls, metrics: Metrics | None, coco: COCO) -> "_RunOn":
        """Return what metrics.json lists. All where there is none, or where it lists none."""
        images, classes = set(coco.imgs), set(coco.cats)
        if metrics and metrics.image_ids:
            images &= set(metrics.image_ids)
        if metrics and metrics.per_class:
            classes = {category for category, name in class_names(list(coco.cats.values())).items() if name in metrics.per_class}
        return cls(images, classes)

    def describe(self, coco: COCO) -> str | None:
        """Return `60 of 100 images and 1 of 2 classes`, or the one of these that is not all; None where both are."""
        of = (("images", self.images, coco.imgs), ("classes", self.classes, coco.cats))
        return " and ".join(f"{len(own)} of {len(all_)} {what}" for what, own, all_ in of if len(own) < len(all_)) or None

    def check(self, results: Sequence[Mapping], coco: COCO) -> None:
        """Raise InputError where a result has another image or category."""
        images, classes = ({result[key] for result in results} for key in ("image_id", "category_id"))
        strangers = [f"image {one}" for one in sorted(images - self.images)]
        strangers += [f"class {coco.cats[one]['name']}" for one in sorted(classes - self.classes)]
        if strangers:
            raise InputError(
                f"there are detections of {strangers[0]}, which metrics.json beside it does not have. Are they of two evaluations? Give "
                "results of other images or classes a folder of their own."
            )


def compare(
    annotations: Path,
    paths: Sequence[Path],
    names: Sequence[str] | None = None,
    max_detections: int = 100,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[COCO, list[Compared]]:
    """Evaluate results on the images and classes of the annotations that all detectors were run on.

    On which images and classes one was run metrics.json beside its results says. Without it, on all.

    Args:
        annotations: an instances json.
        paths: files of COCO's results. The others are compared with the first.
        names: one per file; None: what tells their paths apart.
        max_detections: the detections with the highest scores, per image and class, that are evaluated.
        confidence: level of the intervals.
        resamples: of the bootstrap over images.

    Returns:
        The annotations of the evaluated images and classes, and one `Compared` per file.

    Raises:
        MissingFileError: a file is missing.
        InputError: a file or an argument is not valid; the message names it.
    """
    names = _check_names(names, paths)
    instances = read_instances(annotations)
    plausibility.report(plausibility.judge_instances(instances), annotations)
    coco = as_coco(instances)
    annotated = set(coco.imgs)
    if len(annotated) < 2:
        raise InputError(f"{annotations} has {len(annotated)} images; intervals over images need at least 2.")
    metrics = {name: read_metrics(path) for name, path in zip(names, paths, strict=True)}
    run_on = {name: _RunOn.of(metrics[name], coco) for name in names}
    image_ids = sorted(set.intersection(*(one.images for one in run_on.values())))
    classes = set.intersection(*(one.classes for one in run_on.values()))
    each = ", ".join(f"{path}: {run_on[name].describe(coco) or 'all'}" for name, path in zip(names, paths, strict=True))
    if len(image_ids) < 2:
        raise InputError(
            f"{annotations} and the results have too few images in common: {len(image_ids)} by metrics.json beside them, of at least "
            f"2 for intervals over images ({each}). Give the annotations and results of the same images."
        )
    if coco.cats and not classes:
        raise InputError(
            f"{annotations} and the results have no class in common by metrics.json beside them ({each}). Give the annotations and "
            "results of the same classes."
        )
    evaluated = coco
    if len(image_ids) < len(annotated) or len(classes) < len(coco.cats):
        evaluated = as_coco(choose_classes(restrict(instances, image_ids), [coco.cats[one]["name"] for one in classes]))
    results, matched, errors = {}, {}, {}
    for name, path in zip(names, paths, strict=True):
        results[name] = read_results(path)
        try:
            check_results(coco, results[name])
            _check_pictures(Path(path), coco)
            run_on[name].check(results[name], coco)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        _judge_results(coco, results[name], path)
        results[name] = [one for one in results[name] if one["image_id"] in evaluated.imgs and one["category_id"] in evaluated.cats]
        coco_eval = match(evaluated, results[name], image_ids, max_detections, {"all": ALL_SIZES})
        matched[name], errors[name] = MatchedDetections.of(coco_eval), split_matched(coco_eval)

    if len(image_ids) > MOST_IMAGES_FOR_BCA:
        log.warning("The bootstrap over %d images can take minutes per file; fewer --resamples are faster.", len(image_ids))
    first, *others = names
    sums = {(name,): {name: 1.0} for name in names} | {(name, first): difference(name, first) for name in others}
    estimates = bootstrap_over_images(matched, sums, resamples, confidence)
    for name, path in zip(names, paths, strict=True):
        _judge_ap(metrics[name], estimates[(name,)]["AP"].value, path, evaluated, max_detections)
    compared = [
        Compared(
            name=name,
            path=str(path),
            detections=len(results[name]),
            images=len({result["image_id"] for result in results[name]}),
            ap=estimates[(name,)],
            minus_first=estimates.get((name, first)),
            errors=errors[name],
            run_on=run_on[name].describe(coco),
        )
        for name, path in zip(names, paths, strict=True)
    ]
    return evaluated, compared


def _judge_ap(metrics: Metrics | None, found: float, path: Path, coco: COCO, max_detections: int) -> None:
    """Warn where metrics.json beside the results has another AP of the same images and classes."""
    if metrics is None or metrics.protocol != dataclasses.replace(COCO_PROTOCOL, max_detections=max_detections):
        return
    classes = set(class_names(list(coco.cats.values())).values())
    if set(metrics.image_ids or ()) == set(coco.imgs) and metrics.per_class.keys() == classes and abs(metrics.stats["AP"] - found) > 0.1:
        log.warning(
            "%s has AP %.1f by these annotations, and %.1f by metrics.json beside it. Is it of another split, or were the annotations "
            "corrected?", path, found, metrics.stats["AP"],
        )  # fmt: skip


def _check_pictures(path: Path, coco: COCO) -> None:
    """Raise InputError where instances.json beside the results, which predict.py writes, gives an id to another picture."""
    beside = path.parent / "instances.json"
    pictures = read_json(beside, dict).get("images", []) if beside.is_file() else []
    for picture in pictures:
        own, name = PurePath(str(picture.get("file_name"))).name, PurePath(str(coco.imgs.get(picture.get("id"), picture)["file_name"])).name
        if own != name:
            raise InputError(
                f"image {picture['id']} is {own} by instances.json beside it, and {name} by the annotations. predict.py numbers pictures "
                "itself. For these annotations take `python eval.py ckpt=...`, or give the results their ids"
            )


def format_comparison(coco: COCO, compared: Sequence[Compared], max_detections: int, confidence: float, resamples: int) -> str:
    """Format the tables, up to 100 columns wide."""
    objects = sum(not annotation["iscrowd"] for annotation in coco.anns.values())
    method = bootstrap_method(len(coco.imgs))
    parts = [
        f"{len(coco.imgs)} images, {objects} objects, {len(coco.cats)} classes; at most {max_detections} detections per image and class.\n"
        f"In brackets: {100 * confidence:g} % intervals of a {method} bootstrap over images, {resamples} resamples."
    ]
    limiting = [f"{one.path} is of {one.run_on}, as metrics.json beside it says." for one in compared if one.run_on]
    if limiting:
        on = f"Evaluated are the {len(coco.imgs)} images and {len(coco.cats)} classes that all detectors were run on."
        parts.append("\n".join([*limiting, on]))
    rows = [[one.name, f"{one.detections}", f"{one.images}", *(one.ap[metric].text() for metric in METRICS)] for one in compared]
    parts.append(_table(["", "detections", "images", *METRICS], rows))
    if len(compared) > 1:
        differences = [[one.name, *(_signed(one.minus_first[metric]) for metric in METRICS)] for one in compared[1:]]
        parts.append(_table([f"minus {compared[0].name}", *METRICS], differences) + "\n* The interval excludes 0.")
    counts = [[one.name, *(f"{one.errors.counts[error]}" for error in ERROR_TYPES)] for one in compared]
    parts.append("Errors at IoU 0.5 (TIDE)\n" + _table(["", *ERROR_TYPES], counts))
    gains = [[one.name, *(_number(one.errors.gains[error]) for error in ERROR_TYPES)] for one in compared]
    parts.append("AP50 gained by fixing them\n" + _table(["", *ERROR_TYPES], gains))
    parts += [
        f"{one.path} has detections in {one.images} of {len(coco.imgs)} images, and all objects of the others are missed. "
        "If the detector was run on fewer images, give --annotations of those images."
        for one in compared
        if 2 * one.images < len(coco.imgs)
    ]
    return "\n\n".join(parts)


def to_json(coco: COCO, compared: Sequence[Compared], settings: Mapping[str, Any]) -> bytes:
    """Return all numbers as a json; those that are not defined are null."""
    content = {**settings, "images": len(coco.imgs), "results": [dataclasses.asdict(one) for one in compared]}
    for one in content["results"]:
        for estimate in [*one["ap"].values(), *(one["minus_first"] or {}).values()]:
            del estimate["n"], estimate["p_value"]  # the images, and not computed
    return json.dumps(_without_nan(content), indent=1).encode()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__.split("\n")[0], epilog="The page docs/compare.md explains the tables."
    )
    parser.add_argument("results", nargs="+", type=Path, help="detections in COCO's format; the others are compared with the first")
    parser.add_argument("--annotations", required=True, type=Path, help="instances json of the images to evaluate")
    parser.add_argument("--names", nargs="+", help="one per file of results (default: what tells the paths apart)")
    parser.add_argument("--max-detections", type=int, default=100, help="per image and class (%(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="level of the intervals (%(default)s)")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap over images (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parsed = parser.parse_args(arguments)
    if parsed.max_detections < 1:
        parser.error(f"--max-detections {parsed.max_detections}: expected at least 1")
    if not 0 < parsed.confidence < 1:
        parser.error(f"--confidence {parsed.confidence:g}: expected a number between 0 and 1, such as 0.95")
    if parsed.resamples < 2:
        parser.error(f"--resamples {parsed.resamples}: expected at least 2")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the files on the command line and print the tables."""
    parsed = parse_arguments(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    settings = {"max_detections": parsed.max_detections, "confidence": parsed.confidence, "resamples": parsed.resamples}
    with handle_errors("compare.py"):
        coco, compared = compare(parsed.annotations, parsed.results, parsed.names, **settings)
        print(format_comparison(coco, compared, **settings))
        if parsed.json:
            atomic_write(parsed.json, to_json(coco, compared, {"annotations": str(parsed.annotations), **settings}))


def _check_names(names: Sequence[str] | None, paths: Sequence[Path]) -> list[str]:
    """Return the names of the results, one per file, all different."""
    if names is None:
        names = [f"…{name[1 - NAME_WIDTH :]}" if len(name) > NAME_WIDTH else name for name in _tell_apart(paths)]
    if len(names) != len(paths):
        raise InputError(f"--names has {len(names)} names for {len(paths)} files of results; give one per file.")
    for name in names:
        if len(name) > NAME_WIDTH:
            raise InputError(f"--names: {name!r} has {len(name)} characters; the tables have room for {NAME_WIDTH}.")
        if names.count(name) > 1:
            raise InputError(f"two files of results have the name {name!r}; give each its own with --names.")
    return list(names)


def _judge_results(coco: COCO, results: Sequence[Mapping], path: Path) -> None:
    """Warn of boxes that are implausible as [x, y, width, height] in pixels of their images."""
    images = [coco.imgs[result["image_id"]] for result in results]
    boxes = np.array([result["bbox"] for result in results], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([(image["width"], image["height"]) for image in images]).reshape(-1, 2)

    def describe(number: int) -> str:
        return f"result {number} of image {images[number]['id']} ({images[number]['file_name']}), bbox {results[number]['bbox']}"

    plausibility.report(plausibility.judge_detections(boxes, sizes, describe), path)


def _tell_apart(paths: Sequence[Path]) -> list[str]:
    """Return the ends of the paths from where they differ, without a file name `results` that all have."""
    parts = [path.resolve().with_suffix("").parts for path in paths]
    if all(one[-1] == "results" for one in parts):
        parts = [one[:-1] for one in parts]
    shortest = min(map(len, parts))
    same = next((i for i in range(shortest) if len({one[i] for one in parts}) > 1), shortest)
    return ["/".join(one[min(same, shortest - 1) :]) for one in parts]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align the first column left and the others right."""
    lines = [heads, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def _signed(estimate: Estimate) -> str:
    return f"{estimate.text(signed=True)} {'*' if estimate.excludes_zero else ' '}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _without_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


if __name__ == "__main__":
    main()
