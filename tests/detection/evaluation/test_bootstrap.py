"""The AP of weighted images against COCOeval on a data set in which the images lie that often, and its intervals against a known truth."""

import math
import warnings

import numpy as np
import pytest
from pytest import approx
from scipy import stats

from roi_quantization.detection.evaluation.bootstrap import METRICS, MatchedDetections, bootstrap_over_images
from roi_quantization.detection.evaluation.coco import evaluate
from roi_quantization.detection.evaluation.statistics import difference
from tests.detection.evaluation.coco_sets import CAT, DOG, annotation, coco, random_set, result


def repeated(entries, counts):
    """Image i, `counts[i - 1]` times, under new ids that keep the order of the images."""
    return [{**e, "image_id": 100 * e["image_id"] + copy} for e in entries for copy in range(counts[e["image_id"] - 1])]


@pytest.mark.parametrize("seed", range(5))
def test_at_weight_one_it_is_cocoevals_ap(seed):
    annotations, results = random_set(np.random.default_rng(seed))
    ids = range(1, 13)
    measured = MatchedDetections(coco(*annotations, images=ids), results, ids).average_precision()
    expected = evaluate(coco(*annotations, images=ids), results, ids).stats
    assert {name: value.item() for name, value in measured.items()} == approx({name: expected[name] for name in METRICS})


@pytest.mark.parametrize("seed", range(5))
def test_a_weight_is_how_often_the_image_is_there(seed):
    """Random draws with replacement, with crowd regions, scores that images share, and classes that a draw may lack."""
    rng = np.random.default_rng(seed)
    annotations, results = random_set(rng)
    ids = range(1, 13)
    weights = rng.multinomial(12, [1 / 12] * 12, size=6)
    measured = MatchedDetections(coco(*annotations, images=ids), results, ids).average_precision(weights)
    for row, counts in enumerate(weights):
        copies = [100 * i + copy for i in ids for copy in range(counts[i - 1])]
        expected = evaluate(coco(*repeated(annotations, counts), images=copies), repeated(results, counts), copies).stats
        for name in METRICS:
            assert measured[name][row] == approx(expected[name]), (counts, name)


def test_ap_of_three_images_by_hand():
    """Image 1: found. Image 2: missed. Image 3: a surer false detection."""
    gt = coco(annotation(1), annotation(2))
    matched = MatchedDetections(gt, [result(1, score=0.8), result(3, score=0.9)], [1, 2, 3])
    half = 51 / 101  # the recall levels 0, 0.01 ... 0.50
    weights = [[1, 1, 1], [1, 1, 0], [3, 1, 1], [0, 2, 1], [1, 0, 0], [0, 0, 3]]
    expected = [50 * half, 100 * half, 75 * 76 / 101, 0, 100, math.nan]  # three found after one false: precision 3/4 up to recall 3/4
    assert matched.average_precision(weights)["AP50"] == approx(expected, nan_ok=True)


def test_without_detections_it_is_0_and_without_objects_nan():
    assert MatchedDetections(coco(annotation(1)), [], [1, 2]).average_precision()["AP"] == 0
    assert np.isnan(MatchedDetections(coco(annotation(1)), [result(2)], [2, 3]).average_precision()["AP"])
    assert np.isnan(MatchedDetections(coco(), [], [1]).average_precision()["AP"])


def test_many_resamples_are_worked_off_in_parts(monkeypatch):
    annotations, results = random_set(np.random.default_rng(0))
    matched = MatchedDetections(coco(*annotations, images=range(1, 13)), results, range(1, 13))
    weights = np.random.default_rng(1).integers(0, 3, size=(7, 12))
    whole = matched.average_precision(weights)
    monkeypatch.setattr("roi_quantization.detection.evaluation.bootstrap._CHUNK", 100)
    for name, values in matched.average_precision(weights).items():
        np.testing.assert_array_equal(values, whole[name])


# --- intervals


def found_with_probability(rng, q, images, among=None):
    """One object in each image, found with probability q (among those that another arm found), nothing else: AP is the share found."""
    found = rng.random(images) < q
    return found if among is None else found & among


def matched_of(found):
    ids = range(1, len(found) + 1)
    gt = coco(*(annotation(i) for i in ids), images=ids)
    return MatchedDetections(gt, [result(i) for i in ids if found[i - 1]], ids)


def test_one_image_has_no_interval():
    found = bootstrap_over_images({"align": matched_of([True])}, {"align": {"align": 1}})["align"]["AP"]
    assert found.value == approx(100) and not found.has_interval


def test_draws_without_an_object_are_told(caplog):
    matched = MatchedDetections(coco(annotation(1), images=[1, 2, 3]), [result(1)], [1, 2, 3])
    found = bootstrap_over_images({"align": matched}, {"align": {"align": 1}}, resamples=200)["align"]["AP"]
    assert found.value == approx(100) and not found.has_interval
    empty = int(caplog.messages[0].split(" of 200 draws of 3 images have no object")[0])
    assert stats.binom.interval(0.9999, 200, (2 / 3) ** 3)[0] <= empty <= stats.binom.interval(0.9999, 200, (2 / 3) ** 3)[1]


def test_intervals_hold_the_truth():
    """`align` finds 70 % of the objects, `pool` 80 % of these; the difference is 14 points, and its two arms are resampled together."""
    rng = np.random.default_rng(0)
    held = {"align": [], "difference": []}
    widths = []
    for _ in range(150):
        align = found_with_probability(rng, 0.7, 80)
        pool = found_with_probability(rng, 0.8, 80, among=align)
        sums = {"align": {"align": 1}, "difference": difference("pool"), "pool": {"pool": 1}}
        estimates = bootstrap_over_images(
            {"align": matched_of(align), "pool": matched_of(pool)}, sums, resamples=400, seed=int(rng.integers(2**31))
        )
        ap = {name: estimate["AP"] for name, estimate in estimates.items()}
        assert ap["difference"].value == approx(ap["pool"].value - ap["align"].value)
        held["align"].append(ap["align"].low <= 70 <= ap["align"].high)
        held["difference"].append(ap["difference"].low <= -14 <= ap["difference"].high)
        unpaired = math.hypot(ap["align"].standard_error, ap["pool"].standard_error)
        widths.append(ap["difference"].standard_error / unpaired)
    low, high = stats.binom.interval(0.999, 150, 0.95)
    for name, hits in held.items():
        assert low <= sum(hits) <= high, f"{name}: {np.mean(hits)}"
    assert np.mean(widths) < 0.7  # a share of .14 (0.35 a root) against two independent ones of .7 and .56 (0.68): about half


def test_the_standard_error_is_the_binomials():
    found = np.arange(100) < 70
    estimate = bootstrap_over_images({"align": matched_of(found)}, {"align": {"align": 1}}, resamples=2000)["align"]["AP"]
    assert estimate.standard_error == approx(100 * math.sqrt(0.7 * 0.3 / 100), rel=0.05)
    assert estimate.n == 100
    assert math.isnan(estimate.p_value)


def test_a_percentile_interval_lies_higher_than_the_corrected_one():
    """The bias that the default corrects: resamples of a ranking with false detections in it have fewer different ones."""
    rng = np.random.default_rng(0)
    ids = range(1, 61)
    gt = coco(*(annotation(i) for i in ids), images=ids)
    results = [result(i, score=float(rng.random())) for i in ids if rng.random() < 0.7]
    results += [result(i, [300, 300, 50, 50], score=float(rng.random())) for i in ids if rng.random() < 0.7]
    arms = {"align": MatchedDetections(gt, results, ids)}
    methods = ("percentile", "BCa")
    percentile, corrected = (bootstrap_over_images(arms, {"a": {"align": 1}}, 1000, method=method)["a"]["AP"] for method in methods)
    assert percentile.value == corrected.value
    assert percentile.low + percentile.high > corrected.low + corrected.high + 1  # points


def test_every_sum_has_every_metric():
    annotations, results = random_set(np.random.default_rng(0))
    gt, ids = coco(*annotations, images=range(1, 13)), range(1, 13)
    arms = {"align": MatchedDetections(gt, results, ids), "pool": MatchedDetections(gt, results[::2], ids)}
    align, pool = (arms[arm].average_precision() for arm in ("align", "pool"))
    estimates = bootstrap_over_images(arms, {"lost": {"align": 1, "pool": -1}, "pool": {"pool": 1}}, resamples=30)
    for metric in METRICS:
        assert estimates["pool"][metric].value == approx(pool[metric].item())
        assert estimates["lost"][metric].value == approx((align[metric] - pool[metric]).item())


def test_the_seeds_of_an_arm_are_averaged():
    gt = coco(annotation(1), annotation(2), annotation(3, category_id=DOG))
    runs = [MatchedDetections(gt, results, [1, 2, 3]) for results in ([result(1), result(2)], [result(3, category_id=DOG)], [])]
    estimate = bootstrap_over_images({"align": runs}, {"align": {"align": 1}}, resamples=50)["align"]["AP"]
    assert estimate.value == approx((50 + 50 + 0) / 3)


def test_the_same_seed_gives_the_same_interval():
    annotations, results = random_set(np.random.default_rng(0))
    arms = {"align": MatchedDetections(coco(*annotations, images=range(1, 13)), results, range(1, 13))}
    first, again, other = (bootstrap_over_images(arms, {"align": {"align": 1}}, resamples=100, seed=s)["align"]["AP"] for s in (0, 0, 1))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_where_nothing_varies_there_is_no_interval_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = bootstrap_over_images({"align": matched_of(np.ones(5, dtype=bool))}, {"align": {"align": 1}}, resamples=20)["align"][
            "AP"
        ]
    assert estimate.value == 100
    assert not estimate.has_interval


def test_arms_must_have_been_evaluated_on_the_same_images():
    gt = coco(annotation(1), annotation(2))
    arms = {"align": MatchedDetections(gt, [], [1, 2]), "pool": MatchedDetections(gt, [], [1, 3])}
    with pytest.raises(ValueError, match="different images"):
        bootstrap_over_images(arms, {"d": difference("pool")})
    with pytest.raises(ValueError, match="no finished run of warp; there are runs of align, pool"):
        bootstrap_over_images(arms, {"d": difference("warp")})


def test_a_class_that_no_drawn_image_has_is_left_out_of_the_mean():
    gt = coco(annotation(1, category_id=CAT), annotation(2, category_id=DOG))
    matched = MatchedDetections(gt, [result(1, category_id=CAT)], [1, 2])
    assert matched.average_precision([[1, 1], [2, 0], [0, 2]])["AP"] == approx([50, 100, 0])
