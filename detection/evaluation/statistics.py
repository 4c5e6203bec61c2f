"""How large is an effect, and how sure are we of it: estimates over training seeds.

Everything that is asked of an ablation is a weighted sum of its arms: an arm alone `{arm: 1}`, a difference `{arm: 1, reference: -1}`, a
cost, an interaction. Within a seed all arms share initial weights, images and sampled RoIs, so the sum is taken seed by seed first and only
then over the seeds: what a seed does to all arms alike cancels. `bootstrap.py` estimates the same sums over images.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

Combination = Mapping[str, float]  # arm -> its weight in the sum


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % confidence interval (or that of another level, where one was asked for).

    value: the mean of `n` observations.
    low, high: ends of the interval; NaN where there is too little to tell, as with a single seed.
    standard_error: standard deviation of `value` (over seeds: that of one seed is `standard_error * sqrt(n)`).
    p_value: two-sided, of "the true value is 0", not corrected for the number of comparisons; NaN where it cannot be told or is not asked.
    n: seeds, or images for a bootstrap.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    standard_error: float = math.nan
    p_value: float = math.nan
    n: int = 1

    @property
    def has_interval(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def excludes_zero(self) -> bool:
        """Is 0 outside the interval? False where there is none."""
        return self.has_interval and not self.low <= 0 <= self.high

    def text(self, digits: int = 1, signed: bool = False) -> str:
        """`-26.7 [-30.1, -23.3]`; without the bracket where there is no interval, and `-` where there is no value."""
        if math.isnan(self.value):
            return "-"
        form = f"{'+' if signed else ''}.{digits}f"
        interval = f" [{self.low:{form}}, {self.high:{form}}]" if self.has_interval else ""
        return f"{self.value:{form}}{interval}"


@dataclass(frozen=True)
class TwoByTwo:
    """The arms that differ in nothing but the two quantizations: of the projected RoI (rows) and of its bins (columns)."""

    exact: str = "align_max"
    rounded_roi: str = "warp_max"
    quantized_bins: str = "pool_bins"
    both: str = "pool_exclusive"

    @property
    def arms(self) -> tuple[str, str, str, str]:
        return self.exact, self.rounded_roi, self.quantized_bins, self.both

    def costs(self) -> dict[str, Combination]:
        """What is lost, as a positive number, to the first quantization (`projection`), to the second (`bins`), to `both` together, and the
        `interaction` = both - projection - bins: negative where the second hurts less once the first has been done.
        """
        return {
            "projection": {self.exact: 1, self.rounded_roi: -1},
            "bins": {self.exact: 1, self.quantized_bins: -1},
            "both": {self.exact: 1, self.both: -1},
            "interaction": {self.exact: -1, self.rounded_roi: 1, self.quantized_bins: 1, self.both: -1},
        }


def difference(arm: str, reference: str = "align") -> Combination:
    """`arm` minus `reference`: negative where the arm is worse."""
    if arm == reference:
        raise ValueError(f"{arm} has no difference to itself")
    return {arm: 1, reference: -1}


def mean(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of independent observations with Student's t interval, and the p-value of the one-sample t-test against 0.

    One observation has no interval; one that is NaN makes all NaN. Equal observations have an interval of no width.
    """
    if len(values) == 0:
        raise ValueError("there are no observations to take the mean of")
    values = [float(value) for value in values]
    if len(values) == 1:
        return Estimate(values[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # equal observations: nothing is lost that matters
        test = stats.ttest_1samp(values, popmean=0.0)
        low, high = test.confidence_interval(confidence)
        error = float(stats.sem(values))
    return Estimate(math.fsum(values) / len(values), float(low), float(high), error, float(test.pvalue), len(values))


def over_seeds(values: Mapping[str, Mapping[int, float]], combination: Combination, confidence: float = 0.95) -> Estimate:
    """The weighted sum of arms, estimated over the seeds that all of its arms have.

    values: arm -> seed -> a metric. Arms and seeds that the sum does not need may be there.
    The p-value is given where the weights add up to 0, that is for differences and costs.
    Raises ValueError where an arm is missing or no seed is common to all.
    """
    missing = [arm for arm in combination if not values.get(arm)]
    if missing:
        raise ValueError(f"no finished run of {', '.join(missing)}; there are runs of {', '.join(sorted(values)) or 'no arm'}")
    seeds = sorted(set.intersection(*(set(values[arm]) for arm in combination)))
    if not seeds:
        raise ValueError(f"{', '.join(combination)} have no seed in common, so nothing can be paired")
    estimate = mean([math.fsum(weight * values[arm][seed] for arm, weight in combination.items()) for seed in seeds], confidence)
    if is_comparison(combination):
        return estimate
    return Estimate(estimate.value, estimate.low, estimate.high, estimate.standard_error, math.nan, estimate.n)


def is_comparison(combination: Combination) -> bool:
    """Do the weights add up to 0, so that 0 means "no effect"?"""
    return math.isclose(math.fsum(combination.values()), 0, abs_tol=1e-12)


def differences(values: Mapping[str, Mapping[int, float]], reference: str = "align", confidence: float = 0.95) -> dict[str, Estimate]:
    """Every other arm minus the reference, paired by seed. Arms that share no seed with the reference are left out."""
    shared = [arm for arm in values if arm != reference and set(values[arm]) & set(values.get(reference, ()))]
    return {arm: over_seeds(values, difference(arm, reference), confidence) for arm in shared}


def quantization_costs(
    values: Mapping[str, Mapping[int, float]], arms: TwoByTwo | None = None, confidence: float = 0.95
) -> dict[str, Estimate]:
    """The costs of `TwoByTwo.costs`, estimated over the seeds that all four arms have, so that they add up."""
    arms = arms or TwoByTwo()
    missing = [arm for arm in arms.arms if not values.get(arm)]
    if missing:
        raise ValueError(f"the 2 x 2 needs runs of {', '.join(arms.arms)}; there are none of {', '.join(missing)}")
    seeds = set.intersection(*(set(values[arm]) for arm in arms.arms))
    common = {arm: {seed: values[arm][seed] for seed in seeds} for arm in arms.arms}
    return {name: over_seeds(common, cost, confidence) for name, cost in arms.costs().items()}
