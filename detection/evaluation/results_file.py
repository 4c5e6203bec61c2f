"""Read detections of any detector from a file of COCO's results."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roi_quantization.detection.common.errors import InputError, MissingFileError
from roi_quantization.detection.data.garbage_collection import without_garbage_collection
from roi_quantization.detection.evaluation.coco import Metrics

_OF_THIS_PROJECT = re.compile(rb'\s*{\s*"stats"\s*:')  # how `write_metrics` begins


def read_results(path: Path | str) -> list[dict]:
    """Read and check COCO's results: a list of `image_id`, `category_id`, `bbox` [x, y, w, h] and `score`.

    Raises:
        MissingFileError: the file is missing.
        InputError: it is no such list; the message names the file and the first wrong entry.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} is not there. Name a file of COCO's results, such as results.json of a run folder.")
    try:
        with without_garbage_collection():
            results = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a json file, or is truncated: {error}") from error
    if not isinstance(results, list):
        keys = f" with {', '.join(list(results)[:5])}" if isinstance(results, dict) else ""
        raise InputError(f"{path} holds a {type(results).__name__}{keys}; COCO's results are a list of detections.")
    for number, result in enumerate(results):
        wrong = _find_fault(result)
        if wrong:
            raise InputError(f"{path}: result {number} {wrong}. Each needs image_id, category_id, bbox [x, y, w, h] and score.")
    return results


def read_metrics(path: Path | str) -> Metrics | None:
    """Read metrics.json beside a file of results, which says on which images and classes the detector was run.

    Returns:
        None where there is no such file, or where it is another program's, such as detectron2's of the same name.

    Raises:
        InputError: it begins as `write_metrics` does, and ends too early or is damaged.
    """
    path = Path(path).parent / "metrics.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Metrics.from_json(json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) and _OF_THIS_PROJECT.match(content):
            raise InputError(f"{path} is cut off or damaged: {error}. Evaluate the run again, or remove this file.") from error
        return None


def _find_fault(result: Any) -> str | None:
    if not isinstance(result, Mapping):
        return f"is a {type(result).__name__}"
    for key in ("image_id", "category_id", "bbox", "score"):
        if key not in result:
            return f"has no {key}"
    for key in ("image_id", "category_id"):
        if type(result[key]) is not int:
            return f"has {key} {result[key]!r:.80}; expected an integer"
    score = result["score"]
    for key in ("bbox", "proposal"):
        box = result.get(key)
        if (key == "bbox" or key in result) and not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            return f"has {key} {box!r:.80}; expected four numbers"
    return None if _is_number(score) else f"has score {score!r:.80}; expected a number"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
