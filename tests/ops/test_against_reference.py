"""Every path against the oracle: output and every gradient by name; odd shapes, every dtype, awkward boxes, both layouts."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from roi_quantization import ops
from roi_quantization.ops import eager, library, reference
from roi_quantization.ops.cpu.max import initial_value
from roi_quantization.ops.geometry import IntegralRule, LatticeRule
from roi_quantization.ops.inputs import mask_invalid_boxes, prepare

from .presets import AWKWARD, PRESETS, WITHOUT_BOX_GRADIENT, preset, random_boxes

KNOBS = [pytest.param(preset(name), id=name) for name in PRESETS] + [
    pytest.param(preset("align", sampling_ratio=0), id="align-adaptive"),
    pytest.param(preset("align", sampling_ratio=3, half_pixel=False), id="align-3-half_pixel-off"),
    pytest.param(preset("align_max", sampling_ratio=0, inclusive_end=True), id="align_max-adaptive-inclusive"),
    pytest.param(preset("warp", reduce="max"), id="warp-max"),
    pytest.param(preset("pool", reduce="mean"), id="pool-mean"),
    pytest.param(preset("pool_floor", reduce="mean", half_pixel=True), id="pool_floor-mean-half_pixel"),
    pytest.param(preset("prroi", half_pixel=True), id="prroi-half_pixel"),
]


def in_ci(*ids: str) -> list:
    """All of KNOBS, those with other ids marked slow: for facts that do not depend on the knobs."""
    return [p if p.id in ids else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow) for p in KNOBS]


ONE_OF_EACH = in_ci("align", "align_max", "pool", "prroi")  # a mean, a maximum between cells, one of cells, an integral
OUTPUT_SIZES = [(1, 1), (2, 3), (7, 7)]


def through(path, operator: partial, features: Tensor, boxes: Tensor, output_size, spatial_scale: float) -> Tensor:
    """The operator that a configuration names, computed by `path` (a module with `lattice_pool` and `integral_pool`)."""
    knobs = dict(operator.keywords)
    image, box, (height, width) = prepare(features, boxes, output_size, differentiable_boxes=knobs.get("quantize_bins", "none") == "none")
    image, box = mask_invalid_boxes(image, box, len(features))
    reduce = knobs.pop("reduce", None)
    rule = LatticeRule(**knobs) if reduce else IntegralRule(**knobs)
    y = rule.axis(box[:, 1], box[:, 3], spatial_scale, height, features.shape[2])
    x = rule.axis(box[:, 0], box[:, 2], spatial_scale, width, features.shape[3])
    return path.lattice_pool(features, image, y, x, reduce) if reduce else path.integral_pool(features, image, y, x)


oracle = partial(through, reference)
PATHS = {"cpu": lambda operator, *args: operator(*args), "eager": partial(through, eager)}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def results(compute: Callable, features: Tensor, boxes: Tensor, output_size, spatial_scale: float, box_gradient: bool) -> dict[str, Tensor]:
    """Output and gradients, by name, of a fixed random weighting of the output."""
    features = features.detach().requires_grad_()
    boxes = boxes.detach().requires_grad_(box_gradient)
    out = compute(features, boxes, output_size, spatial_scale)
    weights = torch.rand(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    # a box off the map depends on nothing: its gradients are 0, not absent
    ((out * weights).sum() + 0 * (features.sum() + boxes.sum())).backward()
    named = {"output": out.detach(), "gradient of features": features.grad}
    if box_gradient:
        named["gradient of boxes"] = boxes.grad
    return named


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        found, wanted = actual[name].double().cpu(), expected[name].double()
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def feature_map(*shape: int, dtype=torch.float64, layout=torch.contiguous_format) -> Tensor:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return features.to(dtype).contiguous(memory_format=layout)


def has_box_gradient(operator: partial) -> bool:
    return operator.keywords.get("quantize_bins", "none") == "none"


def test_every_preset_of_the_family_is_shipped():
    pools = {"pool", "pool_floor", "pool_bins", "pool_exclusive"}
    warps = {"warp", "warp_max", "warp_max_inclusive", "warp_mnc", "warp_no_half_pixel"}
    aligns = {"align", "align_max", "align_no_half_pixel", "align_1_sample", "align_adaptive"}
    assert set(PRESETS) == pools | warps | aligns | {"prroi"}
    assert {name for name in PRESETS if not has_box_gradient(preset(name))} == WITHOUT_BOX_GRADIENT


@pytest.mark.parametrize("operator", KNOBS)
@pytest.mark.parametrize("output_size", OUTPUT_SIZES, ids=str)
def test_output_and_gradients_in_float64(operator, output_size):
    features, boxes = feature_map(2, 3, 8, 10), torch.cat([random_boxes(5, 2, 160, 128), AWKWARD])
    if output_size == (7, 7):
        boxes = boxes[::3]
    # A sample on a cell's centre sits on a kink of the interpolated map, where the box has two slopes; a nudge moves every sample off.
    # Rounded boxes put samples there whatever is done: their slopes are held against the derivative by hand in test_definitions.
    boxes = boxes + torch.tensor([0, 0.013, 0.017, 0.019, 0.023], dtype=torch.float64)
    box_gradient = has_box_gradient(operator) and operator.keywords.get("quantize_roi", "none") == "none"
    args = features, boxes, output_size, 1 / 16, box_gradient
    expected = results(partial(oracle, operator), *args)
    for path in PATHS.values():
        assert_same(results(partial(path, operator), *args), expected, rtol=1e-9, atol=1e-10)


@every_path
@pytest.mark.parametrize("operator", [pytest.param(preset("warp"), id="warp"), pytest.param(preset("warp", reduce="max"), id="warp-max")])
def test_gradient_of_the_boxes_straight_through_the_rounding(path, operator):
    # three bins over widths that are no multiples of three: no sample falls on a cell's centre
    boxes = torch.tensor([[0, 17.0, 20.0, 95.0, 101.0], [1, 30.0, 3.0, 110.0, 84.0], [0, 1.0, 1.0, 142.0, 115.0]], dtype=torch.float64)
    args = feature_map(2, 3, 8, 10), boxes, 3, 1 / 16, True
    named = results(partial(path, operator), *args)
    assert named["gradient of boxes"][:, 1:].abs().min() > 0
    assert_same(named, results(partial(oracle, operator), *args), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("operator", ONE_OF_EACH)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)], ids=["float32", "float16", "bfloat16"]
)
def test_dtypes_and_layouts(operator, dtype, tolerance):
    features, boxes = feature_map(2, 19, 6, 7, dtype=dtype), random_boxes(6, 2, 112, 96)
    # The oracle reads the same rounded features, in float64, with lattices in the float32 that the operators have.
    expected = results(partial(oracle, operator), features.float(), boxes, 3, 1 / 16, False)
    for layout in (torch.contiguous_format, torch.channels_last):
        for name, path in PATHS.items():
            found = results(partial(path, operator), features.contiguous(memory_format=layout), boxes, 3, 1 / 16, False)
            assert found["gradient of features"].dtype == dtype
            if name == "cpu":
                assert found["output"].dtype == dtype
                assert found["gradient of features"].is_contiguous(memory_format=layout)
                assert found["output"].is_contiguous()
            assert_same(found, expected, tolerance, tolerance)


@pytest.mark.parametrize("operator", ONE_OF_EACH)
@pytest.mark.parametrize("channels", [0, 1, 16, 17, 300])
def test_any_number_of_channels(operator, channels):
    """Blocks of channels, whole and broken."""
    args = feature_map(1, channels, 5, 4), random_boxes(3, 1, 64, 80), 2, 1 / 16, False
    assert_same(results(operator, *args), results(partial(through, eager, operator), *args), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("operator", [pytest.param(preset(name), id=name) for name in ("align", "align_max", "pool", "prroi")])
def test_an_invalid_box_affects_no_other_in_plain_pytorch(operator):
    """NaN, an image that is not there, and a box whose size float32 cannot hold; Triton's kernels have this test in `test_cuda`."""
    features, good = feature_map(2, 3, 6, 7, dtype=torch.float32), random_boxes(3, 2, 112, 96).float()
    bad = torch.tensor([[0, torch.nan, 1, 30, 30], [2, 1, 1, 30, 30], [0, 1, 1, torch.inf, 30], [0, -3e38, -3e38, 3e38, 3e38]])
    box_gradient = has_box_gradient(operator)

    def output_and_gradients(boxes: Tensor) -> list[Tensor]:
        inputs = [features.clone().requires_grad_(), boxes.clone().requires_grad_(box_gradient)]
        out = through(eager, operator, *inputs, 3, 1 / 16)
        return [out.detach(), *torch.autograd.grad(out[-3:].square().sum(), inputs if box_gradient else inputs[:1])]

    both, alone = output_and_gradients(torch.cat([bad, good])), output_and_gradients(good)
    assert both[0][:3].isnan().all()
    assert torch.equal(both[0][-3:], alone[0])
    torch.testing.assert_close(both[1], alone[1])
    for of_boxes, of_good in zip(both[2:], alone[2:], strict=True):
        torch.testing.assert_close(of_boxes[-3:], of_good)
        assert of_boxes[:3].abs().sum() == 0


@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_the_same_bits_for_every_number_of_threads(operator):
    args = feature_map(2, 150, 9, 11, dtype=torch.float32), random_boxes(40, 2, 176, 144).float(), 7, 1 / 16, has_box_gradient(operator)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results(operator, *args))
    finally:
        torch.set_num_threads(before)
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


@every_path
@pytest.mark.parametrize("operator", KNOBS)
def test_no_boxes_and_no_images(path, operator):
    features = feature_map(2, 3, 4, 4).requires_grad_()
    out = path(operator, features, [torch.empty(0, 4, dtype=torch.float64)] * 2, (2, 3), 0.5)
    assert out.shape == (0, 3, 2, 3)
    out.sum().backward()
    assert features.grad.abs().sum() == 0
    assert path(operator, feature_map(0, 3, 4, 4), [], 2, 0.5).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("operator", KNOBS)
def test_a_list_of_boxes_and_a_table_give_the_same(operator):
    features, table = feature_map(3, 2, 8, 8), random_boxes(9, 3, 128, 128)
    table = table[table[:, 0].argsort(stable=True)]
    as_list = [table[table[:, 0] == i, 1:] for i in range(3)]
    assert torch.equal(operator(features, table, 3, 1 / 16), operator(features, as_list, 3, 1 / 16))


@pytest.mark.parametrize("operator", [p for p in KNOBS if has_box_gradient(p.values[0]) and "warp" not in p.id])
def test_gradcheck(operator):
    features = feature_map(1, 2, 5, 6).requires_grad_()
    boxes = torch.tensor([[0, 3.1, 9.9, 61.3, 51.2], [0, 20.3, -9.4, 93.7, 77.7]], dtype=torch.float64)
    index, coordinates = boxes[:, :1], boxes[:, 1:].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f, c: operator(f, torch.cat([index, c], 1), 3, 1 / 16), (features, coordinates))


@pytest.mark.parametrize("name", sorted(WITHOUT_BOX_GRADIENT))
def test_a_gradient_of_the_boxes_through_quantized_bins_is_refused(name):
    with pytest.raises(ValueError, match="boxes require a gradient, and an operator with quantized bins has none"):
        preset(name)(feature_map(1, 2, 4, 4), random_boxes(1, 1, 64, 64).requires_grad_(), 2, 1 / 16)


def test_nan_in_the_features_is_the_maximum():
    features = feature_map(1, 1, 4, 4)
    features[0, 0, 1, 3] = torch.nan
    box = torch.tensor([[0.0, 0, 0, 64, 64]], dtype=torch.float64)
    for path in PATHS.values():
        assert path(preset("pool"), features, box, 2, 1 / 16).isnan().flatten().tolist() == [False, True, False, False]


@every_path
@pytest.mark.parametrize("operator", [preset("pool"), preset("align_max", sampling_ratio=4)], ids=["pool", "align_max"])
def test_nan_wins_in_every_place_of_a_bin(path, operator):
    """Among the first of a bin's samples, the last, or between."""
    box = torch.tensor([[0.0, 0, 0, 3, 5]], dtype=torch.float64)
    for y, x in ((0, 0), (2, 1), (4, 2)):
        features = feature_map(1, 20, 5, 3)
        features[0, ::2, y, x] = torch.nan
        assert path(operator, features, box, 1, 1.0).isnan().flatten().tolist() == [True, False] * 10


@every_path
@pytest.mark.parametrize("name", ["align", "align_max"])
def test_a_bin_that_interpolates_an_infinite_cell_is_not_finite(path, name):
    box = torch.tensor([[0.0, 0, 0, 2, 2]], dtype=torch.float64)  # samples at 0 and 1 and half way between
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        features = feature_map(1, 3, 2, 2)
        features[0, 1, y, x] = torch.inf
        out = path(preset(name, sampling_ratio=3), features, box, 1, 1.0)
        assert out.isfinite().flatten().tolist() == [True, False, True]


@pytest.mark.parametrize("quantize_bins", ["cover", "truncate"])
def test_the_mean_of_whole_cells_reads_and_writes_no_other_cell(quantize_bins):
    """Cells beside the bin may be infinite, and its gradient too: what is multiplied by 0 would be NaN."""
    features = torch.full((1, 2, 4, 4), torch.inf, dtype=torch.float64)
    features[..., 1:3, 1:3] = torch.tensor([[1.0, 2], [3, 6]], dtype=torch.float64)
    features.requires_grad_()
    operator = partial(ops.lattice_pool, quantize_bins=quantize_bins, reduce="mean")
    for path in PATHS.values():
        out = path(operator, features, torch.tensor([[0.0, 1, 1, 3, 3]], dtype=torch.float64), 1, 1.0)
        assert out.flatten().tolist() == [3, 3]
    operator(features, torch.tensor([[0.0, 1, 1, 3, 3]]).double(), 1).backward(torch.tensor([torch.inf, 4]).double().view(1, 2, 1, 1))
    expected = torch.zeros(2, 4, 4, dtype=torch.float64)
    expected[:, 1:3, 1:3] = torch.tensor([torch.inf, 1])[:, None, None]
    assert torch.equal(features.grad[0], expected)


def test_the_mean_of_samples_far_apart_reads_no_cell_between_them():
    features = torch.zeros(1, 1, 1, 16)
    features[..., 7:9] = torch.inf
    features[..., [3, 4, 11, 12]] = torch.tensor([1.0, 2, 3, 4])  # the neighbours of the samples at 3.5 and 11.5
    features.requires_grad_()
    box = torch.tensor([[0.0, 0, 0, 16, 1]])
    for path in PATHS.values():
        assert (
            path(preset("align"), features, box, 1, 1.0).item() == torchvision.ops.roi_align(features, box, 1, 1.0, 2, True).item() == 2.5
        )
    preset("align")(features, box, 1, 1.0).backward(torch.full((1, 1, 1, 1), torch.inf))
    assert features.grad.flatten().nonzero().flatten().tolist() == [3, 4, 11, 12]


def test_no_sample_is_lost_of_a_bin_that_has_more_than_float32_counts():
    """4099 * 4101 is odd and above 2**24. In float32 it is one more, and a sample would seem to be off the map."""
    y, x = np.int32(4099), np.int32(4101)
    assert int(np.float32(y) * np.float32(x)) > int(y) * int(x)
    assert initial_value(y, np.float32(y), x, np.float32(x)) == -np.inf
    assert initial_value(y, np.float32(y), x, np.float32(x + 1)) == initial_value(np.int32(0), np.float32(0), x, np.float32(x)) == 0


def test_equal_maxima_give_the_gradient_to_the_first():
    features = torch.ones(1, 1, 4, 4, requires_grad=True)
    preset("pool")(features, torch.tensor([[0.0, 0, 0, 3, 3]]), 1, 1.0).backward()
    assert features.grad.nonzero().tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("operator", ONE_OF_EACH)
def test_opcheck(operator):
    """Schemas, shapes for tracing and autograd registration of the PyTorch operators behind the functions."""
    name = "integral_pool" if operator.func is ops.prroi_pool else "lattice_pool"
    op, calls = getattr(library, name), []
    features = feature_map(1, 2, 5, 6, dtype=torch.float32).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, name, lambda *args: calls.append(args) or op(*args))
        operator(features, random_boxes(3, 1, 96, 80).float(), 2, 1 / 16)
    torch.library.opcheck(op, calls[0])
