"""The result in words and numbers."""

from roi_quantization.detection.evaluation.statistics import Estimate
from roi_quantization.detection.report.findings import Findings

NAMES = {"pool": "RoIPool", "warp": "RoIWarp", "align": "RoIAlign", "prroi": "PrRoIPool"}


def result(found: Findings) -> str:
    """One sentence: what RoIPool (where it is missing, the arm that differs most) loses in AP75 to the reference."""
    changes = found.differences["AP75"]
    if not changes:
        value = found.means["AP75"][found.reference].text()
        return (
            f"{name(found.reference)} reaches an AP75 of {value} at stride {found.stride}; there is no other operator to hold against it."
        )
    arm = "pool" if "pool" in changes else min(changes, key=lambda a: changes[a].value)
    change, ours, theirs = changes[arm], found.means["AP75"][arm].value, found.means["AP75"][found.reference].value
    verdict = "costs" if change.value < 0 else "gains"
    sentence = (
        f"{name(arm)} in the place of {name(found.reference)} {verdict} {abs(change.value):.1f} points of AP75 at stride {found.stride}: "
        f"{ours:.1f} against {theirs:.1f} {evidence(found, change)}."
    )
    if change.has_interval and not change.excludes_zero:
        sentence = sentence[:-1] + "; the interval holds 0, so no difference is shown."
    return sentence


def explanation(found: Findings) -> str:
    """One sentence more: the costs of the two quantizations apart; empty where the 2 x 2 is not complete."""
    if not found.costs:
        return ""
    costs = found.costs["AP75"]
    projection, bins, both = (costs[key].text() for key in ("projection", "bins", "both"))
    brackets = " (95 % intervals in brackets)" if costs["both"].has_interval else ""
    return (
        f"With all else held equal, rounding the RoI alone costs {projection} and quantizing its bins alone costs {bins}; both together "
        f"cost {both}{brackets}."
    )


def name(arm: str) -> str:
    return NAMES.get(arm, arm)


def evidence(found: Findings, estimate: Estimate) -> str:
    """`(95 % interval of the difference 28.0 to 38.2, 3 seeds, p = 0.001)`"""
    parts = []
    if estimate.has_interval:
        ends = sorted((abs(estimate.low), abs(estimate.high))) if estimate.excludes_zero else (estimate.low, estimate.high)
        parts.append(f"95 % interval of the difference {ends[0]:.1f} to {ends[1]:.1f}")
    parts.append(f"{estimate.n} seeds, paired" if found.over == "seeds" else f"one seed, {estimate.n} images resampled")
    if estimate.p_value == estimate.p_value:
        parts.append("p < 0.001" if estimate.p_value < 0.001 else f"p = {estimate.p_value:.3f}")
    return f"({', '.join(parts)})"
