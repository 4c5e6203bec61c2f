"""The numbers of a sweep's report, computed once: metrics, differences, costs, localisation, sizes, misalignment."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import hydra.utils
import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from roi_quantization.detection.alignment.misalignment import Operator, is_supported, lattice_rule, reduction, summarize
from roi_quantization.detection.common.config_security import check_targets_allowed
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.renamed_targets import rename_targets
from roi_quantization.detection.evaluation.bootstrap import MASK_METRICS, MatchedDetections, bootstrap_over_images
from roi_quantization.detection.evaluation.coco import evaluate
from roi_quantization.detection.evaluation.localisation import Localisation, localisation
from roi_quantization.detection.evaluation.matching import match, percent
from roi_quantization.detection.evaluation.protocol import ALL_SIZES, SEGM
from roi_quantization.detection.evaluation.sizes import average_precision_by_cells
from roi_quantization.detection.evaluation.statistics import Combination, Estimate, TwoByTwo, difference, estimate_over_seeds, holm
from roi_quantization.detection.report.predicted_cost import is_exact, predicted_results
from roi_quantization.detection.report.sweep import Run, Sweep

log = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75")
METRIC = "AP"  # the one of the headline and the figures, chosen before any result


@dataclass(frozen=True)
class RunFindings:
    """Numbers computed from one run's detections."""

    localisation: Localisation
    by_threshold: np.ndarray  # [10] AP in percent at IoU 0.5, 0.55 ... 0.95
    by_cells: dict[str, dict[str, float]]


class Findings:
    """Numbers of a sweep by arm. Intervals are over seeds, or over images where there is one seed (`varies_over`).

    Args:
        sweep: its finished runs.
        reference: the arm that others are compared with. Where it has no finished run, and for None, the first arm that has one.

    Raises:
        ValueError: no run is finished.
    """

    def __init__(self, sweep: Sweep, reference: str | None = "align"):
        if not sweep.finished:
            why = f"; {len(sweep.failed)} failed, see {sweep.failed[0].folder / 'failed.txt'}" if sweep.failed else ""
            raise InputError(f"{sweep.folder} has no finished run to report on{why}")
        self.sweep = sweep
        self.protocol = sweep.protocol
        self.metrics = (*METRICS, *(f"{SEGM}{metric}" for metric in MASK_METRICS)) if sweep.has_masks else METRICS
        self.values = {metric: sweep.values(metric) for metric in (*self.metrics, *(f"AP_{name}" for name in self.protocol.sizes))}
        self.arms = tuple(self.values["AP"])
        self.reference = reference if reference in self.arms else self.arms[0]
        self.seeds = sorted({run.seed for run in sweep.finished})
        self.varies_over = "seeds" if len(self.seeds) > 1 else "images"
        self.run_findings = {run.folder: self._analyse(run) for run in tqdm(sweep.finished, desc="reading runs", unit="run", leave=False)}

    def runs(self, arm: str) -> list[Run]:
        return [run for run in self.sweep.finished if run.arm == arm]

    @cached_property
    def other_arms(self) -> tuple[str, ...]:
        return tuple(arm for arm in self.arms if arm != self.reference)

    @cached_property
    def means(self) -> dict[str, dict[str, Estimate]]:
        """Metric -> arm -> estimate."""
        return self._estimates({arm: {arm: 1} for arm in self.arms})

    @cached_property
    def differences(self) -> dict[str, dict[str, Estimate]]:
        """Metric -> arm -> estimate of the arm minus the reference. Arms without a common seed are left out."""
        return self._estimates({arm: difference(arm, self.reference) for arm in self.other_arms if self._paired_seeds(arm)})

    @cached_property
    def corrected_p_values(self) -> dict[str, dict[str, float]]:
        """Metric -> arm -> p-value of `differences`, corrected by Holm's method for the number of arms."""
        return {metric: holm({arm: change.p_value for arm, change in self.differences[metric].items()}) for metric in METRICS}

    @cached_property
    def is_controlled(self) -> bool:
        """Whether the runs differ in nothing but operator and seed."""
        sweep = self.sweep
        return not (sweep.differing_settings or sweep.differing_geometry or sweep.differing_seeds or sweep.changed_data)

    @cached_property
    def differences_over_images(self) -> dict[str, dict[str, Estimate]]:
        """As `differences`, with intervals over images."""
        found = {}
        for arm in tqdm(self.differences["AP"], desc="resampling images", unit="operator", leave=False):
            seeds = self._paired_seeds(arm)
            pair = {name: [self._matched[run.folder] for run in self.runs(name) if run.seed in seeds] for name in (arm, self.reference)}
            found |= bootstrap_over_images(pair, {arm: difference(arm, self.reference)})
        return {metric: {arm: of_arm[metric] for arm, of_arm in found.items()} for metric in METRICS}

    def _paired_seeds(self, arm: str) -> set[int]:
        """Return the seeds that the arm has in common with the reference."""
        return {run.seed for run in self.runs(arm)} & {run.seed for run in self.runs(self.reference)}

    @cached_property
    def costs(self) -> dict[str, dict[str, Estimate]]:
        """Metric -> projection, bins, both, interaction -> estimate. Empty where the four arms have no common seed."""
        return self._estimates(TwoByTwo().costs(), self._seeds_of_costs) if self._seeds_of_costs else {}

    @cached_property
    def means_of_costs(self) -> dict[str, dict[str, Estimate]]:
        """Metric -> each of the four arms -> estimate, of the seeds that `costs` is of."""
        return self._estimates({arm: {arm: 1} for arm in TwoByTwo().arms}, self._seeds_of_costs) if self._seeds_of_costs else {}

    @property
    def seeds_of_costs(self) -> str:
        """Say of which seeds `costs` is, where they are not all: `, of the 2 seeds of 3 that all four operators have`. Else empty."""
        seeds = len(self._seeds_of_costs)
        if self.varies_over == "images" or seeds == len(self.seeds):
            return ""
        return f", of the {'one seed' if seeds == 1 else f'{seeds} seeds'} of {len(self.seeds)} that all four operators have"

    @cached_property
    def _seeds_of_costs(self) -> set[int]:
        return set.intersection(*({run.seed for run in self.runs(arm)} for arm in TwoByTwo().arms))

    def _estimates(self, combinations: Mapping[str, Combination], seeds: set[int] | None = None) -> dict[str, dict[str, Estimate]]:
        if not combinations:
            return {metric: {} for metric in self.metrics}
        if self.varies_over == "images":
            matched = {arm: [self._matched[run.folder] for run in self.runs(arm)] for arm in self.arms}
            found = bootstrap_over_images(matched, combinations)
            estimates = {metric: {name: found[name][metric] for name in combinations} for metric in METRICS}
            if self.sweep.has_masks:
                matched = {arm: [self._matched_masks[run.folder] for run in self.runs(arm)] for arm in self.arms}
                found = bootstrap_over_images(matched, combinations)
                estimates |= {f"{SEGM}{metric}": {name: found[name][metric] for name in combinations} for metric in MASK_METRICS}
            return estimates
        values = {
            metric: {arm: {seed: v for seed, v in of_arm.items() if seeds is None or seed in seeds} for arm, of_arm in by_arm.items()}
            for metric, by_arm in self.values.items()
        }
        return {metric: {name: estimate_over_seeds(values[metric], sums) for name, sums in combinations.items()} for metric in self.metrics}

    @cached_property
    def _matched(self) -> dict[Path, MatchedDetections]:
        return self._match(masks=False)

    @cached_property
    def _matched_masks(self) -> dict[Path, MatchedDetections]:
        return self._match(masks=True)

    def _match(self, masks: bool) -> dict[Path, MatchedDetections]:
        truth, limit, matched = self.sweep.annotations, self.protocol.max_detections, {}
        for run in self.sweep.finished:
            try:
                matched[run.folder] = MatchedDetections(truth, run.results(), self.image_ids, limit, self.protocol, masks)
            except InputError as error:
                raise InputError(f"{run.folder / 'results.json'}: {error}") from error
        return matched

    @cached_property
    def image_ids(self) -> list[int]:
        return sorted(self.sweep.annotations.imgs)

    def _analyse(self, run: Run) -> RunFindings:
        results, truth, image_ids = run.results(), self.sweep.annotations, self.image_ids
        try:
            thresholds = match(truth, results, image_ids, self.protocol.max_detections, areas={"all": ALL_SIZES})
            located = localisation(truth, results, image_ids, self.protocol.max_detections)
        except InputError as error:
            raise InputError(f"{run.folder / 'results.json'}: {error}") from error
        thresholds.accumulate()
        by_threshold = np.array([percent(precision) for precision in thresholds.eval["precision"][..., 0, -1]])
        _check_metrics(
            run,
            {"AP50": by_threshold[0], "AP75": by_threshold[5]} | ({"AP": by_threshold.mean()} if self.protocol.has_coco_thresholds else {}),
        )
        return RunFindings(
            localisation=located,
            by_threshold=by_threshold,
            by_cells={}
            if self.stride is None or self.sweep.unknown_geometry
            else average_precision_by_cells(
                truth,
                results,
                self.image_ids,
                self.stride,
                self.sweep.scales(run),
                max_detections=self.protocol.max_detections,
                protocol=self.protocol,
            ),
        )

    @cached_property
    def stride(self) -> int | None:
        """Pixels of the network's input per cell. None where it is not known or the runs differ in it, and of a detector with a pyramid."""
        return None if "backbone.stride" in self.sweep.differing_geometry else self.sweep.finished[0].stride

    @property
    def has_same_cells(self) -> bool:
        """Whether it is known which cells belong to a box, and they are the same in all runs."""
        return self.stride is not None and not self.sweep.differing_geometry and not self.sweep.unknown_geometry

    @property
    def has_given_proposals(self) -> bool:
        """Whether all arms sample the same proposals. A network's own differ as soon as its weights do."""
        return all(run.config.get("proposals") is not None for run in self.sweep.finished)

    @cached_property
    def curves(self) -> dict[str, np.ndarray]:
        """Arm -> `[10]`, AP at the IoU thresholds, mean over seeds."""
        return {arm: np.mean([self.run_findings[run.folder].by_threshold for run in self.runs(arm)], axis=0) for arm in self.arms}

    @cached_property
    def by_cells(self) -> dict[str, dict[str, float]]:
        """Arm -> size in cells -> AP, mean over seeds."""
        sizes = next(iter(self.run_findings.values())).by_cells
        return {
            arm: {s: float(np.mean([self.run_findings[run.folder].by_cells[s]["AP"] for run in self.runs(arm)])) for s in sizes}
            for arm in self.arms
        }

    @cached_property
    def by_pixels(self) -> dict[str, dict[str, float]]:
        """Arm -> size in pixels -> AP, mean over seeds."""
        return {
            arm: {words: float(np.mean(list(self.values[f"AP_{name}"][arm].values()))) for name, words in self.protocol.sizes.items()}
            for arm in self.arms
        }

    def localisations(self, arm: str) -> list[Localisation]:
        """Return the localisation errors, one for each seed."""
        return [self.run_findings[run.folder].localisation for run in self.runs(arm)]

    @cached_property
    def cross(self) -> dict[str, dict[str, dict[str, float]]]:
        """Metric -> arm of training -> operator of testing -> mean over seeds. Empty without cross-evaluation."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for metric in METRICS:
            for arm in self.arms:
                several = [
                    {other: m.stats[metric] for other, m in run.cross().items()} | {arm: run.metrics.stats[metric]}
                    for run in self.runs(arm)
                ]
                common = set.intersection(*map(set, several))
                if common - {arm}:
                    found.setdefault(metric, {})[arm] = {other: float(np.mean([s[other] for s in several])) for other in common}
        return found

    @cached_property
    def misalignment(self) -> dict[str, dict[str, float]]:
        """Arm -> mean misalignment over the RoIs of the reference's detections. Arms without an entry in `operators` are left out.

        Empty where the runs differ in `GEOMETRY`, or it is not known.
        """
        if not self.has_same_cells:
            return {}
        proposals, scales = {}, self.sweep.scales(self.sweep.finished[0])
        for found in self.localisations(self.reference):
            if found.proposal is None:
                return {}
            for image_id, box in zip(found.image_id.tolist(), found.proposal, strict=True):
                proposals.setdefault(image_id, []).append(box * (scales[image_id] if scales else 1))
        boxes = []
        for image_id, some in proposals.items():
            image, scale = self.sweep.annotations.imgs[image_id], scales[image_id] if scales else 1
            boxes.append((torch.from_numpy(np.array(some)).float(), (round(image["height"] * scale), round(image["width"] * scale))))
        if not boxes:
            return {}
        size = self.sweep.finished[0].config.head.extractor.output_size
        return {row["operator"]: row for row in summarize(self.operators, boxes, [self.stride], size) if row["size"] == "all"}

    @cached_property
    def predicted(self) -> dict[str, dict[str, float]]:
        """Arm -> metric -> difference to the reference predicted from the reference's own runs, see `predicted_cost`.

        Empty where the reference does not sample its RoIs exactly, its results have no proposals, or the runs differ in
        `GEOMETRY`, or it is not known. Arms without an entry in `operators` are left out.
        """
        if not self.has_same_cells:
            return {}
        runs = self.runs(self.reference)
        results = {run.folder: run.results() for run in runs}
        if not all(of_run and all("proposal" in one for one in of_run) for of_run in results.values()):
            return {}
        size, scales = self.sweep.finished[0].config.head.extractor.output_size, self.sweep.scales(self.sweep.finished[0])
        operator = self.operators.get(self.reference)
        if not (operator and is_exact(operator, size)):
            return {}
        evaluation = partial(evaluate, self.sweep.annotations, max_detections=self.protocol.max_detections, protocol=self.protocol)
        own = {run.folder: evaluation(results=results[run.folder], image_ids=self.image_ids).stats for run in runs}
        if any(math.isnan(stats[METRIC]) for stats in own.values()):  # no objects
            return {}
        found: dict[str, dict[str, float]] = {}
        for arm in tqdm(self.differences[METRIC], desc="predicting", unit="operator", leave=False):
            if arm not in self.operators:
                continue
            changes = []
            for run in (run for run in runs if run.seed in self._paired_seeds(arm)):  # as what was measured
                moved = predicted_results(results[run.folder], self.operators[arm], self.stride, scales, size)
                stats = evaluation(results=moved, image_ids=self.image_ids).stats
                changes.append([stats[metric] - own[run.folder][metric] for metric in METRICS])
            found[arm] = dict(zip(METRICS, np.mean(changes, axis=0).tolist(), strict=True))
        return found

    @cached_property
    def operators(self) -> dict[str, Operator]:
        """Arm -> operator. Operators of other projects are left out. Those that no configuration names are not even called."""
        found = {}
        for arm in self.arms:
            run = self.runs(arm)[0]
            roi = OmegaConf.to_container(run.config.roi)
            try:
                check_targets_allowed({"roi": roi}, run.folder / "config.yaml")
            except InputError as error:
                log.warning("%s. The report shows the scores of %s without its geometry.", error, arm)
                continue
            operator = hydra.utils.instantiate(rename_targets(roi))
            if is_supported(operator):
                found[arm] = operator
        return found

    def describe_operator(self, arm: str) -> tuple[str, str, str]:
        """Describe an arm's treatment of the RoI, of its bins, and its reduction. Of another project's operator return the name."""
        operator = self.operators.get(arm)
        return describe_operator(operator) if operator else (self.runs(arm)[0].config.roi._target_, "-", "-")


def _check_metrics(run: Run, recomputed: Mapping[str, float]) -> None:
    """Compare metrics of a run with those that its detections have with the annotations of today.

    Raises:
        InputError: they differ.
    """
    if metric := run.metrics.first_difference(recomputed):
        raise InputError(
            f"{run.folder}: {metric} was {run.metrics.stats[metric]:.6g} in metrics.json, and results.json has {recomputed[metric]:.6g} "
            f"with the annotations of {run.config.data.root}. They were changed since the run, or one of the files was: restore them, or "
            "repeat the run."
        )


def describe_operator(operator: Operator) -> tuple[str, str, str]:
    """Describe an operator's treatment of the RoI, of its bins, and its reduction."""
    rule, given = lattice_rule(operator), operator.keywords if isinstance(operator, partial) else {}
    half = "" if (given.get("half_pixel", False) if rule is None else rule.half_pixel) else ", half a pixel off"
    if rule is None:
        return f"exact{half}", "exact", "integral"
    rounding = {"none": "exact", "round": "rounded", "floor": "floored"}[rule.quantize_roi] + (", + 1" if rule.inclusive_end else "")
    reduce = reduction(operator)
    if rule.quantize_bins != "none":
        return rounding, {"cover": "whole cells", "truncate": "whole cells, rest lost"}[rule.quantize_bins], reduce
    samples = "adaptive" if rule.sampling_ratio <= 0 else f"{rule.sampling_ratio} x {rule.sampling_ratio}"
    return f"{rounding}{half}", f"exact, {samples} samples", reduce
