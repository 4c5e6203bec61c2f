"""The Triton kernels against the oracle: on the GPU where there is one, under Triton's interpreter where there is none."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from roi_quantization.ops import functional, library
from roi_quantization.ops.cuda import kernels as cuda

from .presets import AWKWARD, preset, random_boxes
from .test_against_reference import assert_same, feature_map, has_box_gradient, in_ci, oracle, results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUDGE = torch.tensor([0, 0.013, 0.017, 0.019, 0.023])  # off the kinks of the interpolated map: see test_against_reference
ONE_OF_EACH = [pytest.param(preset(name), id=name) for name in ("align", "align_max", "pool", "prroi")]


def slow(*values: object) -> object:
    """Under the interpreter a kernel takes seconds; what a cheaper case shows as well is left to a run of all tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(library, "kernels", lambda device: cuda)


def on_device(operator, features, boxes, *args):
    return results(operator, features.to(DEVICE), boxes.to(DEVICE), *args)


def assert_equals_oracle(operator, features, boxes, output_size, box_gradient=False, rtol=1e-5, atol=1e-5):
    args = boxes, output_size, 1 / 16, box_gradient
    wide = features.float()  # the oracle reads the same rounded features, in float64, with lattices in the float32 that the kernels have
    assert_same(on_device(operator, features, *args), results(partial(oracle, operator), wide, *args), rtol, atol)


@pytest.mark.parametrize("operator", in_ci("align", "align_max", "pool", "prroi", "align-adaptive", "pool-mean"))
def test_output_and_gradients(operator):
    box_gradient = has_box_gradient(operator) and operator.keywords.get("quantize_roi", "none") == "none"
    reversed_whole_outside_huge = AWKWARD[[2, 4, 5, 7]]
    boxes = torch.cat([random_boxes(3, 2, 160, 128), reversed_whole_outside_huge]).float() + NUDGE
    assert_equals_oracle(operator, feature_map(2, 3, 8, 10, dtype=torch.float32), boxes, (2, 3), box_gradient)


@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_boxes_without_area(operator):
    boxes = torch.cat([AWKWARD[:2], AWKWARD[:2] + NUDGE]).float()  # no area, and almost none
    assert_equals_oracle(operator, feature_map(2, 3, 8, 10, dtype=torch.float32), boxes, (2, 3))


def test_more_bins_than_the_backward_takes_are_refused():
    features = feature_map(1, 1, 4, 5, dtype=torch.float32).to(DEVICE).requires_grad_()
    pooled = preset("align")(features, torch.tensor([[0, 0.0, 0, 40, 40]], device=DEVICE), (1, cuda.MOST_BINS + 1), 1 / 16)
    with pytest.raises(ValueError, match=r"output_size: \(1, 257\) bins; .* takes 256 a side at most"):
        pooled.sum().backward()


@pytest.mark.parametrize("operator", [pytest.param(preset(name), id=name) for name in ("warp", "warp_max")])
def test_gradient_of_the_boxes_straight_through_the_rounding(operator):
    # three bins over widths that are no multiples of three: no sample falls on a cell's centre
    boxes = torch.tensor([[0, 17.0, 20.0, 95.0, 101.0], [1, 30.0, 3.0, 110.0, 84.0]])
    assert_equals_oracle(operator, feature_map(2, 3, 8, 10, dtype=torch.float32), boxes, 3, box_gradient=True)


@pytest.mark.parametrize("operator", ONE_OF_EACH)
@pytest.mark.parametrize("output_size", [(7, 7), (2, 40), slow((1, 1)), slow((14, 14))], ids=str)
def test_any_number_of_bins(operator, output_size):
    """One block of bins and several; boxes with more bins than cells."""
    boxes = random_boxes(3, 1, 96, 80).float() + NUDGE
    assert_equals_oracle(operator, feature_map(1, 2, 5, 6, dtype=torch.float32), boxes, output_size, has_box_gradient(operator))


@pytest.mark.parametrize("operator", ONE_OF_EACH)
@pytest.mark.parametrize("channels", [1, 70, slow(17)])
def test_any_number_of_channels(operator, channels):
    boxes = random_boxes(3, 1, 64, 80).float() + NUDGE
    assert_equals_oracle(operator, feature_map(1, channels, 5, 4, dtype=torch.float32), boxes, 2, has_box_gradient(operator))


@pytest.mark.slow
@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_more_rois_than_a_program_lists_at_a_time(operator):
    """Lists of the RoIs that touch a tile, over several tiles and several chunks of RoIs."""
    assert_equals_oracle(operator, feature_map(2, 2, 9, 17, dtype=torch.float32), random_boxes(70, 2, 272, 144).float(), 2)


@pytest.mark.parametrize("operator", ONE_OF_EACH)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "layout"),
    [
        (torch.float32, 1e-5, torch.channels_last),
        (torch.float16, 2e-3, torch.contiguous_format),
        (torch.bfloat16, 1.6e-2, torch.contiguous_format),
        slow(torch.float16, 2e-3, torch.channels_last),
        slow(torch.bfloat16, 1.6e-2, torch.channels_last),
    ],
    ids=str,
)
def test_dtypes_and_layouts(operator, dtype, tolerance, layout):
    features, boxes = feature_map(2, 19, 3, 7, dtype=dtype, layout=layout), random_boxes(3, 2, 112, 48).float() + NUDGE
    named = on_device(operator, features, boxes, 3, 1 / 16, has_box_gradient(operator))
    assert named["output"].dtype == named["gradient of features"].dtype == dtype
    assert named["output"].is_contiguous()
    assert named["gradient of features"].is_contiguous(memory_format=layout)
    expected = results(partial(oracle, operator), features.float(), boxes, 3, 1 / 16, has_box_gradient(operator))
    assert_same(named, expected, tolerance, tolerance)


@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_offsets_of_64_bits(operator, monkeypatch):
    monkeypatch.setattr(cuda, "_offset", lambda features, bins: cuda.tl.int64)
    boxes = random_boxes(3, 1, 64, 80).float() + NUDGE
    assert_equals_oracle(operator, feature_map(1, 3, 5, 4, dtype=torch.float32), boxes, 2, has_box_gradient(operator))


def test_offsets_are_as_wide_as_an_image_or_a_roi_needs():
    shape = torch.empty(1, 2**10, 2**11, 2**10, device="meta")
    assert cuda._offset(shape, (7, 7)) == cuda.tl.int64
    assert cuda._offset(shape[:, :-1], (7, 7)) == cuda.tl.int32
    assert cuda._offset(shape[:, :, :1, :1], (2**11, 2**10)) == cuda.tl.int64


@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_no_boxes_no_images_no_channels(operator):
    features = feature_map(2, 3, 4, 4, dtype=torch.float32).to(DEVICE).requires_grad_()
    out = operator(features, torch.empty(0, 5, device=DEVICE), (2, 3), 0.5)
    assert out.shape == (0, 3, 2, 3)
    out.sum().backward()
    assert features.grad.abs().sum() == 0
    assert operator(features[:0], torch.empty(0, 5, device=DEVICE), 2, 0.5).shape == (0, 3, 2, 2)
    assert operator(features[:, :0], torch.zeros(1, 5, device=DEVICE), 2, 0.5).shape == (1, 0, 2, 2)


@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_an_invalid_box_gives_nan_and_affects_no_other(operator, monkeypatch):
    monkeypatch.setattr(functional, "check_boxes", lambda image, *_: image)  # a CPU would refuse it
    features, good = feature_map(2, 3, 6, 7, dtype=torch.float32), random_boxes(3, 2, 112, 96).float()
    bad = torch.tensor([[0, torch.nan, 1, 30, 30], [0, 1, torch.inf, 30, 30], [2, 1, 1, 30, 30], [-1, 1, 1, 30, 30]])
    both = operator(features.to(DEVICE), torch.cat([bad, good]).to(DEVICE), 3, 1 / 16)
    assert both[:4].isnan().all()
    assert torch.equal(both[4:], operator(features.to(DEVICE), good.to(DEVICE), 3, 1 / 16))


def test_an_infinite_cell_without_weight_is_not_read():
    features = torch.tensor([[[[1.0, torch.inf], [2.0, torch.inf]]]], device=DEVICE)
    assert preset("align")(
        features, torch.tensor([[0.0, 0, 0, 1, 2]], device=DEVICE), (2, 1), 1.0, sampling_ratio=1
    ).flatten().tolist() == [1, 2]


def test_nan_in_the_features_is_the_maximum():
    features = feature_map(1, 1, 4, 4, dtype=torch.float32)
    features[0, 0, 1, 3] = torch.nan
    out = preset("pool")(features.to(DEVICE), torch.tensor([[0.0, 0, 0, 64, 64]], device=DEVICE), 2, 1 / 16)
    assert out.isnan().flatten().tolist() == [False, True, False, False]


def test_equal_maxima_give_the_gradient_to_the_first():
    features = torch.ones(1, 1, 4, 4, device=DEVICE, requires_grad=True)
    preset("pool")(features, torch.tensor([[0.0, 0, 0, 3, 3]], device=DEVICE), 1, 1.0).backward()
    assert features.grad.nonzero().tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("operator", in_ci("align_max", "prroi"))
def test_opcheck(operator):
    name = "lattice_pool" if "reduce" in operator.keywords else "integral_pool"
    op, calls = getattr(library, name), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, name, lambda *args: calls.append(args) or op(*args))
        features = feature_map(1, 2, 5, 6, dtype=torch.float32).to(DEVICE).requires_grad_()
        operator(features, random_boxes(3, 1, 96, 80).float().to(DEVICE), 2, 1 / 16)
    torch.library.opcheck(op, calls[0])


@pytest.mark.parametrize("target", ["sm_90", slow("sm_80"), slow("sm_100")])
@pytest.mark.parametrize("dtype", ["float32", slow("float16"), slow("bfloat16")])
def test_every_kernel_compiles_without_spilled_registers(dtype, target):
    command = [sys.executable, "-m", "tests.ops.compile_kernels", dtype, target]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    forward_and_slopes = {"lattice_forward", "lattice_slopes", "integral_forward", "integral_slopes"}
    assert {row["kernel"] for row in rows} == forward_and_slopes | {"list_rois_by_tile", "mean_backward", "max_backward"}
    assert {row["target"] for row in rows} == {target}
    assert [row for row in rows if row["STACK"] or row["LOCAL"]] == []
