"""Where the operators look: the worked numbers, rounding, and the traps of float32."""

import pytest
import torch

from roi_quantization.ops.geometry import IntegralRule, LatticeRule, divide_in_double, round_half_away

POOL = LatticeRule(quantize_roi="round", inclusive_end=True, half_pixel=False, quantize_bins="cover")
POOL_FLOOR = LatticeRule(quantize_roi="floor", half_pixel=False, quantize_bins="truncate")
ALIGN = LatticeRule()


def axis(rule: LatticeRule, low: float, high: float, scale: float, bins: int, size: int, dtype=torch.float32):
    """First, step and count of one RoI's bins, as plain lists."""
    a = rule.axis(torch.tensor([low], dtype=dtype), torch.tensor([high], dtype=dtype), scale, bins, size)
    return a.first[0].tolist(), a.step[0].tolist(), a.visited[0].tolist()


def cells(rule: LatticeRule, low: float, high: float, scale: float, bins: int, size: int) -> list[range]:
    """The cells that each quantized bin visits."""
    first, _, count = axis(rule, low, high, scale, bins, size)
    return [range(int(f), int(f) + c) for f, c in zip(first, count, strict=True)]


def test_rounding_takes_halves_away_from_zero():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 2.4999998, -0.49999997, 3.0])
    assert round_half_away(x).tolist() == [1, 2, 3, -1, -2, 0, 2, 0, 3]


class TestWorkedNumbers:
    """Box x=296, y=192, w=200, h=145 on a 16 x 16 map at stride 32: 6.25 x 4.53 cells at (9.25, 6)."""

    def test_floor_takes_6_by_4_cells_at_9_6(self):
        whole = LatticeRule(quantize_roi="floor", half_pixel=False, quantize_bins="cover")
        assert cells(whole, 296, 496, 1 / 32, 1, 16) == [range(9, 15)]
        assert cells(whole, 192, 337, 1 / 32, 1, 16) == [range(6, 10)]

    def test_truncated_bins_keep_6_by_3_of_them(self):
        assert cells(POOL_FLOOR, 296, 496, 1 / 32, 3, 16) == [range(9, 11), range(11, 13), range(13, 15)]
        assert cells(POOL_FLOOR, 192, 337, 1 / 32, 3, 16) == [range(6, 7), range(7, 8), range(8, 9)]

    def test_floor_keeps_24_cells_and_iou_0_784_truncation_18_and_0_593(self):
        true_w, true_h = 200 / 32, 145 / 32
        true_area = true_w * true_h
        assert true_area == pytest.approx(28.32, abs=0.005)
        for bins, columns, rows, lost, gained, iou in ((1, 6, 4, 5.32, 1.00, 0.784), (3, 6, 3, 11.07, 0.75, 0.593)):
            rule = LatticeRule(quantize_roi="floor", half_pixel=False, quantize_bins="truncate")
            x, y = cells(rule, 296, 496, 1 / 32, bins, 16), cells(rule, 192, 337, 1 / 32, bins, 16)
            assert (x[-1].stop - x[0].start, y[-1].stop - y[0].start) == (columns, rows)
            kept = (min(x[-1].stop, 15.5) - max(x[0].start, 9.25)) * (min(y[-1].stop, 10.53125) - max(y[0].start, 6))
            assert true_area - kept == pytest.approx(lost, abs=0.006)
            assert columns * rows - kept == pytest.approx(gained, abs=0.006)
            assert kept / (true_area + columns * rows - kept) == pytest.approx(iou, abs=0.0006)

    def test_caffe_uses_42_cells_and_loses_nothing(self):
        x, y = cells(POOL, 296, 496, 1 / 32, 1, 16), cells(POOL, 192, 337, 1 / 32, 1, 16)
        assert (x, y) == ([range(9, 16)], [range(6, 12)])
        assert len(x[0]) * len(y[0]) == 42
        assert 42 - 28.32 == pytest.approx(13.68)
        assert 28.32 / 42 == pytest.approx(0.674, abs=0.0005)

    def test_caffe_takes_column_16_as_well_on_a_wider_map(self):
        # 296 / 32 = 9.25 -> 9; 496 / 32 = 15.5 -> 16, and Caffe's end is inclusive
        assert cells(POOL, 296, 496, 1 / 32, 1, 32) == [range(9, 17)]

    def test_a_665_pixel_box_is_20_78_cells_floored_to_20_seen_as_14(self):
        assert 665 / 32 == pytest.approx(20.78, abs=0.005)
        bins = cells(POOL_FLOOR, 0, 665, 1 / 32, 7, 25)
        assert [len(b) for b in bins] == [2] * 7
        assert (bins[-1].stop / (665 / 32)) ** 2 == pytest.approx(0.454, abs=0.0005)

    def test_unquantized_bins_are_2_97_cells_with_samples_at_a_quarter_and_three_quarters(self):
        first, step, count = axis(ALIGN, 0, 665, 1 / 32, 7, 25)
        bin_size = 665 / 32 / 7
        assert bin_size == pytest.approx(2.97, abs=0.005)
        assert count == [2] * 7
        assert first == pytest.approx([(p + 0.25) * bin_size - 0.5 for p in range(7)], abs=1e-5)
        assert step == pytest.approx([bin_size / 2] * 7, abs=1e-6)


class TestTrapsOfFloat32:
    @pytest.mark.parametrize("width", [57, 114, 121])
    def test_seven_sevenths_of_a_width_can_exceed_it(self, width):
        """`7 * (w / 7) > w` in float32: the last bin reads one cell more, and agreement with torchvision is the rule."""
        last = cells(POOL, 0, width - 1, 1.0, 7, 1000)[-1]
        assert last.stop == width + 1

    def test_not_so_for_most_widths(self):
        assert cells(POOL, 0, 55, 1.0, 7, 1000)[-1].stop == 56


def test_quantized_bins_of_an_exact_box_start_from_its_fraction():
    # 2.5 to 5.5 in 2 bins: [2.5, 4) and [4, 5.5) cover cells 2-3 and 4-5
    rule = LatticeRule(half_pixel=False, quantize_bins="cover")
    assert cells(rule, 2.5, 5.5, 1.0, 2, 10) == [range(2, 4), range(4, 6)]


def test_truncated_bins_have_one_cell_at_least():
    assert cells(POOL_FLOOR, 2, 5, 1.0, 4, 10) == [range(2, 3), range(3, 4), range(4, 5), range(5, 6)]


def test_bins_are_clipped_to_the_map():
    # cells -3 to 20 in bins of 12: [-3, 9) and [9, 21) of a map of 8
    assert cells(POOL, -3, 20, 1.0, 2, 8) == [range(0, 8), range(8, 8)]


def test_extent_is_one_cell_at_least_without_half_pixel_and_free_with_it():
    assert axis(LatticeRule(half_pixel=False, sampling_ratio=1), 4, 4, 1.0, 2, 10)[0] == [4.25, 4.75]
    assert axis(LatticeRule(half_pixel=True, sampling_ratio=1), 4, 4, 1.0, 2, 10)[0] == [3.5, 3.5]
    assert axis(LatticeRule(half_pixel=False, min_extent=0.0, sampling_ratio=1), 4, 4, 1.0, 2, 10)[0] == [4.0, 4.0]


def test_adaptive_sampling_takes_the_ceil_of_the_bin_size_and_nothing_of_an_empty_box():
    rule = LatticeRule(sampling_ratio=0)
    assert axis(rule, 0, 9, 1.0, 4, 20)[2] == [3] * 4
    assert axis(rule, 5, 5, 1.0, 4, 20)[2] == [0] * 4
    assert axis(rule, 9, 5, 1.0, 4, 20)[2] == [0] * 4


class TestSamplesOffTheMap:
    def test_samples_more_than_one_cell_out_are_not_visited_but_count(self):
        # samples of the only bin at -2, -1, 0, 1 in index coordinates; -1 is just on the border
        rule = LatticeRule(sampling_ratio=4, half_pixel=False)
        a = rule.axis(torch.tensor([-2.5]), torch.tensor([1.5]), 1.0, 1, 10)
        assert (a.first.item(), a.step.item(), a.visited.item(), a.total.item()) == (-1, 1, 3, 4)

    def test_a_reversed_box_is_sampled_backwards(self):
        # width -4 from 2: samples at 1.5 - 0.5, 0.5 - 0.5, ... = 1, 0, -1, -2; the last is off
        a = LatticeRule(sampling_ratio=4).axis(torch.tensor([2.0]), torch.tensor([-2.0]), 1.0, 1, 10)
        assert (a.first.item(), a.step.item(), a.visited.item(), a.total.item()) == (1, -1, 3, 4)

    def test_an_adaptive_lattice_over_a_huge_box_stays_finite(self):
        a = LatticeRule(sampling_ratio=0).axis(torch.tensor([-1e30, -1e7]), torch.tensor([1e30, 1e7]), 1.0, 2, 10)
        assert a.visited.max() <= 24
        assert a.total[1].tolist() == [1e7, 1e7]

    @pytest.mark.parametrize("rule", [POOL, POOL_FLOOR, ALIGN, LatticeRule(sampling_ratio=0), LatticeRule(sampling_ratio=0, border=3)])
    def test_no_bin_visits_more_samples_than_the_rule_says(self, rule):
        low = -40 + 100 * torch.rand(2000, generator=torch.Generator().manual_seed(0))
        high = low + 200 * torch.rand(2000, generator=torch.Generator().manual_seed(1)) ** 4
        for bins in (1, 2, 7):
            assert rule.axis(low, high, 1.0, bins, 11).visited.max() <= rule.most_samples(11)

    def test_a_box_without_extent_keeps_all_its_equal_samples(self):
        for x, count in ((9.75, 2), (10.5, 2), (10.75, 0), (-0.5, 2), (-0.75, 0)):  # valid from -1 to 10 in index coordinates
            assert LatticeRule().axis(torch.tensor([x]), torch.tensor([x]), 1.0, 1, 10).visited.item() == count


def test_rounding_passes_the_gradient_straight_through():
    x1, x2 = torch.tensor([3.3], requires_grad=True), torch.tensor([11.4], requires_grad=True)
    a = LatticeRule(quantize_roi="round", sampling_ratio=1).axis(x1, x2, 0.5, 2, 20)
    assert a.first.tolist() == [[2.5, 4.5]]  # 1.65 -> 2, 5.7 -> 6; bin centres 3 and 5, half a pixel less
    a.first[0, 1].backward()
    assert (x1.grad.item(), x2.grad.item()) == pytest.approx((0.5 * 0.25, 0.5 * 0.75))  # s (1 - t) and s t at t = 3/4


def test_a_nan_box_has_one_nan_sample_in_each_bin():
    for rule in (POOL, POOL_FLOOR, ALIGN, LatticeRule(sampling_ratio=0)):
        a = rule.axis(torch.tensor([float("nan")]), torch.tensor([4.0]), 1.0, 2, 8)
        assert a.first.isnan().all() and a.visited.tolist() == [[1, 1]] and a.total.tolist() == [[1, 1]]


def test_the_bins_of_an_integral_tile_the_box():
    b = IntegralRule().axis(torch.tensor([8.0]), torch.tensor([32.0]), 1 / 8, 3, 10)
    assert (b.low.tolist(), b.high.tolist()) == ([[1, 2, 3]], [[2, 3, 4]])
    b = IntegralRule(half_pixel=True).axis(torch.tensor([8.0]), torch.tensor([4.0]), 1 / 8, 3, 10)
    assert b.low.tolist() == b.high.tolist() == [[0.5] * 3]


@pytest.mark.parametrize(("knob", "value"), [("quantize_roi", "ceil"), ("quantize_bins", "round")])
def test_an_unknown_choice_names_the_knob_and_the_choices(knob, value):
    with pytest.raises(ValueError, match=rf"{knob}='{value}': expected one of none, "):
        LatticeRule(**{knob: value})


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("border", [0.0, 1.0])
def test_a_box_without_extent_on_an_axis_of_one_cell_has_no_negative_number_of_samples(sampling_ratio, border):
    rule = LatticeRule(sampling_ratio=sampling_ratio, border=border, min_extent=0.0)
    a = rule.axis(torch.tensor([0.5, 0.25, 7.0]), torch.tensor([0.5, 0.25, 7.0]), 1.0, 3, 1)
    assert a.visited.min() >= 0
    on_the_map = [2, 2 if border else 0, 0] if sampling_ratio else [0, 0, 0]
    assert a.visited[:, 0].tolist() == on_the_map


def test_a_quotient_by_way_of_float64_is_the_quotient():
    """What a GPU divides by, against this CPU's own division, which rounds correctly: whole cells, any extent, any bins."""
    whole, any_extent = torch.arange(0.0, 2000), torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 2000
    for bins in range(1, 65):
        for extent in (whole, any_extent, any_extent.double()):
            assert torch.equal(divide_in_double(extent, bins), extent / bins)
    step = torch.tensor([0.0, -0.0, 3.0, float("nan")])
    assert torch.equal(divide_in_double(whole[1:5], step).nan_to_num(), (whole[1:5] / step).nan_to_num())
