"""The report's sentences."""

import math

from roi_quantization.detection.evaluation.statistics import Estimate
from roi_quantization.detection.report.findings import METRIC, METRICS, Findings

NAMES = {"pool": "RoIPool", "warp": "RoIWarp", "align": "RoIAlign", "prroi": "PrRoIPool"}


def headline(findings: Findings) -> str:
    """State what RoIPool costs against the reference in AP, AP50 and AP75. Without RoIPool: the arm that differs most."""
    changes = findings.differences[METRIC]
    reference = paper_name(findings.reference)
    partial = f" Of {findings.sweep.partial}." if findings.sweep.partial else ""
    stride = f" at stride {findings.stride}" if findings.stride else ""
    if not findings.protocol.has_coco_thresholds:
        partial += f" AP is the mean over IoU {findings.protocol.thresholds_in_words}."
    if not changes:
        value = findings.means[METRIC][findings.reference].text()
        why = "No other operator has a seed in common with it" if findings.other_arms else "There is no other operator to compare it with"
        return f"{reference} reaches {value} {METRIC}{stride}. {why}.{partial}"
    arm = "pool" if "pool" in changes else max(changes, key=lambda a: abs(changes[a].value))
    change = changes[arm]
    of_arm, of_reference = findings.values[METRIC][arm], findings.values[METRIC][findings.reference]
    paired = of_arm.keys() & of_reference.keys()  # in an unfinished sweep each has seeds that the other has not
    ours, theirs = (sum(values[seed] for seed in paired) / len(paired) for values in (of_arm, of_reference))
    sentence = (
        f"{paper_name(arm)} in the place of {reference} {_verdict(change)} points of {METRIC}{stride}: "
        f"{ours:.1f} against {theirs:.1f} {evidence(findings, arm, chosen_of=1 if arm == 'pool' else len(changes))}."
    )
    others = " and ".join(
        f"{_verdict(of_metric)} {metric} {_bracket(of_metric)}".rstrip() + " (not shown)" * _may_be_zero(of_metric)
        for metric in METRICS
        if metric != METRIC and (of_metric := findings.differences[metric].get(arm)) is not None
    )
    unclear = f" The interval of {METRIC} holds 0." if _may_be_zero(change) else ""
    return f"{sentence}{unclear} It {others}.{partial}"


def _verdict(change: Estimate) -> str:
    return f"{'costs' if change.value < 0 else 'gains'} {abs(change.value):.1f}"


def _may_be_zero(change: Estimate) -> bool:
    return change.has_interval and not change.excludes_zero


def _ends(change: Estimate) -> tuple[float, float]:
    """Return the interval of what `_verdict` says: of a cost it is positive where something is lost."""
    low, high = sorted((-change.low, -change.high) if change.value < 0 else (change.low, change.high))
    return low, high


def _bracket(change: Estimate) -> str:
    return "[{:.1f}, {:.1f}]".format(*_ends(change)) if change.has_interval else ""


def cost_breakdown(findings: Findings) -> str:
    """State the costs of the two quantizations separately. Empty where the 2 x 2 is incomplete."""
    if not findings.costs:
        return ""
    costs = findings.costs[METRIC]
    projection, bins, both = (costs[key].text() for key in ("projection", "bins", "both"))
    brackets = " (95 % intervals in brackets)" if costs["both"].has_interval else ""
    start = "With all else equal, rounding" if findings.is_controlled else "Rounding"
    return (
        f"{start} the RoI alone costs {projection} points of {METRIC}, quantizing its bins alone {bins}, and both "
        f"together {both}{brackets}{findings.seeds_of_costs}."
    )


def paper_name(arm: str) -> str:
    """Return the name of an arm's operator in its paper, or the arm."""
    return NAMES.get(arm, arm)


def evidence(findings: Findings, arm: str, chosen_of: int = 1) -> str:
    """Format the evidence of an arm's cost or gain: `(95 % interval 28.0 to 38.2, 3 seeds, paired, p = 0.001)`.

    Args:
        findings: of the sweep.
        arm: whose difference to the reference is meant.
        chosen_of: number of arms of which it was chosen for its difference. p is then corrected for all of them.
    """
    estimate = findings.differences[METRIC][arm]
    parts = []
    if estimate.has_interval:
        parts.append("95 % interval {:.1f} to {:.1f}".format(*_ends(estimate)))
    if findings.varies_over == "seeds":
        parts.append(f"{estimate.n} seed{'s' * (estimate.n != 1)}, paired")
    else:
        parts.append(f"one seed, {estimate.n} images resampled" if estimate.has_interval else "one seed, one image")
    if chosen_of > 1:
        parts.append(f"the largest of {chosen_of} differences")
    p_value = estimate.p_value if chosen_of == 1 else findings.corrected_p_values[METRIC][arm]
    if not math.isnan(p_value):
        parts.append(("p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}") + " with Holm's correction" * (chosen_of > 1))
    return f"({', '.join(parts)})"
