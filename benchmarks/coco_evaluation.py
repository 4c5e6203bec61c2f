"""How long does COCO's evaluation take? Plain pycocotools, ours, and ours with faster-coco-eval, on the same detections in one run.

    python benchmarks/coco_evaluation.py                          # 5,000 images, 36,000 objects of 80 classes, 500,000 detections: minutes
    python benchmarks/coco_evaluation.py --images 500             # a tenth of it
    python benchmarks/coco_evaluation.py --json coco_evaluation.json

The set is random, in the shape of val2017: objects log-normal in size and uneven over the classes, a hundredth of them crowd regions, a
hundredth of the images empty; and 100 detections an image, about half of them near an object. Each evaluation begins with the annotations
in memory and a list of results, and ends with the twelve numbers; plain pycocotools' loadRes is part of it, since ours has its like.
Evaluations follow one another, `--repeat` times in turn, and the shortest time of each counts.
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import product

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.evaluation.coco import evaluate
from roi_quantization.detection.evaluation.matching import Evaluator, SilentCOCOeval, faster_coco_eval

CLASSES, OBJECTS, DETECTIONS = 80, 7.2, 100  # per image
WIDTH, HEIGHT = 640, 480
Evaluation = Callable[[COCO, list[dict]], list[float]]


def like_coco(images: int, seed: int = 0) -> tuple[COCO, list[dict]]:
    """Annotations and results of `images` images, see above."""
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(CLASSES, 0.5))
    annotations, results = [], []
    for image_id in tqdm(range(1, images + 1), desc="drawing", leave=False):
        count = 0 if rng.random() < 0.01 else 1 + rng.poisson(OBJECTS - 1)
        classes, boxes = rng.choice(CLASSES, count, p=popularity), _boxes(rng, count)
        crowd = rng.random(count) < 0.01
        for category, box, is_crowd in zip(classes.tolist(), boxes.round(2).tolist(), crowd.tolist(), strict=True):
            area = 0.6 * box[2] * box[3]  # of the outline
            number = len(annotations) + 1
            annotations.append(
                {"id": number, "image_id": image_id, "category_id": category, "bbox": box, "area": area, "iscrowd": is_crowd}
            )
        near = rng.integers(count, size=DETECTIONS // 2 if count else 0)
        far = DETECTIONS - len(near)
        spread = rng.choice([0.02, 0.1, 0.4], len(near))[:, None] * np.tile(boxes[near, 2:], 2)
        found = np.concatenate([boxes[near] + rng.normal(size=(len(near), 4)) * spread, _boxes(rng, far)])
        found[:, 2:] = np.maximum(found[:, 2:], 1)
        labels = np.concatenate([classes[near], rng.choice(CLASSES, far, p=popularity)])
        scores = np.concatenate([rng.beta(2, 2, len(near)), rng.beta(1, 6, far)])
        for category, box, score in zip(labels.tolist(), found.round(3).tolist(), scores.round(3).tolist(), strict=True):  # ties, too
            results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    gt = COCO()
    gt.dataset = {
        "info": {},
        "images": [{"id": i, "width": WIDTH, "height": HEIGHT} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(CLASSES)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex()
    return gt, results


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """`[count, 4]`, x, y, width, height, inside the image; the median side is about 55 pixels, as COCO's."""
    size = np.minimum(np.exp(rng.normal(4, 1, (count, 2))) + 2, [WIDTH, HEIGHT])
    return np.concatenate([rng.random((count, 2)) * ([WIDTH, HEIGHT] - size), size], axis=1)


def plain(gt: COCO, results: list[dict]) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = COCOeval(gt, gt.loadRes(results), "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return [100 * number for number in coco_eval.stats]


def ours(gt: COCO, results: list[dict], coco_eval: Evaluator = SilentCOCOeval) -> list[float]:
    return list(evaluate(gt, results, list(gt.imgs), coco_eval=coco_eval).stats.values())


def measure(evaluation: Evaluation, gt: COCO, results: list[dict]) -> tuple[dict[str, float], list[float]]:
    """Seconds by the clock and of the processor, and the twelve numbers. Works on copies: pycocotools writes into what it is given."""
    gt, results = copy.deepcopy(gt), copy.deepcopy(results)
    gc.collect()
    clock, processor = time.perf_counter(), time.process_time()
    numbers = evaluation(gt, results)
    return {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}, numbers


def benchmark(images: int, repeat: int) -> dict:
    """All that is written as json: the machine, the set, the best time of each evaluation, and how far its numbers are from plain's."""
    evaluations = {"plain pycocotools": plain, "ours": ours, "ours, coco_eval=faster": partial(ours, coco_eval=faster_coco_eval())}
    gt, results = like_coco(images)
    times, apart, expected = {name: [] for name in evaluations}, {}, None
    for _, name in tqdm(list(product(range(repeat), evaluations)), desc="evaluating"):
        taken, numbers = measure(evaluations[name], gt, results)
        expected = numbers if expected is None else expected
        times[name].append(taken)
        apart[name] = float(np.abs(np.subtract(numbers, expected)).max())
    best = {name: {key: min(one[key] for one in all_of) for key in all_of[0]} for name, all_of in times.items()}
    rows = {name: best[name] | {"largest_difference": apart[name]} for name in evaluations}
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    packages = {name: version(name) for name in ("pycocotools", "faster-coco-eval", "numpy")}
    return {"machine": machine, **packages, "images": images, "objects": len(gt.anns), "detections": len(results), "rows": rows}


def table(found: dict) -> str:
    """`over plain` is of the processor's seconds, which other programs on the machine disturb less."""
    base = found["rows"]["plain pycocotools"]["processor_seconds"]
    lines = [f"{found['images']} images, {found['objects']} objects, {found['detections']} detections"]
    lines.append(f"{'':24}{'seconds':>10}{'of the processor':>18}{'over plain':>12}{'numbers apart by':>18}")
    for name, row in found["rows"].items():
        seconds, processor, apart = row["seconds"], row["processor_seconds"], row["largest_difference"]
        lines.append(f"{name:24}{seconds:10.1f}{processor:18.1f}{processor / base:12.2f}{apart:18.0e}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args(arguments)
    found = benchmark(options.images, options.repeat)
    print(table(found))
    if options.json:
        atomic_write(options.json, (json.dumps(found, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
