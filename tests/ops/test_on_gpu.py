"""What only a GPU can show; `tests/ops/test_cuda*.py` run there too, and compare the kernels with the oracle: pytest -m gpu tests/ops"""

from functools import partial

import pytest
import torch
import torchvision

from roi_quantization import ops

from .presets import PRESETS, WITHOUT_BOX_GRADIENT, preset, random_boxes
from .test_against_reference import KNOBS, assert_same, has_box_gradient, results
from .test_compilation import Pooled

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ALIGN = partial(ops.roi_align, sampling_ratio=2, aligned=True)
PEERS = [
    pytest.param(ALIGN, partial(torchvision.ops.roi_align, sampling_ratio=2, aligned=True), id="align"),
    pytest.param(ops.roi_pool, torchvision.ops.roi_pool, id="pool"),
]


def training_shape(dtype=torch.float32, rois=1024, channels=512):
    features = torch.randn(2, channels, 38, 63, generator=torch.Generator().manual_seed(3)).to("cuda", dtype)
    return features, random_boxes(rois, 2, 1008, 608).float().cuda()


@pytest.mark.parametrize("channels", [512, 100, 17])
@pytest.mark.parametrize(("ours", "theirs"), PEERS)
def test_equal_to_torchvision_at_the_size_of_training(ours, theirs, channels):
    features, boxes = training_shape(channels=channels)
    both = [results(operator, features, boxes, 7, 1 / 16, False) for operator in (ours, theirs)]
    assert_same(both[0], {name: value.cpu() for name, value in both[1].items()}, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", KNOBS)
def test_equal_to_the_cpu(operator):
    features = torch.randn(2, 64, 38, 50, generator=torch.Generator().manual_seed(3))
    args = random_boxes(100, 2, 800, 608).float(), 7, 1 / 16
    box_gradient = has_box_gradient(operator) and operator.keywords.get("quantize_roi", "none") == "none"
    on_gpu = results(operator, features.cuda(), args[0].cuda(), *args[1:], box_gradient)
    assert_same(on_gpu, results(operator, features, *args, box_gradient), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", KNOBS)
def test_the_same_bits_on_every_run(operator):
    runs = [results(operator, *training_shape(rois=300), 7, 1 / 16, has_box_gradient(operator)) for _ in range(5)]
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


@pytest.mark.parametrize("name", ["align", "align_max", "pool", "prroi"])
def test_an_invalid_box_touches_no_gradient_but_its_own(name):
    features, boxes = training_shape(rois=100)
    bad = torch.tensor([[0, torch.nan, 1, 30, 30], [2, 1, 1, 30, 30]], device="cuda")
    grad = torch.randn(102, 512, 7, 7, device="cuda")
    grad[100:] = torch.nan
    features.requires_grad_()
    both = torch.autograd.grad(preset(name)(features, torch.cat([boxes, bad]), 7, 1 / 16), features, grad)[0]
    alone = torch.autograd.grad(preset(name)(features, boxes, 7, 1 / 16), features, grad[:100])[0]
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_boxes_can_be_computed_twice():
    features, boxes = training_shape(rois=20)
    boxes.requires_grad_()
    loss = ALIGN(features, boxes, 7, 1 / 16).square().mean()
    first, second = (torch.autograd.grad(loss, boxes, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["align", "align_max", "pool", "prroi", "warp"])
def test_no_call_waits_for_the_device_and_a_cuda_graph_captures_a_step(name):
    features, boxes = training_shape(rois=100)
    features.requires_grad_()
    grad = torch.randn(100, 512, 7, 7, device="cuda")

    def step():
        out = preset(name)(features, boxes, 7, 1 / 16)
        return out, *torch.autograd.grad(out, features, grad)

    side = torch.cuda.Stream()  # a capture needs everything on one stream and compiled before
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = step()
    torch.cuda.current_stream().wait_stream(side)
    boxes.copy_(random_boxes(100, 2, 1008, 608, seed=1).float())
    graph.replay()
    for found, wanted in zip(captured, step(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_compiled_model_is_the_same(name):
    torch.compiler.reset()
    model, images = Pooled(preset(name), bins=7).cuda(), torch.randn(2, 3, 38, 63, device="cuda")
    compiled = torch.compile(model, fullgraph=True)
    for count in (5, 9, 12):
        boxes = random_boxes(count, 2, 1008, 608).float().cuda()
        torch.testing.assert_close(compiled(images, boxes), model(images, boxes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in sorted(set(PRESETS) - WITHOUT_BOX_GRADIENT) if not n.startswith("warp")])  # rounded RoIs
def test_gradcheck(name):
    features = torch.randn(1, 2, 5, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    boxes = torch.tensor([[0, 3.1, 9.9, 61.3, 51.2], [0, 20.3, -9.4, 93.7, 77.7]], dtype=torch.float64, device="cuda")
    index, coordinates = boxes[:, :1], boxes[:, 1:].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f, c: preset(name)(f, torch.cat([index, c], 1), 3, 1 / 16), (features, coordinates))


@pytest.mark.parametrize("name", ["align", "pool", "prroi"])
def test_a_map_of_more_than_two_billion_elements(name):
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    features = torch.zeros(1, 64, 6000, 6000, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)
    features[0, :, 5900:, 5900:] = 3
    features.requires_grad_()
    out = preset(name)(features, torch.tensor([[0.0, 5910, 5910, 5990, 5990]], device="cuda"), 2, 1.0)
    assert (out == 3).all()
    out.sum().backward()
    assert features.grad[0, :, :5900].abs().max() == 0
    assert features.grad[0, 0, 5900:, 5900:].float().sum() == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize(("ours", "theirs"), PEERS)
def test_no_more_memory_than_torchvision_in_a_training_step(ours, theirs):
    """Of a channels-last map, as the detector has it: of another layout the kernels make a copy."""

    def peak(operator) -> int:
        features, boxes = training_shape()
        features = features.to(memory_format=torch.channels_last).requires_grad_()
        grad = torch.ones(len(boxes), features.shape[1], 7, 7, device="cuda")
        operator(features, boxes, 7, 1 / 16).backward(grad)  # compiles
        features.grad = None
        torch.cuda.reset_peak_memory_stats()
        operator(features, boxes, 7, 1 / 16).backward(grad)
        return torch.cuda.max_memory_allocated()

    assert peak(ours) <= peak(theirs) * 1.01


@pytest.mark.parametrize("name", ["align", "align_max", "pool", "prroi"])
def test_under_autocast_the_result_has_the_dtype_of_the_features(name):
    for dtype in (torch.float32, torch.bfloat16):
        features, boxes = training_shape(dtype, rois=20)
        plain = preset(name)(features, boxes, 7, 1 / 16)
        with torch.autocast("cuda", torch.bfloat16):
            cast = preset(name)(features, boxes, 7, 1 / 16)
        assert cast.dtype == dtype
        assert torch.equal(cast, plain)
