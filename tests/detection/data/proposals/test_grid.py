"""The grid."""

from pathlib import Path

import pytest
import torch

from roi_quantization.detection.data.images import ImageRecord
from roi_quantization.detection.data.proposals.grid import Grid


def image(width, height):
    return ImageRecord(1, Path("a.png"), width, height)


def test_a_grid_by_hand():
    # windows of 20 x 20 in 60 x 40, neighbours at most 10 apart: 5 places across, 3 down
    windows = Grid(scales=[0.5], step=0.5)(image(60, 40))
    assert windows.dtype == torch.float32
    assert windows.tolist() == [[x, y, x + 20, y + 20] for y in (0, 10, 20) for x in (0, 10, 20, 30, 40)]


def test_steps_are_evened_out_so_that_both_borders_are_reached():
    # at most 12 apart over 40 pixels: four gaps of 10
    windows = Grid(scales=[0.5], step=0.6)(image(60, 40))
    assert sorted(set(windows[:, 0].tolist())) == [0, 10, 20, 30, 40]


def test_aspect_ratio_is_height_by_width_at_the_same_area():
    width, height = (windows := Grid(scales=[0.5], aspect_ratios=[4.0], step=1)(image(100, 100)))[0, 2:] - windows[0, :2]
    assert (width, height) == (25, 100)


def test_a_window_larger_than_the_image_is_cut_to_it():
    assert Grid(scales=[2.0])(image(60, 40)).tolist() == [[0, 0, 60, 40]]


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (333, 500)])
def test_windows_lie_inside_and_have_area(size):
    windows = Grid(scales=[0.14, 0.46, 1.0], aspect_ratios=[0.5, 1, 2])(image(*size))
    assert (windows[:, 2:] > windows[:, :2]).all() and (windows >= 0).all()
    assert (windows[:, 2:] <= torch.tensor(size) + 1e-3).all()


def test_a_long_and_narrow_image_has_no_more_windows_than_it_may():
    grid = Grid(scales=[0.14, 0.21, 0.31, 0.46], step=0.33, most=1000)
    windows = grid(image(4000, 200))
    assert 800 < len(windows) <= 1000
    assert windows[:, 2].max() == 4000 and windows[:, 3].max() == 200 and windows[:, :2].min() == 0
    with pytest.raises(ValueError, match="most=3: expected at least 4, one window of each size"):
        Grid(scales=[0.14, 0.21, 0.31, 0.46], most=3)


def test_scales_must_be_positive():
    with pytest.raises(ValueError, match="all positive"):
        Grid(scales=[0.5, 0])
