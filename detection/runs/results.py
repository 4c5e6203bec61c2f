"""The files and the table at the end of a run."""

import csv
import json
import logging
import math
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.evaluation.bootstrap import (
    MASK_METRICS,
    METRICS,
    MatchedDetections,
    bootstrap_over_images,
)
from roi_quantization.detection.evaluation.coco import Metrics, format_table, write_metrics, write_results
from roi_quantization.detection.evaluation.figures import plot_curves, plot_detection_sheet
from roi_quantization.detection.evaluation.protocol import SEGM
from roi_quantization.detection.evaluation.statistics import Estimate, difference
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.runs.errors import log_traceback
from roi_quantization.detection.runs.training_checkpoints import FINISHED

log = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """Metrics of an evaluation, and the detections in COCO's results format."""

    metrics: Metrics
    results: list[dict]


def draw_curves(run_dir: Path, log_every_n_steps: int) -> None:
    """Draw curves.png from metrics.csv, where losses were logged."""
    path = run_dir / "metrics.csv"
    if not path.is_file():
        log.warning("No curves.png: there is no metrics.csv, which logger=csv writes")
    elif not _has_losses(path):
        log.warning("No curves.png: no loss was logged, since the run is shorter than trainer.log_every_n_steps=%d", log_every_n_steps)
    else:
        with optional_figure(run_dir / "curves.png"):
            plot_curves(path, run_dir / "curves.png")


def _has_losses(path: Path) -> bool:
    with open(path, newline="") as file:
        return any(row.get("train/loss") for row in csv.DictReader(file))


@contextmanager
def optional_figure(path: Path) -> Iterator[None]:
    """Warn where a figure cannot be drawn: the results of a run do not depend on it."""
    try:
        yield
    except Exception as error:
        log_traceback(error)
        log.warning("No %s: %s: %s. The results are complete without it", path.name, type(error).__name__, error)


def write_cross(run_dir: Path, cross: dict[str, Metrics]) -> None:
    """Write cross.json: operator -> metrics of the run's weights with it."""
    atomic_write(run_dir / "cross.json", json.dumps({name: metrics.as_json() for name, metrics in cross.items()}, indent=2).encode())


def report_cross(cross: Mapping[str, Evaluation], run_dir: Path) -> None:
    """Write cross.json and print it, where weights were evaluated with other operators than their own."""
    if not cross:
        return
    write_cross(run_dir, {name: evaluation.metrics for name, evaluation in cross.items()})
    print("\nThe same weights with other operators:")
    for name, (metrics, _) in cross.items():
        for keys in names_in_lines(metrics.stats):
            print(f"  {name:20}" + "  ".join(f"{metrics.protocol.metric(key)} {metrics.stats[key]:5.1f}" for key in keys))


def names_in_lines(known: Container[str]) -> list[list[str]]:
    """Return the metrics to print on a line each: those of boxes, and of masks where they are `known`."""
    of_masks = [f"{SEGM}{name}" for name in MASK_METRICS]
    return [list(METRICS), of_masks] if of_masks[0] in known else [list(METRICS)]


def report_differences(cross: Mapping[str, Evaluation], dataset: Any, module: DetectionModule, own: str, run_dir: Path) -> None:
    """Print and write how AP changes with each operator of a cross-evaluation, with intervals over images.

    Writes results_<operator>.json, and differences.json: operator -> AP, AP50 and AP75, and `segm_AP` and so on of masks, minus
    those of `own`, the module's operator.
    """
    others = {name: evaluation for name, evaluation in cross.items() if evaluation.results is not module.results}
    if not others:
        return
    for name, evaluation in others.items():
        write_results(run_dir / f"results_{name}.json", evaluation.results)
    image_ids = module.metrics.image_ids
    if len(image_ids) < 2:
        log.warning("No intervals: there is one image, and intervals over images need at least two")
        return
    estimates = _differences(
        {own: module.results} | {name: evaluation.results for name, evaluation in others.items()}, own, dataset, module
    )
    ends = ("value", "low", "high")
    plain = {
        name: {metric: {end: None if math.isnan(x := getattr(one, end)) else x for end in ends} for metric, one in of_name.items()}
        for name, of_name in estimates.items()
    }
    protocol = module.metrics.protocol.as_json()
    atomic_write(run_dir / "differences.json", json.dumps({"minus": own, "differences": plain} | protocol, indent=2).encode())
    metric_name = module.metrics.protocol.metric
    print(f"\nMinus {own}, with 95 % intervals of a paired bootstrap over {len(image_ids)} images:")
    for name, of_name in estimates.items():
        for metrics in names_in_lines(of_name):
            print(f"  {name:20}" + "  ".join(f"{metric_name(metric)} {of_name[metric].text(signed=True)}" for metric in metrics))


def _differences(results: Mapping[str, list[dict]], own: str, dataset: Any, module: DetectionModule) -> dict[str, dict[str, Estimate]]:
    """Return operator -> metric -> difference to `own`; of masks too where they were evaluated."""
    image_ids, protocol = module.metrics.image_ids, module.metrics.protocol
    sums = {name: difference(name, own) for name in results if name != own}
    estimates: dict[str, dict[str, Estimate]] = {name: {} for name in sums}
    for masks, prefix in ((False, ""), (True, SEGM))[: 1 + dataset.masks]:
        matched = {
            name: MatchedDetections(dataset.coco, found, image_ids, module.metrics.max_detections, protocol, masks)
            for name, found in results.items()
        }
        for name, of_name in bootstrap_over_images(matched, sums).items():
            estimates[name] |= {f"{prefix}{metric}": one for metric, one in of_name.items()}
    return estimates


def report(module: DetectionModule, dataset: Any, run_dir: Path, title: str) -> None:
    """Write results.json, metrics.json and detections.png of the module's last evaluation, and print the table.

    Raises:
        InputError: nothing was evaluated.
    """
    if module.metrics is None:
        raise InputError(f"{title}: nothing was evaluated, so there are no results. Is there a limit among the settings of trainer?")
    write_results(run_dir / "results.json", module.results)
    write_metrics(run_dir / FINISHED, module.metrics)
    print(f"\n{title}: {module.metrics.coverage}\n{format_table(module.metrics)}\n\nThe run folder: {run_dir}")
    with optional_figure(run_dir / "detections.png"):
        plot_detection_sheet(dataset, module.detections, run_dir / "detections.png")
