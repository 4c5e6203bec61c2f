"""The linear probe, on features whose regressor is known."""

import numpy as np
import pytest
import torch

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.report.probe import Pairs, Probe, choose_rois, format_probe, probe
from tests.ops.presets import preset

STRIDE, SIDE = 32, 160.0  # pixels: objects and RoIs of 5 cells


@pytest.fixture(scope="module")
def measured():
    """Maps that hold each cell's distance to the object's centre, (right, down), in 80 images of one object with 8 RoIs.

    A RoI's mean feature is its offset to the object, so the regression targets are linear in the features. A rounded RoI of
    whole cells is moved by up to half a cell.

    Returns:
        The probe, and the pairs.
    """
    rng = np.random.default_rng(0)
    cells, corner = np.arange(16) + 0.5, rng.uniform(160, 220, (80, 2))
    centre = (corner + SIDE / 2) / STRIDE
    offsets = np.broadcast_arrays(cells[None, None, :] - centre[:, :1, None], cells[None, :, None] - centre[:, 1:, None])
    moved = corner[:, None] + rng.uniform(-28, 28, (80, 8, 2))
    rois = np.concatenate([moved, moved + SIDE], axis=-1)
    features = {}
    for name in ("align", "prroi", "align_no_half_pixel", "warp"):
        maps = torch.from_numpy(np.stack(offsets, axis=1))
        features[name] = preset(name)(maps, list(torch.from_numpy(rois)), 7, 1 / STRIDE).flatten(1).numpy()
    of = np.repeat(np.arange(80), 8)
    objects = np.concatenate([corner, corner + SIDE], axis=1)[of]
    pairs = Pairs(rois.reshape(-1, 4), objects, of, of)
    return probe(features, pairs, STRIDE), pairs


def test_what_is_linear_is_regressed_and_a_constant_shift_costs_nothing(measured):
    found, _ = measured
    assert found.before.mean() < 0.8
    assert found.cells == pytest.approx(np.full(80, 5.0))
    for name in ("align", "prroi", "align_no_half_pixel"):
        assert found.iou[name].mean() > 0.995 and found.strict[name].min() == 1


def test_rounding_leaves_what_the_best_line_through_rounded_offsets_leaves(measured):
    """By hand: a head that sees the offset of the rounded RoI predicts that of the RoI by a straight line, on each axis."""
    found, pairs = measured
    rois, objects = pairs.rois[:, :2] / STRIDE, pairs.objects[:, :2] / STRIDE
    seen, wanted = objects - np.round(rois), objects - rois
    off = np.stack([np.abs(np.polyval(np.polyfit(seen[:, k], wanted[:, k], 1), seen[:, k]) - wanted[:, k]) for k in (0, 1)])
    assert 0.15 < off.mean() < 0.25 and off.max() < 0.6, "cells"
    common = (5 - off[0]) * (5 - off[1])
    expected = (common / (50 - common)).mean()
    assert found.iou["warp"].mean() == pytest.approx(expected, abs=0.005)
    change = found.difference("warp", "align")
    assert change.low < 100 * (expected - 1) < change.high < -10 and change.n == 80


def test_the_interval_counts_images_and_not_objects():
    """Ten objects in an image that lose the same are one observation."""
    rng = np.random.default_rng(0)
    loss = rng.normal(0.02, 0.01, 30)

    def of(times):
        image = np.repeat(np.arange(30), times)
        align = np.full(30 * times, 0.8)
        return Probe({"align": align, "warp": align - loss[image]}, {}, align, align, image)

    once, often = (of(times).difference("warp", "align") for times in (1, 10))
    assert (once.value, once.low, once.high) == pytest.approx((often.value, often.low, often.high))
    assert once.value == pytest.approx(-100 * loss.mean()) and once.high < 0
    nothing = of(1).difference("align", "align")
    assert (nothing.low, nothing.value, nothing.high) == (0, 0, 0)


def test_rois_are_proposals_that_overlap_an_object_by_half():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])
    near = torch.tensor([[0.0, 0.0, 10.0, 10.0 + k] for k in range(8)])
    proposals = torch.cat([near, torch.tensor([[21.0, 0.0, 31.0, 10.0], [5.0, 5.0, 15.0, 15.0]])])
    rois, place = choose_rois(proposals, boxes, most=5, seed=0)
    assert place.tolist() == [0] * 5 + [1]
    assert rois[-1].tolist() == [21, 0, 31, 10] and len(rois.unique(dim=0)) == 6
    again = choose_rois(proposals, boxes, most=5, seed=0)[0]
    assert torch.equal(rois, again) and not torch.equal(rois, choose_rois(proposals, boxes, most=5, seed=1)[0])
    for none in (choose_rois(proposals, boxes[:0], 5, 0), choose_rois(proposals[:0], boxes, 5, 0)):
        assert none[0].shape == (0, 4) and len(none[1]) == 0


def test_the_table(measured):
    found, _ = measured
    lines = format_probe(found, "align", resamples=50).splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith(tuple(found.iou))}
    assert list(rows) == list(found.iou) and all(len(line) <= 100 for line in lines)
    change = f"{found.difference('warp', 'align').value:.2f}"
    assert rows["warp"].split()[-4:] == ["-", "-", change, "-"], "objects of 5 cells"
    assert lines[-1].startswith(f"With RoIWarp the mean IoU of the regressed boxes changes by {change} [")


def test_fewer_images_than_folds_are_refused():
    pairs = Pairs(*[np.array([[0.0, 0.0, 9.0, 9.0]] * 4)] * 2, *[np.arange(4)] * 2)
    with pytest.raises(InputError, match=r"4 images have a proposal that overlaps an object by IoU 0\.5, the probe needs 5"):
        probe({"align": np.ones((4, 3))}, pairs, 16)
