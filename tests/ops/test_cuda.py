"""The Triton kernels against the oracle: on the GPU where there is one, under Triton's interpreter where there is none."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from roi_quantization.ops import functional, library
from roi_quantization.ops.cuda import kernels as cuda
from roi_quantization.ops.cuda.tiles import upper_part

from .presets import AWKWARD, preset, random_boxes
from .test_against_reference import assert_same, feature_map, has_box_gradient, in_ci, oracle, results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("the interpreter of Triton 3.6 does not work with NumPy 2.4", allow_module_level=True)

NUDGE = torch.tensor([0, 0.013, 0.017, 0.019, 0.023])  # off the kinks of the interpolated map: see test_against_reference
ONE_OF_EACH = [pytest.param(preset(name), id=name) for name in ("align", "align_max", "pool", "prroi")]
TWO_IN_CI = [p if p.id in ("align", "pool") else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow) for p in ONE_OF_EACH]


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


@pytest.mark.parametrize("operator", in_ci("align", "align_max", "pool", "prroi", "pool-mean"))
def test_output_and_gradients(operator):
    box_gradient = has_box_gradient(operator) and operator.keywords.get("quantize_roi", "none") == "none"
    reversed_whole_outside_huge = AWKWARD[[2, 4, 5, 7]]
    boxes = torch.cat([random_boxes(3, 2, 160, 128), reversed_whole_outside_huge]).float() + NUDGE
    assert_equals_oracle(operator, feature_map(2, 3, 8, 10, dtype=torch.float32), boxes, (2, 3), box_gradient)


@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_boxes_without_area(operator):
    boxes = torch.cat([AWKWARD[:2], AWKWARD[:2] + NUDGE]).float()  # no area, and almost none
    assert_equals_oracle(operator, feature_map(2, 3, 8, 10, dtype=torch.float32), boxes, (2, 3))


@pytest.mark.parametrize("operator", [pytest.param(preset(name), id=name) for name in ("warp", "warp_max")])
def test_gradient_of_the_boxes_straight_through_the_rounding(operator):
    # three bins over widths that are no multiples of three: no sample falls on a cell's centre
    boxes = torch.tensor([[0, 17.0, 20.0, 95.0, 101.0], [1, 30.0, 3.0, 110.0, 84.0]])
    assert_equals_oracle(operator, feature_map(2, 3, 8, 10, dtype=torch.float32), boxes, 3, box_gradient=True)


@pytest.mark.parametrize("operator", TWO_IN_CI)
@pytest.mark.parametrize("output_size", [(2, 40), slow((7, 7)), slow((1, 1)), slow((14, 14)), slow((1, 300))], ids=str)
def test_any_number_of_bins(operator, output_size):
    """One block of bins and several; boxes with more bins than cells."""
    boxes = random_boxes(3, 1, 96, 80).float() + NUDGE
    assert_equals_oracle(operator, feature_map(1, 2, 5, 6, dtype=torch.float32), boxes, output_size, has_box_gradient(operator))


@pytest.mark.parametrize("operator", TWO_IN_CI)
@pytest.mark.parametrize("channels", [1, 70, slow(17)])
def test_any_number_of_channels(operator, channels):
    boxes = random_boxes(3, 1, 64, 80).float() + NUDGE
    assert_equals_oracle(operator, feature_map(1, channels, 5, 4, dtype=torch.float32), boxes, 2, has_box_gradient(operator))


@pytest.mark.slow
@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_more_rois_than_a_program_lists_at_a_time(operator):
    """Lists of the RoIs that touch a tile, over several tiles and several chunks of RoIs."""
    assert_equals_oracle(operator, feature_map(2, 2, 9, 17, dtype=torch.float32), random_boxes(70, 2, 272, 144).float(), 2)


@pytest.mark.parametrize("operator", TWO_IN_CI)
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


@pytest.mark.parametrize("channels", [2, 4])
def test_a_map_of_one_cell_in_bfloat16(channels):
    """Its strides are those of either layout, and two channels are read as one number."""
    features = torch.arange(2.0 * channels).reshape(2, channels, 1, 1).to(DEVICE, torch.bfloat16)
    boxes = torch.tensor([[1.0, 0, 0, 16, 16], [0, 0, 0, 16, 16]], device=DEVICE)
    for name in ("align", "pool", "prroi"):
        weight = 0.25 if name == "prroi" else 1.0  # the integral of its one tent, over [0, 1] along both axes
        assert torch.equal(preset(name)(features, boxes, 1, 1 / 16), features.flip(0) * weight)


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
    """Neither their outputs nor, where the gradient of its output is NaN, the gradient of the features."""
    monkeypatch.setattr(functional, "check_boxes", lambda image, *_: image)  # a CPU would refuse it
    features, good = feature_map(2, 3, 6, 7, dtype=torch.float32).to(DEVICE), random_boxes(3, 2, 112, 96).float()
    bad = torch.tensor([[0, torch.nan, 1, 30, 30], [0, 1, torch.inf, 30, 30], [2, 1, 1, 30, 30], [-1, 1, 1, 30, 30]])

    def output_and_gradient(boxes: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = features.clone().requires_grad_()
        out = operator(leaf, boxes.to(DEVICE), 3, 1 / 16)
        return out.detach(), torch.autograd.grad(out, leaf, weights)[0]

    weights = torch.rand(7, 3, 3, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weights[:4] = torch.nan
    both, gradient = output_and_gradient(torch.cat([bad, good]), weights)
    alone, expected = output_and_gradient(good, weights[4:])
    assert both[:4].isnan().all()
    assert torch.equal(both[4:], alone)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


@triton.jit
def split(x, upper, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(upper + at, upper_part(tl.load(x + at)))


def upper_parts(x: torch.Tensor) -> torch.Tensor:
    x, upper = x.to(DEVICE), torch.empty_like(x, device=DEVICE)
    split[(1,)](x, upper, x.numel())
    return upper.cpu()


def test_three_products_of_tf32_are_unbiased_and_have_22_digits():
    """Of shares and gradients. Tensor cores ignore the lower 13 bits of what they multiply; the interpreter does not."""

    def tf32(x: torch.Tensor) -> torch.Tensor:
        return (x.view(torch.int32) & -8192).view(torch.float32).double()

    a, b = torch.rand(2, 2**16, generator=torch.Generator().manual_seed(0))
    upper_a, upper_b = upper_parts(a), upper_parts(b)
    assert torch.equal(tf32(upper_a), upper_a.double())
    found = tf32(upper_a) * tf32(b - upper_b) + tf32(a - upper_a) * tf32(upper_b) + tf32(upper_a) * tf32(upper_b)
    error = found / (a.double() * b) - 1
    assert error.abs().max() < 2**-21
    assert error.mean().abs() < 2e-9, "a twelfth of float32's last digit at least"


def test_a_split_keeps_what_is_exact_and_what_is_not_finite():
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-126, 2.0**127, torch.inf, -torch.inf])
    assert torch.equal(upper_parts(exact).view(torch.int32), exact.view(torch.int32))
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert (nan - upper_parts(nan)).isnan().all(), "the lower part"


def max_gradient(boxes: torch.Tensor, weights: torch.Tensor, operator: str = "align_max", dtype=torch.float32) -> torch.Tensor:
    features = feature_map(1, 2, 5, 6, dtype=dtype).to(DEVICE).requires_grad_()
    return torch.autograd.grad(preset(operator)(features, boxes.to(DEVICE), 2, 1 / 16), features, weights.to(DEVICE, dtype))[0].cpu()


@pytest.mark.parametrize("operator", ["align_max", "pool"])
def test_the_gradient_of_a_maximum_has_the_same_bits_in_every_order_of_the_rois(operator):
    boxes, weights = random_boxes(5, 1, 96, 80).float(), torch.randn(5, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(max_gradient(boxes, weights, operator), max_gradient(boxes[order], weights[order], operator))


@pytest.mark.parametrize("exponent", [-100, slow(0), 100])
def test_sums_of_a_maximum_are_as_exact_as_their_bound(exponent):
    """Of 5 equal boxes two have gradients that cancel and are 2 ** 30 times those of the others: float32 would lose all of these."""
    boxes = torch.tensor([[0, 18.0, 18.0, 76.0, 60.0]]).repeat(5, 1)
    weights = torch.randn(5, 2, 2, 2, generator=torch.Generator().manual_seed(1)) * 2.0 ** (exponent - 30)
    weights[0], weights[3] = 2.0**exponent, -(2.0**exponent)
    found = max_gradient(boxes, weights, "pool")
    expected = max_gradient(boxes[:1], weights.double().sum(0, keepdim=True).float(), "pool")
    contributions = bins = 5 * 4
    torch.testing.assert_close(found, expected, rtol=2**-22, atol=contributions * bins * 2.0 ** (exponent - 60))


def test_a_gradient_of_a_maximum_that_is_not_finite_spoils_the_map():
    weights = torch.ones(3, 2, 2, 2)
    weights[1, 0, 1, 1] = torch.inf
    assert max_gradient(random_boxes(3, 1, 96, 80).float(), weights).isnan().all()


@pytest.mark.parametrize(("rois", "shape", "programs"), [(1, (1, 2, 48, 64), 2), (3, (1, 2, 5, 6), 3), (2, (1, 1, 4, 4), 2)])
def test_sums_of_a_map_are_cleared_by_as_many_programs_as_it_has_blocks_of_them(rois, shape, programs, monkeypatch):
    """A few RoIs on a large map would leave the map to as few programs; more RoIs than blocks share out the search of the gradient."""
    grids, kernel = [], cuda.clear_and_find_largest
    boxes = random_boxes(rois, 1, 16.0 * shape[3], 16.0 * shape[2]).float() + NUDGE

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(cuda, "clear_and_find_largest", Recorder())
    assert_equals_oracle(preset("pool"), feature_map(*shape, dtype=torch.float32), boxes, 2)
    assert grids == [(programs,)]


def test_sums_of_a_large_map_are_computed_for_some_channels_after_others(monkeypatch):
    boxes, weights = random_boxes(2, 1, 96, 80).float(), torch.randn(2, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    at_once = max_gradient(boxes, weights)
    monkeypatch.setattr(cuda, "MOST_SUMS", 1)
    assert torch.equal(max_gradient(boxes, weights), at_once)


@pytest.mark.parametrize(
    ("channels", "most", "passes"), [(40, 33, [32, 8]), (34, 31, [17, 17]), (100, 60, [50, 50]), (100, 64, [64, 36]), (3, 64, [3])]
)
def test_channels_are_shared_out_evenly_and_no_program_is_without_any(channels, most, passes, monkeypatch):
    """Whole programs have 16 channels where the sums of so many fit."""
    launched = {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.setdefault(self.name, []).append((grid, args))

    for name in ("clear_and_find_largest", "scatter_max", "write_sums"):
        monkeypatch.setattr(cuda, name, Recorder(name))
    monkeypatch.setattr(cuda, "MOST_SUMS", most * 6)
    lattice, out = [torch.zeros(2, 3)] * 4, torch.empty(1, channels, 2, 3)
    cuda._scatter(torch.zeros(2, channels, 3, 3), out, torch.zeros(2), cuda.Axis(*lattice), cuda.Axis(*lattice), torch.zeros(0), True)
    assert [grid[2] for grid, _ in launched["scatter_max"]] == [-(-of_pass // 16) for of_pass in passes]
    assert [grid[1] for grid, _ in launched["write_sums"]] == [-(-of_pass // 32) for of_pass in passes]
    assert [args[4] for _, args in launched["write_sums"]] == [sum(passes[:i]) for i in range(len(passes))]
    assert launched["write_sums"][0][1][1].numel() == passes[0] * 6


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


@pytest.mark.parametrize("operator", in_ci("prroi"))
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
    rows = compiled(dtype, target)
    assert {row["kernel"] for row in rows} == {
        "place", "mean_forward", "max_forward", "integral_forward", "lattice_slopes", "integral_slopes",
        "mark_rois_by_tile", "mean_backward", "clear_and_find_largest", "scatter_max", "write_sums",
    }  # fmt: skip
    assert {row["target"] for row in rows} == {target}
    assert [row for row in rows if row["kernel"] == "place" and row["fused multiply-adds"]] == []  # they round otherwise


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_number_of_channels_or_bins_spills_registers(dtype):
    assert len(compiled(dtype, "sm_90", "channels=1,3,17,100,512", "bins=7,14,28")) == 15 * 21


@pytest.mark.slow
def test_other_numbers_of_boxes_and_cells_compile_nothing_anew():
    """But for the two kernels that write the gradient of a contiguous map, whose strides are the map's size: three variants each."""
    once = compiled("float32", "sm_90", "channels=64")
    rows = compiled("float32", "sm_90", "channels=64", "rois=1,8,33", "height=37,64", "width=63,64")
    writers = {"mean_backward", "write_sums"}
    variants = [{row["hash"] for row in some if row["kernel"] not in writers} for some in (once, rows)]
    assert variants[0] == variants[1]
    # mean_backward of a mean and of an integral
    assert len({row["hash"] for row in rows if row["kernel"] in writers}) <= 3 * 3


def compiled(*arguments: str) -> list[dict]:
    """What `compile_kernels` prints of each kernel, none of which spills."""
    command = [sys.executable, "-m", "tests.ops.compile_kernels", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row for row in rows if row["STACK"] or row["LOCAL"]] == []
    return rows
