"""A sweep folder as train.py leaves it, from random numbers: arms whose boxes are off by a known number of pixels.

`python -m tests.detection.report.fake_sweep FOLDER` writes one to look at.
"""

import csv
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from pycocotools import mask as coco_mask

from roi_quantization.detection.data.annotations import as_coco
from roi_quantization.detection.evaluation.coco import Metrics, evaluate, write_metrics, write_results
from roi_quantization.detection.evaluation.protocol import COCO_PROTOCOL, Protocol
from tests.configuration import composed

SCATTER = {  # pixels by which an arm's edges are off, one standard deviation
    "align": 3.0,
    "pool": 7.5,
    "warp": 6.0,
    "align_max": 3.2,
    "warp_max": 6.2,
    "pool_bins": 4.6,
    "pool_exclusive": 7.0,
    "pool_floor": 9.0,
    "prroi": 3.1,
}
CROSS = ("pool", "warp", "align")


def write_fake_sweep(
    folder: Path,
    arms: Mapping[str, float] = SCATTER,
    seeds: Sequence[int] = (0, 1, 2),
    images: int = 100,
    failed: Collection[str] = (),
    missing: Collection[str] = (),
    overrides: Sequence[str] = (),
    evaluated: int | None = None,
    protocol: Protocol = COCO_PROTOCOL,
    masks: bool = False,
) -> Path:
    """Writes runs of all `arms` (name -> scatter) and `seeds` below `folder`; `failed` and `missing` name runs such as "pool_seed1".

    evaluated: the runs were stopped after so many images; None: they were evaluated on all.
    masks: of objects and detections, which fill their boxes, are evaluated too.
    """
    rng = np.random.default_rng(0)
    root = folder.parent / f"{folder.name}_data"
    truth = {split: _instances(rng, images if split == "test" else 4) for split in ("train", "val", "test")}
    for split, instances in truth.items():
        if masks:
            _fill(instances["annotations"])
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(instances))
    folder.mkdir(parents=True, exist_ok=True)
    params = {"roi": ",".join(arms), "seed": ",".join(map(str, seeds))}
    OmegaConf.save({"hydra": {"sweeper": {"params": params}, "overrides": {"task": ["experiment=quantization"]}}}, folder / "multirun.yaml")
    for arm, scatter in arms.items():
        for seed in seeds:
            name = f"{arm}_seed{seed}"
            if name in missing:
                continue
            run = folder / name
            run.mkdir(exist_ok=True)
            config = OmegaConf.merge(
                _configuration(arm, *overrides), {"seed": seed, "run_dir": str(run), "arm": arm, "data": {"root": str(root)}}
            )
            OmegaConf.save(config, run / "config.yaml", resolve=True)
            if name in failed:
                (run / "failed.txt").write_text("Traceback (most recent call last):\n  ...\nRuntimeError: no memory left\n")
                continue
            found = [one for one in _detect(truth["test"], scatter, seed) if one["image_id"] <= (evaluated or images)]
            if masks:
                _fill(found)
            write_results(run / "results.json", found)
            cross = {
                other: _metrics(truth["test"], _detect(truth["test"], scatter + 2 * (other != arm), seed), protocol).as_json()
                for other in CROSS
            }
            (run / "cross.json").write_text(json.dumps(cross))
            write_metrics(run / "metrics.json", _metrics(truth["test"], found, protocol, evaluated, masks))
    return folder


def _fill(entries: Sequence[dict]) -> None:
    """Give annotations or results the mask of their box."""
    for entry in entries:
        (entry["segmentation"],) = coco_mask.frPyObjects(np.array([entry["bbox"]]), 256, 256)
        entry["segmentation"]["counts"] = entry["segmentation"]["counts"].decode()


@cache
def _configuration(arm: str, *overrides: str) -> DictConfig:
    return composed("train", f"roi={arm}", "run_dir=none", *overrides)


def _instances(rng: np.random.Generator, images: int) -> dict:
    categories = [{"id": i, "name": name} for i, name in ((2, "disc"), (3, "ring"), (7, "square"))]
    annotations = []
    for image_id in range(1, images + 1):
        for _ in range(rng.integers(1, 4)):
            w, h = np.exp(rng.uniform(np.log(24), np.log(110), 2)).round(2).tolist()
            box = [round(rng.uniform(0, 256 - w), 2), round(rng.uniform(0, 256 - h), 2), w, h]
            annotations.append({"image_id": image_id, "category_id": int(rng.choice([2, 3, 7])), "bbox": box, "area": w * h, "iscrowd": 0})
    annotations = [{"id": i, **annotation} for i, annotation in enumerate(annotations, 1)]
    listed = [{"id": i, "file_name": f"{i}.png", "width": 256, "height": 256} for i in range(1, images + 1)]
    return {"images": listed, "categories": categories, "annotations": annotations}


def _detect(instances: dict, scatter: float, seed: int) -> list[dict]:
    rng = np.random.default_rng([seed, 1])  # the same draws for each arm: runs of a seed are paired
    skill = 1 + 0.1 * rng.normal()
    found = []
    for annotation in instances["annotations"]:
        (x, y, w, h), unit, miss = annotation["bbox"], rng.normal(size=(2, 4)), rng.uniform()
        edges = np.array([x, y, x + w, y + h])
        box, proposal = (np.clip(edges + size * unit[i], 0, 256) for i, size in enumerate((scatter * skill, 12.0)))
        score = float(np.clip(0.9 - 0.1 * abs(unit[0]).sum() / 4 + 0.05 * rng.normal(), 0.06, 1))
        category = annotation["category_id"] if miss > 0.08 else 2
        found.append(_result(annotation["image_id"], category, box, score, proposal))
        for _ in range(4):  # and some that are nowhere near
            corner = rng.uniform(0, 200, 2)
            far = np.concatenate([corner, corner + 40])
            found.append(_result(annotation["image_id"], int(rng.choice([2, 3, 7])), far, float(rng.uniform(0.05, 0.4)), far))
    return found


def _result(image_id: int, category_id: int, box: np.ndarray, score: float, proposal: np.ndarray) -> dict:
    def xywh(edges):
        return [*edges[:2].tolist(), *np.maximum(edges[2:] - edges[:2], 0.1).tolist()]

    return {"image_id": image_id, "category_id": category_id, "bbox": xywh(box), "score": round(score, 6), "proposal": xywh(proposal)}


def _metrics(instances: dict, results: list[dict], protocol: Protocol, evaluated: int | None = None, masks: bool = False) -> Metrics:
    image_ids = [image["id"] for image in instances["images"]]
    return evaluate(as_coco(instances), results, image_ids[:evaluated], of=len(image_ids), protocol=protocol, masks=masks)


def text(folder: Path, name: str) -> str:
    """Read a file of the report."""
    return (folder / "report" / name).read_text()


def table(folder: Path, name: str) -> dict[str, dict[str, str]]:
    """Read a table of the report: its rows by what their first column says."""
    with open(folder / "report" / "tables" / f"{name}.csv", newline="") as file:
        return {next(iter(row.values())): row for row in csv.DictReader(file)}


if __name__ == "__main__":
    write_fake_sweep(Path(sys.argv[1]), failed=["pool_floor_seed2"], missing=["prroi_seed1"])
