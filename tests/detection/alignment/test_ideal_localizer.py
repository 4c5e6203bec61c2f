"""The ideal localizer, held against errors that follow from rounding by hand, and against brute force."""

import numpy as np
import pytest
import torch

from roi_quantization.detection.alignment.ideal_localizer import IdealLocalizer
from roi_quantization.detection.alignment.misalignment import sampled_bins
from tests.ops.presets import preset

SIZES = np.geomspace(2, 12, 400)


def boxes_near(rois, seed=0):
    """Objects whose edges lie within a fifth of the RoI's size of its edges."""
    sides = np.tile(rois[:, 2:] - rois[:, :2], 2)
    return rois + np.random.default_rng(seed).uniform(-0.2, 0.2, rois.shape) * sides


def random_rois(count, seed=0, sizes=(2, 10)):
    rng = np.random.default_rng(seed)
    corner, sides = rng.uniform(5, 30, (count, 2)), rng.uniform(*sizes, (count, 2))
    return np.concatenate([corner, corner + sides], axis=1)


@pytest.mark.parametrize("name", ["align", "align_max", "align_1_sample", "prroi", "align_no_half_pixel", "warp_mnc"])
def test_only_classes_of_several_rois_cost(name):
    rois = random_rois(500)
    objects = boxes_near(rois)
    boxes, is_empty = IdealLocalizer(preset(name), SIZES).localize(rois, objects)
    assert not is_empty.any()
    error = np.abs(boxes - objects).max()
    assert error > 0.3 if name == "warp_mnc" else error < 1e-9, "a constant shift is learned, rounding is not"
    if name in ("align", "prroi"):
        assert IdealLocalizer(preset(name), SIZES).is_exact
    assert not IdealLocalizer(preset("warp"), SIZES).is_exact


def test_a_rounded_roi_leaves_its_offset_in_the_box():
    """From 4 to 8 cells a RoI may start at 3.5 to 4.5 and end at 7.5 to 8.5: the mean target of an object from 4 to 8 is no shift."""
    localizer = IdealLocalizer(preset("warp"), SIZES)
    rois = np.array([[4.3, 4.0, 8.3, 8.0], [3.6, 4.2, 7.6, 7.8]])
    boxes, _ = localizer.localize(rois, np.array([[4.0, 4.0, 8.0, 8.0]] * 2))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert centres == pytest.approx(np.array([[6.3, 6.0], [5.6, 6.0]]), abs=0.04)


@pytest.mark.parametrize(
    "name",
    ["warp", "pool_bins", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pool", "pool_exclusive", "pool_floor", "align"))],
)
def test_the_target_is_the_mean_over_rois_with_the_same_sampled_region(name):
    """Brute force along one axis: many RoIs, uniform in place and nearly so in size, grouped by their bins."""
    rng = np.random.default_rng(1)
    low = rng.integers(0, 64, 400_000) / 64 + 1 / 128 + 8
    size = rng.integers(64 * 7, 64 * 9, 400_000) / 64 + 1 / 128
    bins = sampled_bins(preset(name), torch.from_numpy(low), torch.from_numpy(low + size))
    rows = torch.cat([bins.low, bins.high], 1).numpy().round(3)
    _, group, count = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    start, end = 8.2, 16.1  # an object
    shift = ((start + end) / 2 - low - size / 2) / size
    largest = [g for g in np.argsort(count)[::-1] if size[group == g].max() < 8.9 and size[group == g].min() > 7.1][:5]
    localizer = IdealLocalizer(preset(name), np.geomspace(2, 40, 4000))  # its density is flat over a class
    for g in largest:
        mine = np.flatnonzero(group == g)[:40]
        rois = np.stack([low[mine], low[mine], low[mine] + size[mine], low[mine] + size[mine]], 1)
        boxes, _ = localizer.localize(rois, np.array([[start, start, end, end]] * len(mine)))
        target = ((boxes[:, 0] + boxes[:, 2]) / 2 - low[mine] - size[mine] / 2) / size[mine]
        error = np.abs(target - shift[group == g].mean())
        assert error.mean() < 0.012 and np.median(error) < 0.008, "the same for all but those near a border of the class, and their mean"


def test_a_roi_that_rounds_to_a_point_shows_nothing():
    """RoIWarp rounds a RoI from 8.6 to 9.4 cells to 9 and 9: all its samples are one."""
    localizer = IdealLocalizer(preset("warp"), np.geomspace(0.5, 12, 400))
    _, is_empty = localizer.localize(np.array([[8.6, 8.6, 9.4, 17.0], [8.1, 8.1, 16.9, 17.0]]), np.ones((2, 4)))
    assert is_empty.tolist() == [True, False]


def test_floored_bins_hide_the_size_of_a_roi():
    """RoIs below 14 cells have bins of one cell, the same seven cells whatever their size."""
    rois = np.array([[8.5, 8.5, 8.5 + size, 8.5 + size] for size in (5.0, 8.0, 12.0)])
    boxes, _ = IdealLocalizer(preset("pool_floor"), SIZES).localize(rois, np.array([[8.5, 8.5, 15.5, 15.5]] * 3))
    sides = boxes[:, 2] - boxes[:, 0]
    assert sides / (rois[:, 2] - rois[:, 0]) == pytest.approx(np.full(3, sides[0] / 5.0), rel=0.01), "the same target for all"


def test_errors_scale_with_the_cell_and_not_with_the_roi():
    """Rounding moves each edge by up to half a cell, uniformly: 0.25 of a cell in the mean."""
    localizer = IdealLocalizer(preset("warp"), np.geomspace(2, 40, 1000))
    for sizes in ((6, 10), (20, 30)):
        rois = random_rois(2000, sizes=sizes)
        boxes, _ = localizer.localize(rois, rois)
        assert np.abs(boxes - rois).mean() == pytest.approx(0.25, abs=0.02)
