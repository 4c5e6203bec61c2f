"""Estimates over seeds: by hand, and against simulations whose true answer is known."""

import math
import warnings

import numpy as np
import pytest
from pytest import approx
from scipy import stats

from roi_quantization.detection.evaluation.statistics import (
    Estimate,
    TwoByTwo,
    difference,
    estimate_over_seeds,
    estimate_over_seeds_and_images,
    holm,
    mean,
)

VALUES = {"align": {0: 70.0, 1: 72.0, 2: 74.0}, "pool": {0: 60.0, 1: 61.0, 2: 65.0}}  # the differences are -10, -11, -9


def is_95_percent(hits):
    """Is the share of hits one that a true 95 % would give, in all but one of a thousand such simulations?"""
    low, high = stats.binom.interval(0.999, len(hits), 0.95)
    return low <= sum(hits) <= high


# --- by hand


def test_mean_and_interval_of_three_seeds():
    estimate = estimate_over_seeds(VALUES, {"align": 1})
    assert estimate.value == 72
    assert estimate.standard_error == approx(2 / math.sqrt(3))  # the standard deviation of 70, 72, 74 is 2
    half = 4.302653 * 2 / math.sqrt(3)  # Student's t with 2 degrees of freedom leaves 2.5 % above 4.302653
    assert (estimate.low, estimate.high) == approx((72 - half, 72 + half))
    assert estimate.n == 3
    assert math.isnan(estimate.p_value)  # nobody asks whether an AP is 0


def test_differences_are_paired_by_seed():
    estimate = estimate_over_seeds(VALUES, difference("pool", "align"))
    assert estimate.value == -10
    assert (estimate.low, estimate.high) == approx((-10 - 4.302653 / math.sqrt(3), -10 + 4.302653 / math.sqrt(3)))
    t = 10 * math.sqrt(3)
    assert estimate.p_value == approx(1 - t / math.sqrt(2 + t**2))  # the t distribution with 2 degrees of freedom in closed form
    assert estimate.excludes_zero


def test_only_seeds_that_both_arms_have_are_paired():
    values = {"align": {0: 70.0, 1: 72.0, 5: 99.0}, "pool": {1: 61.0, 0: 60.0, 6: 1.0}}
    estimate = estimate_over_seeds(values, difference("pool"))
    assert (estimate.value, estimate.n) == (-10.5, 2)


def test_one_seed_has_no_interval_and_proves_nothing():
    estimate = estimate_over_seeds({"align": {0: 70.0}, "pool": {0: 60.0}}, difference("pool"))
    assert (estimate.value, estimate.n) == (-10, 1)
    assert not estimate.has_interval
    assert not estimate.excludes_zero
    assert math.isnan(estimate.p_value)


def test_what_could_not_be_measured_stays_nan():
    """AP_large where a data set has no large objects."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = mean([math.nan, math.nan, math.nan])
    assert math.isnan(estimate.value)
    assert not estimate.has_interval
    assert estimate.text() == "-"


def test_equal_observations_have_an_interval_of_no_width_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = mean([100.0, 100.0, 100.0])
    assert (estimate.low, estimate.value, estimate.high) == (100, 100, 100)


def test_a_wider_level_gives_a_wider_interval():
    assert mean([1, 2, 3], confidence=0.99).high > mean([1, 2, 3]).high


def test_an_arm_has_no_difference_to_itself():
    with pytest.raises(ValueError, match="itself"):
        difference("align", "align")


def test_costs_of_the_two_by_two():
    level = {"align_max": 60.0, "warp_max": 40.0, "pool_bins": 50.0, "pool_exclusive": 36.0}
    values = {arm: {0: value, 1: value + 1} for arm, value in level.items()}  # a better seed is better for all: no cost changes
    assert {name: estimate_over_seeds(values, cost).value for name, cost in TwoByTwo().costs().items()} == {
        "projection": 20,
        "bins": 10,
        "both": 24,
        "interaction": -6,
    }


def test_an_arm_that_is_missing_is_named():
    with pytest.raises(ValueError, match="no finished run of warp_max, pool_bins, pool_exclusive; there are runs of align_max"):
        estimate_over_seeds({"align_max": {0: 1.0}}, TwoByTwo().costs()["interaction"])
    with pytest.raises(ValueError, match="no finished run of warp; there are runs of align, pool"):
        estimate_over_seeds(VALUES, difference("warp"))
    with pytest.raises(ValueError, match="no seed in common"):
        estimate_over_seeds({"align": {0: 1.0}, "pool": {1: 1.0}}, difference("pool"))
    with pytest.raises(ValueError, match="no observations"):
        mean([])


def test_text():
    assert Estimate(-26.73, -30.06, -23.34).text() == "-26.7 [-30.1, -23.3]"
    assert Estimate(1.0, -0.5, 2.5).text(digits=2, signed=True) == "+1.00 [-0.50, +2.50]"
    assert Estimate(49.57).text() == "49.6"


# --- simulations: the truth is known, and a 95 % interval must hold it in 95 % of the cases


def test_intervals_of_three_seeds_hold_the_truth_in_95_percent():
    rng = np.random.default_rng(0)
    estimates = [mean(rng.normal(50, 3, size=3)) for _ in range(1500)]
    assert is_95_percent([e.low <= 50 <= e.high for e in estimates])
    narrow = [abs(e.value - 50) <= 1.96 * e.standard_error for e in estimates]  # the normal distribution's, wrong for three
    assert not is_95_percent(narrow)


def test_pairing_removes_what_seeds_have_in_common():
    """Seeds differ by 5 points, arms within a seed by 3 with a noise of 0.5 each: unpaired, nothing could be seen with 4 seeds."""
    rng = np.random.default_rng(1)
    held, found, found_unpaired = [], [], []
    for _ in range(800):
        seeds = rng.normal(60, 5, size=4)
        align, pool = seeds + rng.normal(0, 0.5, size=4), seeds - 3 + rng.normal(0, 0.5, size=4)
        estimate = estimate_over_seeds({"align": dict(enumerate(align)), "pool": dict(enumerate(pool))}, difference("pool"))
        held.append(estimate.low <= -3 <= estimate.high)
        found.append(estimate.p_value < 0.05)
        found_unpaired.append(stats.ttest_ind(pool, align).pvalue < 0.05)
    assert is_95_percent(held)
    assert np.mean(found) > 0.95
    assert np.mean(found_unpaired) < 0.15


def test_without_an_effect_one_p_value_in_twenty_is_below_5_percent():
    rng = np.random.default_rng(2)
    above = []
    for _ in range(1500):
        values = {arm: dict(enumerate(rng.normal(60, 2, size=3))) for arm in ("align", "pool")}
        estimate = estimate_over_seeds(values, difference("pool"))
        above.append(estimate.p_value >= 0.05)
        assert estimate.excludes_zero == (estimate.p_value < 0.05)  # interval and test say the same
    assert is_95_percent(above)


def test_intervals_of_the_costs_hold_the_true_costs():
    true = {"projection": 20, "bins": 8, "both": 25, "interaction": -3}
    level = dict(zip(TwoByTwo().arms, (60, 40, 52, 35), strict=True))
    rng = np.random.default_rng(3)
    held = {name: [] for name in true}
    for _ in range(500):
        seeds = rng.normal(0, 3, size=3)
        values = {arm: dict(enumerate(value + seeds + rng.normal(0, 1.5, size=3))) for arm, value in level.items()}
        for name, sums in TwoByTwo().costs().items():
            cost = estimate_over_seeds(values, sums)
            held[name].append(cost.low <= true[name] <= cost.high)
    for name, hits in held.items():
        assert is_95_percent(hits), f"{name}: {np.mean(hits)}"


def test_the_squares_of_the_distances_over_seeds_and_over_images_add_up():
    seeds, images = Estimate(-4.0, -7.0, -1.0, standard_error=0.6, n=3), Estimate(-4.0, -8.0, -2.0, standard_error=0.8, n=300)
    both = estimate_over_seeds_and_images(seeds, images)
    assert (both.value, both.low, both.high, both.standard_error, both.n) == approx((-4.0, -9.0, -4.0 + math.sqrt(13), 1.0, 3))
    assert math.isnan(both.p_value)
    assert not estimate_over_seeds_and_images(Estimate(-4.0), images).has_interval, "one seed"
    assert not estimate_over_seeds_and_images(seeds, Estimate(-4.0)).has_interval, "one image"


@pytest.mark.parametrize("number_of_seeds", [2, 3])
@pytest.mark.parametrize(
    ("of_seeds", "of_images", "of_both"), [(1.0, 5.0, 0.0), (2.0, 5.0, 0.0), (1.0, 0.0, 0.0), (0.0, 5.0, 0.0), (0.6, 6.0, 10.0)]
)
def test_the_interval_over_seeds_and_images_holds_what_new_ones_would_give(number_of_seeds, of_seeds, of_images, of_both):
    """Seeds and images are drawn anew each time, as intervals over one of them do not allow for."""
    rng, n = np.random.default_rng(0), number_of_seeds
    hits = {"both": [], "seeds": [], "images": []}
    for _ in range(500):
        table = of_seeds * rng.normal(size=(n, 1)) + of_images * rng.normal(size=(1, 60)) + of_both * rng.normal(size=(n, 60))
        seeds, images = mean(table.mean(axis=1)), mean(table.mean(axis=0))
        both = estimate_over_seeds_and_images(seeds, images)
        assert both.low <= min(seeds.low, images.low) + 1e-9 and both.high >= max(seeds.high, images.high) - 1e-9
        for name, one in {"both": both, "seeds": seeds, "images": images}.items():
            hits[name].append(one.low <= 0 <= one.high)
    assert np.mean(hits["both"]) >= stats.binom.ppf(0.001, 500, 0.95) / 500
    if of_seeds and of_images:
        assert np.mean(hits["seeds"]) < np.mean(hits["both"]) and np.mean(hits["images"]) < np.mean(hits["both"])


def test_holm_multiplies_the_smallest_p_by_their_number_the_next_by_one_less():
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": math.nan})
    assert [corrected[name] for name in "abcd"] == pytest.approx([0.04, 0.09, 0.09, 0.025])  # 0.04 x 2 is below c's 0.03 x 3
    assert math.isnan(corrected["e"])
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
