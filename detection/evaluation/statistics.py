"""Effect sizes of an ablation with confidence intervals over training seeds.

Every quantity of an ablation is a weighted sum of its arms: an arm `{arm: 1}`, a difference `{arm: 1, reference: -1}`, a
cost, an interaction. Within a seed all arms share initial weights, images and sampled RoIs. The sum is therefore computed
per seed before averaging, so that effects common to all arms cancel. `bootstrap.py` estimates the same sums over images.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from roi_quantization.detection.common.errors import InputError

Combination = Mapping[str, float]  # arm -> its weight in the sum


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval, 95 % unless another level was chosen.

    Attributes:
        value: the mean of `n` observations.
        low, high: ends of the interval. NaN where it is undefined, as for a single seed.
        standard_error: standard deviation of `value`. That of one observation is `standard_error * sqrt(n)`.
        p_value: two-sided, of "the true value is 0", not corrected for multiple comparisons. NaN where it is undefined.
        n: number of seeds, or of images for a bootstrap.
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
        """Whether 0 is outside the interval. False without an interval."""
        return self.has_interval and not self.low <= 0 <= self.high

    def text(self, digits: int = 1, signed: bool = False) -> str:
        """Format as `-26.7 [-30.1, -23.3]`, without brackets where there is no interval, `-` where there is no value."""
        if math.isnan(self.value):
            return "-"
        form = f"{'+' if signed else ''}.{digits}f"
        interval = f" [{self.low:{form}}, {self.high:{form}}]" if self.has_interval else ""
        return f"{self.value:{form}}{interval}"


@dataclass(frozen=True)
class TwoByTwo:
    """The 2 x 2 factorial design: arms that differ only in the two quantizations, of the projected RoI and of its bins."""

    exact: str = "align_max"
    rounded_roi: str = "warp_max"
    quantized_bins: str = "pool_bins"
    both: str = "pool_exclusive"

    @property
    def arms(self) -> tuple[str, str, str, str]:
        return self.exact, self.rounded_roi, self.quantized_bins, self.both

    def costs(self) -> dict[str, Combination]:
        """Return the costs, positive where something is lost: of rounding the RoI (`projection`), of quantizing its bins
        (`bins`), of `both`, and the `interaction` = both - projection - bins.
        """
        return {
            "projection": {self.exact: 1, self.rounded_roi: -1},
            "bins": {self.exact: 1, self.quantized_bins: -1},
            "both": {self.exact: 1, self.both: -1},
            "interaction": {self.exact: -1, self.rounded_roi: 1, self.quantized_bins: 1, self.both: -1},
        }


def difference(arm: str, reference: str = "align") -> Combination:
    """Return the weights of `arm` minus `reference`. The sum is negative where the arm is worse."""
    if arm == reference:
        raise InputError(f"{arm} has no difference to itself")
    return {arm: 1, reference: -1}


def mean(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return the mean of independent observations with Student's t interval and the p-value of the t-test against 0.

    A single observation has no interval. A NaN makes everything NaN. Equal observations have an interval of width 0.

    Raises:
        ValueError: no observations.
    """
    if len(values) == 0:
        raise InputError("mean: there are no observations")
    values = [float(value) for value in values]
    if len(values) == 1:
        return Estimate(values[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # equal observations: no precision that matters is lost
        test = stats.ttest_1samp(values, popmean=0.0)
        low, high = test.confidence_interval(confidence)
        error = float(stats.sem(values))
    return Estimate(math.fsum(values) / len(values), float(low), float(high), error, float(test.pvalue), len(values))


def estimate_over_seeds(values: Mapping[str, Mapping[int, float]], combination: Combination, confidence: float = 0.95) -> Estimate:
    """Estimate a weighted sum of arms over the seeds that all of its arms have.

    Args:
        values: arm -> seed -> metric. Other arms and seeds are ignored.
        combination: arm -> weight.
        confidence: level of the interval.

    Returns:
        The estimate, with a p-value where the weights add up to 0, that is for differences and costs.

    Raises:
        ValueError: an arm is missing, or no seed is common to all arms.
    """
    missing = [arm for arm in combination if not values.get(arm)]
    if missing:
        raise InputError(f"no finished run of {', '.join(missing)}; there are runs of {', '.join(sorted(values)) or 'no arm'}")
    seeds = sorted(set.intersection(*(set(values[arm]) for arm in combination)))
    if not seeds:
        raise InputError(f"{', '.join(combination)} have no seed in common, so nothing can be paired")
    estimate = mean([math.fsum(weight * values[arm][seed] for arm, weight in combination.items()) for seed in seeds], confidence)
    if is_comparison(combination):
        return estimate
    return Estimate(estimate.value, estimate.low, estimate.high, estimate.standard_error, math.nan, estimate.n)


def estimate_over_seeds_and_images(seeds: Estimate, images: Estimate) -> Estimate:
    """Combine the intervals over seeds and over images of the same number into one for new trainings *and* new images.

    The distances of the two ends from the value are added as squares (Zou and Donner, "Construction of confidence limits about effect
    measures", Statistics in Medicine 27, 2008), so that it is at least as wide as either. What varies with a training and an image
    together is counted in both.

    Args:
        seeds: by `estimate_over_seeds`.
        images: by `bootstrap_over_images`, of the mean over the same seeds and at the same level.

    Returns:
        The estimate, with the number of seeds and without a p-value. Without an interval where one has none, as of a single seed.
    """
    value = seeds.value
    low, high = (value - math.hypot(value - seeds.low, value - images.low), value + math.hypot(seeds.high - value, images.high - value))
    return Estimate(value, low, high, math.hypot(seeds.standard_error, images.standard_error), n=seeds.n)


def is_comparison(combination: Combination) -> bool:
    """Return whether the weights add up to 0, so that a sum of 0 means "no effect"."""
    return math.isclose(math.fsum(combination.values()), 0, abs_tol=1e-12)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for their number by Holm's step-down method (1979), which controls the family-wise error rate.

    The smallest of m values is multiplied by m, the next by m - 1, and so on. Values never fall in this order and end at 1. A
    NaN, of a comparison that has no p-value, stays NaN and is one of the m: it may have been looked at as well.
    """
    corrected, highest = dict(p_values), 0.0
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    for rank, (p, name) in enumerate(known):
        highest = corrected[name] = max(highest, min(1.0, (len(p_values) - rank) * p))
    return corrected
