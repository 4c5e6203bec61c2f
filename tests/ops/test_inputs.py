"""Errors name the argument, and come before anything is read."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from roi_quantization import ops
from roi_quantization.ops import eager
from roi_quantization.ops.geometry import LatticeRule
from roi_quantization.ops.inputs import mask_invalid_boxes, prepare

F = torch.zeros(2, 3, 4, 4)
BOX = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])
OPERATORS = [ops.roi_pool, ops.roi_align, ops.roi_warp, ops.prroi_pool, ops.lattice_pool]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.__name__)
@pytest.mark.parametrize(
    ("features", "boxes", "output_size", "error", "message"),
    [
        (F[0], BOX, 2, ValueError, r"input: expected 4 dimensions \[N, C, H, W\], got shape \(3, 4, 4\)"),
        (F.long(), BOX, 2, TypeError, r"input: expected a floating point tensor \[N, C, H, W\], got torch.int64"),
        (None, BOX, 2, TypeError, "input: expected .* got NoneType"),
        (F, BOX[:, 1:], 2, ValueError, r"boxes: a tensor must be \[K, 5\] .* got shape \(1, 4\)"),
        (F, BOX[0], 2, ValueError, r"boxes: a tensor must be \[K, 5\]"),
        (F, BOX.long(), 2, TypeError, "boxes: expected floating point coordinates, got torch.int64"),
        (F, [BOX[:, 1:]], 2, ValueError, "one tensor for each of the 2 images, got 1"),
        (F, [BOX[:, 1:], BOX], 2, ValueError, r"boxes\[1\]: expected shape \[L, 4\] \(x1, y1, x2, y2\), got \(1, 5\)"),
        (F, [BOX[:, 1:], None], 2, TypeError, r"boxes\[1\]: expected a floating point tensor"),
        (F, [BOX[:, 1:], BOX[:, 1:].double()], 2, ValueError, r"boxes\[1\] is torch.float64 on cpu, boxes\[0\] is torch.float32"),
        (F, BOX, 0, ValueError, "output_size: expected a positive int or two of them"),
        (F, BOX, (2, 2, 2), ValueError, "output_size"),
        (F, BOX.to("meta"), 2, ValueError, "boxes are on meta and input on cpu"),
        (F, torch.tensor([[0.0, 1, 1, 3, 3], [1, torch.nan, 1, 3, 3]]), 2, ValueError, r"box 1 is \[nan, 1.0, 3.0, 3.0\].*must be finite"),
        (F, torch.tensor([[0.0, 1, 1, torch.inf, 3]]), 2, ValueError, "box 0 .* must be finite"),
        (F, torch.tensor([[2.0, 1, 1, 3, 3]]), 2, ValueError, "belongs to image 2, and the input holds images 0 to 1"),
        (F, torch.tensor([[-1.0, 1, 1, 3, 3]]), 2, ValueError, "belongs to image -1"),
        (F, torch.tensor([[torch.nan, 1, 1, 3, 3]]), 2, ValueError, "belongs to image nan"),
        (F[..., :0], BOX, 2, ValueError, "has no cells to pool 1 boxes from"),
        (F[:0], BOX, 2, ValueError, "has no cells to pool 1 boxes from"),
    ],
)
def test_errors(operator, features, boxes, output_size, error, message):
    with pytest.raises(error, match=message):
        operator(features, boxes, output_size)


def test_an_unknown_reduction_names_the_choices():
    with pytest.raises(ValueError, match="reduce='median': expected one of mean, max"):
        ops.roi_align(F, BOX, 2, reduce="median")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"sampling_ratio": 2.5}, "sampling_ratio=2.5: expected a whole number"),
        ({"border": float("nan")}, "border=nan: expected a number from 0 to 268435456"),
        ({"border": float("inf")}, "border=inf: expected a number from 0 to 268435456"),
        ({"border": 1e30, "sampling_ratio": 0}, r"border=1e\+30: expected a number from 0 to 268435456"),
        ({"border": -1.0}, "border=-1.0: expected a number from 0 to 268435456"),
        ({"min_extent": -1.0}, "min_extent=-1.0: expected a number from 0 to 268435456"),
        ({"min_extent": float("inf")}, "min_extent=inf: expected a number from 0 to 268435456"),
        ({"sample_offset": float("nan")}, "sample_offset=nan: expected a number from -268435456 to 268435456"),
        ({"sample_offset": -float("inf")}, "sample_offset=-inf: expected a number from -268435456 to 268435456"),
        ({"sampling_ratio": None}, "sampling_ratio=None: expected a whole number of samples per bin along each axis, one number, or 0"),
        ({"sampling_ratio": (2, 2)}, r"sampling_ratio=\(2, 2\): expected a whole number of samples per bin along each axis, one number"),
        ({"sampling_ratio": float("inf")}, "sampling_ratio=inf: expected a whole number"),
        ({"sampling_ratio": "2"}, "sampling_ratio='2': expected a whole number"),
        ({"border": None}, "border=None: expected a number from 0"),
        ({"min_extent": (1, 1)}, r"min_extent=\(1, 1\): expected a number from 0"),
        ({"sample_offset": None}, "sample_offset=None: expected a number from -268435456"),
        ({"spatial_scale": (1 / 16, 1 / 16)}, r"spatial_scale=\(0.0625, 0.0625\): expected cells per pixel, .* one number for both axes"),
        ({"spatial_scale": "1/16"}, "spatial_scale='1/16': expected cells per pixel"),
        ({"spatial_scale": None}, "spatial_scale=None: expected cells per pixel"),
        ({"spatial_scale": torch.ones(2)}, r"spatial_scale=tensor\(\[1., 1.\]\): expected cells per pixel"),
        ({"spatial_scale": torch.tensor(0.5)}, r"spatial_scale=tensor\(0.5000\): expected cells per pixel, .* one number for both axes"),
        ({"spatial_scale": np.array([0.5])}, r"spatial_scale=array\(\[0.5\]\): expected cells per pixel"),
        ({"border": torch.tensor(1.0)}, r"border=tensor\(1.\): expected a number from 0"),
        ({"min_extent": torch.ones(1)}, r"min_extent=tensor\(\[1.\]\): expected a number from 0"),
        ({"sample_offset": np.array([0.5])}, r"sample_offset=array\(\[0.5\]\): expected a number from -268435456"),
        ({"spatial_scale": 0.0}, "spatial_scale=0.0: expected cells per pixel, above 0"),
        ({"spatial_scale": float("nan")}, "spatial_scale=nan: expected cells per pixel, above 0"),
    ],
)
def test_a_knob_out_of_its_range_is_named(knobs, message):
    with pytest.raises(ValueError, match=message):
        ops.lattice_pool(F, BOX, 2, **knobs)


@pytest.mark.parametrize("operator", [ops.roi_align, ops.roi_warp], ids=lambda o: o.__name__)
def test_a_ratio_of_two_is_named_by_each_operator_that_has_one(operator):
    with pytest.raises(ValueError, match=r"sampling_ratio=\(2, 2\): expected a whole number of samples per bin along each axis"):
        operator(F, BOX, 2, 1.0, (2, 2))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.__name__)
def test_boxes_of_1e18_cells_are_pooled_and_of_those_too_large_one_is_named(operator):
    box = torch.tensor([[0.0, -1, -1, 1, 1]])
    for size in (1e6, 1e18):
        assert operator(F + 1, box * size, 2).isfinite().all()
    with pytest.raises(ValueError, match=r"boxes: the bins of box 1 lie at positions that are infinite or NaN .* 1e18 cells"):
        operator(F, torch.cat([box, box * 3e38]), 2)


def test_an_adaptive_lattice_overflows_earlier():
    with pytest.raises(ValueError, match="the bins of box 0 lie at positions that are infinite"):
        ops.roi_align(F, torch.tensor([[0.0, -1e21, -1e21, 1e21, 1e21]]), 2)


@pytest.mark.parametrize("ratio", [2.0, np.float32(2), np.int64(2), torch.tensor(2.0)], ids=repr)
def test_a_whole_number_of_samples_is_an_integer_whatever_its_type(ratio):
    """An operator of PyTorch, such as places the bins on a GPU, takes no 2.0 for one."""
    rule = LatticeRule(sampling_ratio=ratio)
    assert type(rule.sampling_ratio) is int and rule == LatticeRule(sampling_ratio=2)
    with FakeTensorMode():
        features, boxes = torch.empty(2, 3, 8, 10, device="cuda"), torch.empty(4, 5, device="cuda")
        assert ops.roi_align(features, boxes, 2, 1.0, 2.0).shape == (4, 3, 2, 2)


@pytest.mark.parametrize("size", [np.array([3, 4]), torch.tensor([3, 4]), (np.int64(3), 4), [3, 4]], ids=lambda size: type(size).__name__)
def test_bins_may_be_in_an_array(size):
    assert ops.roi_align(F, BOX, size).shape == (1, 3, 3, 4)
    assert ops.RoIAlign(size, 1.0, 2)(F, BOX).shape == (1, 3, 3, 4)
    for one in (np.array(3), np.int64(3), torch.tensor(3)):
        assert ops.roi_align(F, BOX, one).shape == (1, 3, 3, 3)
    for wrong in (np.array([3.0, 4.0]), np.array([3, 4, 5]), torch.tensor([0, 4]), np.array([[3, 4]])):
        with pytest.raises(ValueError, match="output_size: expected a positive int or two of them"):
            ops.roi_align(F, BOX, wrong)


def test_on_other_devices_an_invalid_box_becomes_nan_and_reads_nothing_out_of_bounds():
    """Other devices do not check boxes, because that would wait for the device."""
    boxes = torch.tensor([[0.0, 1, 1, 3, 3], [0, torch.nan, 1, 3, 3], [7, 1, 1, 3, 3], [0, 1, 1, torch.inf, 3]])
    index, box, _ = prepare(F, boxes, 2, differentiable_boxes=True)
    image, box = mask_invalid_boxes(index, box, len(F))
    assert image.tolist() == [0, 0, 0, 0]
    assert box.isnan().all(1).tolist() == [False, True, True, True]
    for reduce in ("mean", "max"):
        rule = LatticeRule()
        out = eager.lattice_pool(F + 1, image, rule.axis(box[:, 1], box[:, 3], 1, 2, 4), rule.axis(box[:, 0], box[:, 2], 1, 2, 4), reduce)
        assert out.flatten(1).isnan().all(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize(("dtype", "index"), [(torch.bfloat16, 256), (torch.float16, 2048)], ids=str)
def test_the_last_image_of_more_than_a_narrow_dtype_can_count(dtype, index):
    """The number of images is one that the dtype of the boxes rounds down to the index."""
    features = torch.arange(index + 1.0)[:, None, None, None].expand(index + 1, 1, 4, 4)
    boxes = torch.tensor([[index, 0, 0, 4, 4], [index - 1, 0, 0, 4, 4]], dtype=dtype)
    assert ops.roi_align(features, boxes, 1).flatten().tolist() == [index, index - 1]
