"""What operators read, held against numbers worked out by hand, and against the operators themselves."""

import pytest
import torch
from torchvision.ops import box_iou, roi_align

from roi_quantization import ops
from roi_quantization.detection.alignment.misalignment import (
    dead_zone,
    feature_map_size,
    format_summary,
    misalignment,
    sampled_region,
    summarize,
)
from tests.ops.presets import preset

BOX = torch.tensor([[296.0, 192.0, 496.0, 337.0]])  # 6.25 x 4.53 cells of 32 pixels at (9.25, 6)
TRUE_CELLS = 200 * 145 / 32**2


def boxes_inside(width, height, count=200, seed=0):
    u = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    low = u[:, :2] * torch.tensor([width - 20.0, height - 20.0])
    return torch.cat([low, low + 8 + u[:, 2:] * (torch.tensor([width, height]) - low - 8)], 1)


@pytest.mark.parametrize(
    ("name", "knobs", "bins", "size", "cells", "lost", "gained", "iou"),
    [
        ("pool_floor", {}, 1, 512, 24, 5.32, 1.00, 0.784),  # floor alone: with one bin nothing is truncated
        ("pool_floor", {}, 3, 512, 18, 11.07, 0.75, 0.593),  # 3 bins of 4.53 -> 4 rows have one row each, and one is left over
        ("pool", {}, 3, 512, 42, 0.00, 13.68, 0.674),  # rounded: columns 9 to 16, rows 6 to 11; the map ends with column 15
        ("pool", {}, 3, 1024, 48, 0.00, 19.68, 28.32 / 48),  # a wider map has column 16
        ("pool", {"inclusive_end": False}, 3, 512, 35, 0.00, 6.68, 28.32 / 35),
        ("warp", {}, 3, 512, 35, 0.00, 6.68, 28.32 / 35),  # the rounded box, 9 to 16 and 6 to 11, and all of it
        ("align", {}, 3, 512, TRUE_CELLS, 0.00, 0.00, 1.0),
        ("align_max", {}, 7, 512, TRUE_CELLS, 0.00, 0.00, 1.0),
    ],
)
def test_the_worked_box(name, knobs, bins, size, cells, lost, gained, iou):
    operator = preset(name, **knobs)
    m = misalignment(operator, BOX, (512, size), 32, bins)
    x1, y1, x2, y2 = (sampled_region(operator, BOX, (512, size), 32, bins).extent[0] / 32).tolist()
    assert (x2 - x1) * (y2 - y1) == pytest.approx(cells, rel=1e-5)
    assert m.lost.item() * TRUE_CELLS == pytest.approx(lost, abs=0.006)
    assert m.gained.item() * TRUE_CELLS == pytest.approx(gained, abs=0.006)
    assert m.iou.item() == pytest.approx(iou, abs=0.0006)


def test_665_pixels_are_seen_as_14_of_20_78_cells():
    m = misalignment(preset("pool_floor"), torch.tensor([[0.0, 0.0, 665.0, 665.0]]), (800, 800), 32, 7)
    assert 1 - m.lost.item() == pytest.approx(0.454, abs=0.0005)
    assert m.gained.item() == 0
    assert m.shift.tolist() == [[pytest.approx((14 * 32 - 665) / 2)] * 2]


@pytest.mark.parametrize("name", ["align", "align_max"])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
def test_align_reads_the_box(name, sampling_ratio):
    m = misalignment(preset(name, sampling_ratio=sampling_ratio), boxes_inside(640, 480), (480, 640), 16)
    assert m.iou.min() > 1 - 1e-4 and m.bin_iou.min() > 1 - 1e-3, "but for the last bits of float32"
    assert m.shift.abs().max() < 1e-3


@pytest.mark.parametrize(("name", "knobs"), [("align", {"half_pixel": False}), ("prroi", {})])
def test_without_the_half_pixel_the_box_is_read_half_a_cell_down_right(name, knobs):
    boxes = boxes_inside(640, 480)
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) >= 16).all(1)]  # smaller ones become a cell wide in align, as in torchvision
    m = misalignment(preset(name, **knobs), boxes, (480, 640), 16)
    assert (m.shift - 8).abs().max() < 1e-3
    assert torch.allclose(m.lost, m.gained, atol=1e-4), "moved, not resized"
    assert (misalignment(preset("prroi", half_pixel=True), boxes, (480, 640), 16).iou > 1 - 1e-4).all()


def test_the_mnc_layer_reads_from_the_start_of_its_bins():
    # [0, 64) is 4 cells in 2 bins: samples at index 0 and 2, that is at 0.5 and 2.5, each for a step of 2: -0.5 to 3.5
    assert sampled_region(preset("warp_mnc"), torch.tensor([[0.0, 0.0, 64.0, 64.0]]), (128, 128), 16, 2).extent.tolist() == [
        [-8, -8, 56, 56]
    ]


def test_bins_can_be_misread_where_the_box_is_not():
    # 3 cells in 2 bins: floor and ceil give both of them the middle cell; a bin of 1.5 x 1.5 reads 2 x 2
    m = misalignment(preset("pool_bins"), torch.tensor([[0.0, 0.0, 48.0, 48.0]]), (128, 128), 16, 2)
    assert m.iou.item() == 1
    assert m.bin_iou.item() == pytest.approx(1.5**2 / 2**2)


@pytest.mark.parametrize(
    ("name", "bins", "x", "y"),
    [
        ("align", 7, 0, 0),
        ("prroi", 7, 0, 0),
        # x from 20 to 100, 1.25 to 6.25 cells: rounding changes at 8 and 24 (half cells), 12 to the left of 20 and 4 to the right; and at
        # 88 and 104, 12 and 4 from 100. y from 20 to 105: the lower end, 6.56, falls to 6 after 1 already.
        ("warp", 7, 12 + 4, 1 + 4),
        ("pool", 7, 12 + 4, 1 + 4),
        # x: floor and ceil change at whole cells, 4 to the left and 12 to the right of both ends. y: 105 is 9 past 96 and 7 before 112
        ("pool_bins", 1, 4 + 12, 4 + 7),
        # with two bins their common edge, at 60 and 62.5, steps over 48 and 64 too
        ("pool_bins", 2, 4 + 4, 4 + 1.5),
    ],
)
def test_slack_is_how_far_a_box_moves_unseen(name, bins, x, y):
    found = dead_zone(preset(name), torch.tensor([[20.0, 20.0, 100.0, 105.0]]), (512, 512), 16, bins, steps=128)
    assert found.tolist() == [[x, y]]


def test_a_box_off_the_map_is_not_read():
    away = torch.tensor([[400.0, 0.0, 500.0, 50.0]])
    for name in ("align", "pool"):
        m = misalignment(preset(name), away, (128, 128), 16)
        assert (m.iou.item(), m.lost.item(), m.gained.item(), m.bin_iou.item()) == (0, 1, 0, 0)
        assert m.shift.isnan().all()
        assert sampled_region(preset(name), away, (128, 128), 16).cells[0, ::2].tolist() == [0, 0]


def test_iou_is_torchvisions():
    boxes = boxes_inside(300, 200)
    for name in ("pool", "warp", "pool_floor"):
        extent = sampled_region(preset(name), boxes, (200, 300), 16).extent
        assert torch.allclose(misalignment(preset(name), boxes, (200, 300), 16).iou, box_iou(boxes.double(), extent).diagonal())


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("align", {}), ("align", {"half_pixel": False}), ("warp", {}), ("warp_mnc", {}), ("prroi", {}), ("prroi", {"half_pixel": True})],
)
def test_the_centre_of_what_is_read_is_what_the_operator_returns_of_a_ramp(name, knobs):
    """On a map whose cells hold the place of their centre the operator itself tells where it samples."""
    boxes = torch.tensor([[70.0, 50.0, 190.0, 130.0], [81.0, 66.0, 141.0, 177.0]])
    x = (torch.arange(20.0) + 0.5).expand(16, 20) * 16
    y = (torch.arange(16.0) + 0.5)[:, None].expand(16, 20) * 16
    operator = preset(name, **knobs)
    looked = operator(torch.stack([x, y])[None], [boxes], 7, 1 / 16).mean((2, 3))
    shift = misalignment(operator, boxes, (256, 320), 16).shift
    assert torch.allclose(looked.double(), (boxes[:, :2] + boxes[:, 2:]).double() / 2 + shift, atol=1e-2)


@pytest.mark.parametrize("name", ["pool", "pool_floor", "pool_bins", "warp", "warp_mnc", "align", "prroi"])
def test_cells_are_those_that_the_output_depends_on(name):
    knobs = {} if name == "prroi" else {"reduce": "mean"}  # of a maximum only the largest would be seen
    for box in boxes_inside(160, 128, count=12).unbind():
        features = torch.zeros(1, 1, 8, 10, dtype=torch.float64, requires_grad=True)
        operator = preset(name, **knobs)
        operator(features, [box[None].double()], 3, 1 / 16).sum().backward()
        rows, columns = features.grad[0, 0].abs().gt(1e-9).nonzero().T
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert sampled_region(operator, box[None], (128, 160), 16, 3).cells[0].tolist() == [int(e) for e in expected]


def test_the_map_of_an_image_that_is_no_multiple_of_the_stride_is_padded():
    assert feature_map_size((481, 640), 32) == (16, 20)


def test_a_summary_by_stride_and_size():
    operators = {"align": preset("align"), "pool": preset("pool")}
    small, large = torch.tensor([[16.0, 16.0, 32.0, 32.0]]), torch.tensor([[0.0, 0.0, 112.0, 112.0]])
    rows = summarize(operators, [(small, (128, 128)), (large, (128, 128)), (small, (256, 256))], strides=(16,), output_size=1)
    by = {(row["operator"], row["size"]): row for row in rows}
    assert [row["boxes"] for row in rows if row["operator"] == "pool"] == [3, 2, 1] and ("pool", "medium") not in by
    # Caffe's + 1: one cell is read as 2 x 2, 7 as 8
    assert (by["pool", "small"]["iou"], by["pool", "small"]["gained"], by["pool", "small"]["shift_x"]) == (0.25, 300, 8)
    assert by["pool", "large"]["iou"] == 49 / 64
    assert by["pool", "all"]["iou"] == pytest.approx((0.25 * 2 + 49 / 64) / 3)
    assert by["pool", "all"]["distance"] == pytest.approx(8 * 2**0.5)
    table = format_summary(rows).splitlines()
    assert len(table) == 1 + 6 and all(len(line) <= 100 for line in table)
    assert table[1].split() == ["16", "all", "3", "align", "1.000", "1.000", "0.0", "0.0", "+0.0", "+0.0", "0.0", "0.0"]


def test_a_large_data_set_is_judged_by_some_of_its_boxes():
    boxes = boxes_inside(256, 256, count=3000)
    all_of_them, some = (summarize({"warp": preset("warp")}, [(boxes, (256, 256))], (16,), most=most)[0] for most in (3000, 1000))
    assert (all_of_them["boxes"], some["boxes"]) == (3000, 1000)
    assert all_of_them["iou"] != some["iou"] == pytest.approx(all_of_them["iou"], abs=0.02)


def test_a_foreign_operator_and_a_box_without_area_are_refused():
    with pytest.raises(TypeError, match=r"where this operator samples is not known. Choose one of configs/roi"):
        misalignment(roi_align, BOX, (512, 512), 32)
    with pytest.raises(ValueError, match=r"^Box 1 is \[5.0, 0.0, 5.0, 9.0\]: expected x1 < x2"):
        misalignment(ops.lattice_pool, torch.tensor([[0.0, 0, 9, 9], [5, 0, 5, 9]]), (512, 512), 32)
