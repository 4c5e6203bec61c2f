"""The operators as their sources define them, one slow loop each, sharing nothing with `ops`; and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from roi_quantization import ops

from .presets import AWKWARD, preset, random_boxes


def c_round(x: float) -> int:
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


def feature_map(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def pool_cells(features: Tensor, boxes: Tensor, bins: int, cells) -> Tensor:
    """The largest cell of each bin; `cells(low, high, p, size)` are the cells of bin p between two projected edges."""
    out = torch.zeros(len(boxes), features.shape[1], bins, bins, dtype=torch.float64)
    for k, (image, x1, y1, x2, y2) in enumerate(boxes.tolist()):
        for p in range(bins):
            for q in range(bins):
                rows, columns = cells(y1, y2, p, features.shape[2]), cells(x1, x2, q, features.shape[3])
                if rows and columns:
                    out[k, :, p, q] = features[int(image), :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].amax((1, 2))
    return out


def clipped(low: int, high: int, size: int) -> range:
    return range(min(max(low, 0), size), min(max(high, 0), size))


def test_roi_pool_is_caffes():
    def cells(low, high, p, size):
        start, end = c_round(low / 16), c_round(high / 16)
        extent = max(end - start + 1, 1)
        return clipped(start + math.floor(p * extent / 4), start + math.ceil((p + 1) * extent / 4), size)

    features, boxes = feature_map(2, 3, 8, 10), torch.cat([random_boxes(30, 2, 160, 128), AWKWARD])
    torch.testing.assert_close(ops.roi_pool(features, boxes, 4, 1 / 16), pool_cells(features, boxes, 4, cells))


def test_pool_floor_floors_edges_and_bin_size():
    def cells(low, high, p, size):
        start, end = math.floor(low / 16), math.floor(high / 16)
        bin_size = max(max(end - start, 1) // 3, 1)
        return clipped(start + p * bin_size, start + (p + 1) * bin_size, size)

    features, boxes = feature_map(2, 3, 8, 10), torch.cat([random_boxes(30, 2, 160, 128), AWKWARD])
    torch.testing.assert_close(preset("pool_floor")(features, boxes, 3, 1 / 16), pool_cells(features, boxes, 3, cells))


def test_pool_bins_quantizes_bins_alone():
    def cells(low, high, p, size):
        start, extent = low / 16, max((high - low) / 16, 1.0)
        return clipped(math.floor(start + p * extent / 3), math.ceil(start + (p + 1) * extent / 3), size)

    features, boxes = feature_map(2, 3, 8, 10), random_boxes(30, 2, 160, 128)
    torch.testing.assert_close(preset("pool_bins")(features, boxes, 3, 1 / 16), pool_cells(features, boxes, 3, cells))


def bilinear(feature: Tensor, y: float, x: float) -> Tensor:
    """Value at index coordinates inside the map."""
    top, left = min(int(y), feature.shape[1] - 1), min(int(x), feature.shape[2] - 1)
    bottom, right = min(top + 1, feature.shape[1] - 1), min(left + 1, feature.shape[2] - 1)
    v, h = y - top, x - left
    upper = (1 - h) * feature[:, top, left] + h * feature[:, top, right]
    lower = (1 - h) * feature[:, bottom, left] + h * feature[:, bottom, right]
    return (1 - v) * upper + v * lower


def test_warp_mnc_is_the_released_layer():
    """One sample at each bin's start, raw index coordinates, valid up to half a cell off the map, no `+ 1`."""
    features, boxes, bins = feature_map(2, 3, 8, 10), torch.cat([random_boxes(30, 2, 160, 128), AWKWARD[[0, 1, 3, 4, 5, 6, 8]]]), 4
    expected = torch.zeros(len(boxes), 3, bins, bins, dtype=torch.float64)
    height, width = 8, 10
    for k, (image, *edges) in enumerate(boxes.tolist()):
        x1, y1, x2, y2 = (c_round(e / 16) for e in edges)
        for p in range(bins):
            for q in range(bins):
                y, x = y1 + p * max(y2 - y1, 0) / bins, x1 + q * max(x2 - x1, 0) / bins
                if -0.5 <= y <= height - 0.5 and -0.5 <= x <= width - 0.5:
                    expected[k, :, p, q] = bilinear(features[int(image)], min(max(y, 0), height - 1), min(max(x, 0), width - 1))
    torch.testing.assert_close(preset("warp_mnc")(features, boxes, bins, 1 / 16), expected)


def test_warp_is_align_of_the_rounded_box():
    features, boxes = feature_map(2, 3, 8, 10), random_boxes(30, 2, 160, 128)
    rounded = boxes.clone()
    rounded[:, 1:] = torch.tensor([[c_round(e / 16) * 16.0 for e in box] for box in boxes[:, 1:].tolist()])
    for reduce in ("mean", "max"):
        warped = ops.roi_warp(features, boxes, 3, 1 / 16, reduce=reduce)
        torch.testing.assert_close(warped, ops.roi_align(features, rounded, 3, 1 / 16, 2, True, reduce))


def test_warp_gradient_is_the_chain_rule_of_the_paper():
    """`d/dx1 = s (1 - t) f_x` and `d/dx2 = s t f_x`, `t` the relative place of the sample in the box, straight through the rounding."""
    features = feature_map(1, 1, 12, 12)
    boxes = torch.tensor([[0, 18.0, 33.0, 131.0, 150.0]], dtype=torch.float64, requires_grad=True)  # rounds to 1, 2, 8, 9 cells: 7 by 7
    out = ops.roi_warp(features, boxes, 3, 1 / 16, sampling_ratio=1)
    out[0, 0, 1, 2].backward()
    t_y, t_x = 1.5 / 3, 2.5 / 3
    y, x = 2 + t_y * 7 - 0.5, 1 + t_x * 7 - 0.5
    step = 1e-6
    f_y = (bilinear(features[0], y + step, x) - bilinear(features[0], y - step, x)) / (2 * step)
    f_x = (bilinear(features[0], y, x + step) - bilinear(features[0], y, x - step)) / (2 * step)
    if y == int(y):  # a sample on a cell's centre takes the slope towards the next cell
        f_y = (bilinear(features[0], y + step, x) - bilinear(features[0], y, x)) / step
    expected = [(1 - t_x) * f_x, (1 - t_y) * f_y, t_x * f_x, t_y * f_y]
    assert boxes.grad[0, 1:].tolist() == pytest.approx([v.item() / 16 for v in expected], rel=1e-6)


def test_prroi_is_the_mean_of_the_interpolated_map():
    """Against a midpoint rule with 400 x 400 points a bin; the map is 0 beyond its outermost cells, reached over one cell."""
    features, bins, points = feature_map(1, 2, 5, 6), 2, 400
    padded = np.pad(features[0].numpy(), ((0, 0), (1, 1), (1, 1)))
    for x1, y1, x2, y2 in ((1.3, 0.4, 4.1, 3.9), (-2.0, -1.5, 7.5, 2.0), (2.0, 2.0, 2.25, 2.25)):
        expected = np.zeros((2, bins, bins))
        for p in range(bins):
            for q in range(bins):
                y = y1 + (p + (np.arange(points) + 0.5) / points) * (y2 - y1) / bins
                x = x1 + (q + (np.arange(points) + 0.5) / points) * (x2 - x1) / bins
                weights = [np.maximum(0, 1 - np.abs(v[:, None] - np.arange(-1, size + 1))).mean(0) for v, size in ((y, 5), (x, 6))]
                expected[:, p, q] = np.einsum("i,cij,j->c", weights[0], padded, weights[1])
        out = ops.prroi_pool(features, torch.tensor([[0, x1, y1, x2, y2]], dtype=torch.float64), bins)
        np.testing.assert_allclose(out[0].numpy(), expected, atol=2e-5)


class TestAgainstTorchvision:
    """Values and gradients; the boxes of a real detector, and the ones that break detectors."""

    @staticmethod
    def same(ours, theirs, dtype, atol, scale=1 / 16):
        features, boxes = feature_map(2, 5, 9, 11).to(dtype), torch.cat([random_boxes(60, 2, 176, 144), AWKWARD]).to(dtype)
        results = []
        for operator in (ours, theirs):
            x = features.clone().requires_grad_()
            out = operator(x, boxes, scale)
            (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
            results.append((out.detach(), x.grad))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=atol, atol=atol)

    @pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 0), (torch.float64, 0)])
    @pytest.mark.parametrize("output_size", [1, 3, 7, (2, 5)], ids=str)
    def test_roi_pool(self, output_size, dtype, atol):
        self.same(
            lambda f, b, s: ops.roi_pool(f, b, output_size, s), lambda f, b, s: torchvision.ops.roi_pool(f, b, output_size, s), dtype, atol
        )

    @pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
    @pytest.mark.parametrize("aligned", [False, True])
    @pytest.mark.parametrize("sampling_ratio", [1, 2, 3])
    @pytest.mark.parametrize("output_size", [1, 7, (2, 5)], ids=str)
    def test_roi_align(self, output_size, sampling_ratio, aligned, dtype, atol):
        def call(library):
            return lambda f, b, s: library.roi_align(f, b, output_size, s, sampling_ratio, aligned)

        self.same(call(ops), call(torchvision.ops), dtype, atol)

    @pytest.mark.parametrize("aligned", [False, True])
    def test_roi_align_adaptive(self, aligned):
        def call(library):  # the defaults of both
            return lambda f, b, s: library.roi_align(f, b, 7, s, aligned=aligned)

        self.same(call(ops), call(torchvision.ops), torch.float64, 1e-9)

    @pytest.mark.parametrize("width", [57, 114, 121])
    def test_roi_pool_where_float32_makes_the_last_bin_a_cell_longer(self, width):
        features = torch.arange(200.0).expand(1, 1, 1, 200)
        boxes = torch.tensor([[0.0, 0.0, 0.0, width - 1.0, 0.0]])
        assert torch.equal(ops.roi_pool(features, boxes, (1, 7)), torchvision.ops.roi_pool(features, boxes, (1, 7)))
        assert ops.roi_pool(features, boxes, (1, 7))[0, 0, 0, -1] == width  # cell `width` is outside a RoI of cells 0 to width - 1

    def test_a_sample_exactly_on_the_border(self):
        """Its position has to be rounded as torchvision rounds it, or it is a cell's value in one library and 0 in the other."""
        ones, box = torch.ones(1, 1, 38, 50), torch.tensor([[0.0, 601, 598, 788, 598]])
        ours, theirs = (library.roi_align(ones, box, 14, 1 / 16, 2, True) for library in (ops, torchvision.ops))
        assert torch.equal(ours, theirs)
        assert ours[0, 0, 0].tolist() == [1] * 14

    @pytest.mark.parametrize("aligned", [False, True])
    @pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3, 5, 20])
    @pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
    def test_the_same_samples_are_visited(self, sampling_ratio, aligned, dtype):
        """On a map of ones a bin is the share of its samples that are on the map. Integer boxes have many samples on the border."""
        generator = torch.Generator().manual_seed(sampling_ratio)
        ones = torch.ones(1, 1, 38, 50, dtype=dtype)
        for scale, bins, step in ((1 / 16, 14, 1.0), (1 / 32, 7, 0.5), (0.3, (3, 5), 1.0)):
            low = torch.randint(-300, 1000, (1500, 2), generator=generator)
            extent = torch.randint(-200, 1000, (1500, 2), generator=generator)
            extent[::3] = torch.randint(0, 50, (500, 2), generator=generator)  # small, or without extent
            if sampling_ratio == 0:
                extent = extent.clamp(min=0)  # torchvision breaks off where a box is reversed along both axes
            boxes = torch.cat([torch.zeros(1500, 1), low * step, (low + extent) * step], 1).to(dtype)
            ours, theirs = (library.roi_align(ones, boxes, bins, scale, sampling_ratio, aligned) for library in (ops, torchvision.ops))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_modules_take_the_same_arguments(self):
        features, boxes = feature_map(1, 2, 8, 8), random_boxes(4, 1, 128, 128)
        for name, arguments in (("RoIPool", (3, 1 / 16)), ("RoIAlign", (3, 1 / 16, 2, True)), ("RoIAlign", (3, 1 / 16, -1))):
            ours, theirs = getattr(ops, name)(*arguments), getattr(torchvision.ops, name)(*arguments)
            torch.testing.assert_close(ours(features, boxes), theirs(features, boxes))
        assert repr(ops.RoIWarp(7, 0.0625)) == ("RoIWarp(output_size=7, spatial_scale=0.0625, sampling_ratio=2, aligned=True, reduce=mean)")
        torch.testing.assert_close(ops.RoIWarp(3, 1 / 16)(features, boxes), ops.roi_warp(features, boxes, 3, 1 / 16))
        torch.testing.assert_close(ops.PrRoIPool(3, 1 / 16)(features, boxes), ops.prroi_pool(features, boxes, 3, 1 / 16))


def test_keywords_are_torchvisions():
    features, boxes = feature_map(1, 2, 8, 8), random_boxes(4, 1, 128, 128)
    for library in (ops, torchvision.ops):
        call = {"input": features, "boxes": boxes, "output_size": 3, "spatial_scale": 1 / 16}
        assert torch.equal(library.roi_pool(**call), library.RoIPool(3, 1 / 16)(input=features, rois=boxes))
        aligned = library.roi_align(**call, sampling_ratio=2, aligned=True)
        assert torch.equal(aligned, library.RoIAlign(3, 1 / 16, 2, True)(input=features, rois=boxes))


@pytest.mark.parametrize("module", [ops.RoIPool(3, 1 / 16), ops.RoIAlign(3, 1 / 16, 2), ops.RoIWarp(3, 1 / 16), ops.PrRoIPool(3, 1 / 16)])
def test_every_attribute_of_a_module_can_be_read_and_set(module):
    others = {"output_size": (2, 5), "spatial_scale": 1 / 32, "sampling_ratio": 1, "aligned": None, "reduce": "max", "half_pixel": True}
    names = [name for name in others if hasattr(module, name)]
    assert set(names) == {name for name in vars(module) if name != "training" and not name.startswith("_")}
    features, boxes = feature_map(1, 2, 8, 8), random_boxes(4, 1, 128, 128)
    for name in names:
        before = module(features, boxes)
        setattr(module, name, not module.aligned if name == "aligned" else others[name])
        after = module(features, boxes)
        assert before.shape != after.shape or not torch.equal(before, after), name
        assert f"{name}={getattr(module, name)}" in repr(module)


@pytest.mark.parametrize("size", [np.int64(3), (np.int32(3), 3), torch.Size([3, 3]), [3, 3]], ids=repr)
def test_output_size_is_any_integer_or_two(size):
    features, boxes = feature_map(1, 2, 8, 8), random_boxes(4, 1, 128, 128)
    assert torch.equal(ops.roi_align(features, boxes, size, 1 / 16), ops.roi_align(features, boxes, 3, 1 / 16))


class TestByHand:
    """`f(y, x) = 5 y + x` on 5 x 5 cells: bilinear interpolation is exact, so a bin's mean is the value at its middle."""

    features = torch.arange(25.0).view(1, 1, 5, 5)
    box = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])

    def test_align_with_and_without_the_half_pixel(self):
        # bins of 0.5 cells; the first middle is at 1.25, less half a pixel 0.75: 5 * 0.75 + 0.75 = 4.5
        rows = [[4.5, 5.0, 5.5, 6.0], [7.0, 7.5, 8.0, 8.5], [9.5, 10.0, 10.5, 11.0], [12.0, 12.5, 13.0, 13.5]]
        assert ops.roi_align(self.features, self.box, 4, 1.0, 0, True)[0, 0].tolist() == rows
        # without it 3 more: half a row and half a column
        assert ops.roi_align(self.features, self.box, 4, 1.0, 0, False)[0, 0].tolist() == [[v + 3 for v in row] for row in rows]

    def test_align_max_takes_the_largest_interpolated_sample(self):
        # one bin of 2 cells: samples at 1.5 and 2.5, less half a pixel 1 and 2; the largest is at (2, 2)
        assert ops.roi_align(self.features, self.box, 1, 1.0, 2, True, "max").item() == 12
        assert ops.roi_align(self.features, self.box, 1, 1.0, 2, True).item() == 9

    def test_pool_takes_the_largest_cell_of_the_inclusive_roi(self):
        assert ops.roi_pool(self.features, self.box, 1).item() == 18  # rows and columns 1 to 3
        assert ops.roi_pool(self.features, self.box, 3)[0, 0].tolist() == [[6, 7, 8], [11, 12, 13], [16, 17, 18]]

    def test_prroi_integrates(self):
        assert ops.prroi_pool(self.features, self.box, 1).item() == 12  # the mean over [1, 3]^2 is the value at 2, 2
        # x from -1 to 0 lies off the map, where column 0 (f = 5 y) still reaches with half its weight; the mean of 5 y over [0, 1] is 2.5
        assert ops.prroi_pool(self.features, torch.tensor([[0.0, -1.0, 0.0, 0.0, 1.0]]), 1).item() == 1.25

    def test_a_box_off_the_map_is_zero_and_counts_off_the_map_samples_as_zero(self):
        assert ops.roi_align(self.features + 1, torch.tensor([[0.0, -9.0, -9.0, -4.0, -4.0]]), 2, 1.0, 2, True).abs().sum() == 0
        # two samples in x at -1.75 and 0.25 of a 1 x 1 bin, one worth 0: half of row 0's value there
        half = ops.roi_align(torch.ones(1, 1, 5, 5), torch.tensor([[0.0, -2.25, 1.0, 1.75, 2.0]]), 1, 1.0, 2, True)
        assert half.item() == 0.5

    def test_a_maximum_with_a_sample_off_the_map_is_zero_at_least(self):
        box = torch.tensor([[0.0, -2.25, 1.0, 1.75, 2.0]])
        assert ops.roi_align(-torch.ones(1, 1, 5, 5), box, 1, 1.0, 2, True, "max").item() == 0

    def test_resize_equivariance(self):
        """RoIAlign of a linear map is the map sampled at the bins' middles, whatever the scale; RoIPool is not."""
        fine = torch.arange(64.0).expand(1, 1, 64, 64)
        coarse = fine[..., 3::8, 3::8] + 0.5  # cell i of the coarse map sits at pixel 8 i + 4, whose value in the fine one is 8 i + 3.5
        box = torch.tensor([[0.0, 13.0, 13.0, 47.0, 47.0]])
        assert torch.allclose(ops.roi_align(coarse[:, :, :8], box, 4, 1 / 8, 2, True), ops.roi_align(fine, box, 4, 1.0, 2, True))
        assert not torch.allclose(ops.roi_warp(coarse[:, :, :8], box, 4, 1 / 8), ops.roi_warp(fine, box, 4, 1.0), atol=1)
