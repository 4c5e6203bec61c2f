"""Torchvision's operators with this package's kernels behind them."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import roi_quantization
from roi_quantization.ops import acceleration
from roi_quantization.ops.acceleration import accelerate_torchvision

KERNELS = {"roi_align": 0, "_roi_align_backward": 0, "roi_pool": 0, "_roi_pool_backward": 0}


@pytest.fixture
def calls(monkeypatch):
    """How often each of our kernels ran."""
    counted = dict(KERNELS)

    def counting(name, kernel):
        def call(*arguments):
            counted[name] += 1
            return kernel(*arguments)

        return call

    counting_kernels = {name: counting(name, kernel) for name, kernel in acceleration._KERNELS.items()}
    monkeypatch.setattr(acceleration, "_KERNELS", counting_kernels)
    return counted


OPERATORS = {
    "roi_align": lambda f, b: torchvision.ops.roi_align(f, b, (3, 5), 1 / 8, 2, True),
    "roi_align, adaptive": lambda f, b: torchvision.ops.roi_align(f, b, 4, 1 / 8),
    "roi_pool": lambda f, b: torchvision.ops.roi_pool(f, b, (3, 5), 1 / 8),
}


def inputs(dtype=torch.float64):
    noise = torch.Generator().manual_seed(0)
    features = torch.randn(2, 19, 12, 17, generator=noise, dtype=torch.float64).to(dtype)
    corner = torch.rand(30, 2, generator=noise) * 130 - 20
    boxes = torch.cat([corner, corner + torch.rand(30, 2, generator=noise) * 90], 1).to(dtype)
    return features, [boxes[:13], boxes[13:]]


def with_gradient(operator, features, boxes):
    features = features.clone().requires_grad_()
    out = operator(features, boxes)
    (gradient,) = torch.autograd.grad(out, features, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    return out.detach(), gradient


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_values_and_gradients_are_torchvisions(operator, dtype, tolerance, channels_last, calls):
    features, boxes = inputs(dtype)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    expected = with_gradient(operator, features, boxes)
    with accelerate_torchvision():
        found = with_gradient(operator, features, boxes)
    assert sum(calls.values()) == 2, "forward and backward ran here"
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_argmax_of_roi_pool_is_torchvisions(calls):
    features, boxes = inputs()
    rois = torch.cat([torch.cat([torch.full((len(b), 1), i), b], 1) for i, b in enumerate(boxes)])
    expected = torch.ops.torchvision.roi_pool(features, rois, 1 / 8, 3, 5)
    with accelerate_torchvision():
        found = torch.ops.torchvision.roi_pool(features, rois, 1 / 8, 3, 5)
    assert calls["roi_pool"] == 1
    assert (expected[1] == -1).any() and (expected[1] > 0).any()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_no_boxes(operator, calls):
    features, _ = inputs()
    expected = with_gradient(operator, features, [torch.zeros(0, 4, dtype=torch.float64)] * 2)
    with accelerate_torchvision():
        found = with_gradient(operator, features, [torch.zeros(0, 4, dtype=torch.float64)] * 2)
    assert sum(calls.values()) == 2
    torch.testing.assert_close(found, expected)


def test_restore_brings_back_torchvisions_kernels(calls):
    features, boxes = inputs()
    replaced = accelerate_torchvision()
    torchvision.ops.roi_pool(features, boxes, 2)
    replaced.restore()
    replaced.restore()
    before = torchvision.ops.roi_align(features, boxes, 2)
    assert calls == KERNELS | {"roi_pool": 1}
    with pytest.raises(ZeroDivisionError), accelerate_torchvision():
        _ = 1 / 0
    assert torch.equal(torchvision.ops.roi_align(features, boxes, 2), before)
    assert calls == KERNELS | {"roi_pool": 1}, "an error in the block restores too"


def test_accelerate_torchvision_is_an_attribute_of_the_package():
    assert roi_quantization.accelerate_torchvision is accelerate_torchvision
    assert "accelerate_torchvision" in dir(roi_quantization)
    with pytest.raises(AttributeError, match="no attribute 'accelerate'"):
        _ = roi_quantization.accelerate


def test_a_second_replacement_is_refused(calls):
    features, boxes = inputs()
    with accelerate_torchvision():
        with pytest.raises(RuntimeError, match="replaced already"):
            accelerate_torchvision()
        torchvision.ops.roi_pool(features, boxes, 2)
    assert calls["roi_pool"] == 1, "the first goes on"
    with accelerate_torchvision():
        pass


def test_another_torchvision_is_refused_and_left_alone(monkeypatch, calls):
    monkeypatch.setitem(acceleration._SCHEMAS, "_roi_pool_backward", "(Tensor grad) -> Tensor")
    with pytest.raises(RuntimeError, match=r"has another operator _roi_pool_backward .* Nothing was replaced"):
        accelerate_torchvision()
    features, boxes = inputs()
    torchvision.ops.roi_align(features, boxes, 2)
    assert calls == KERNELS


def test_an_invalid_box_is_an_error(calls):
    features, boxes = inputs()
    boxes[0][3, 2] = float("nan")
    with accelerate_torchvision(), pytest.raises(ValueError, match="box 3"):
        torchvision.ops.roi_align(features, boxes, 2)


def small_mask_rcnn():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.ReLU())
    backbone.out_channels = 16
    anchors = AnchorGenerator(sizes=((16, 32),), aspect_ratios=((1.0,),))
    detector = MaskRCNN(
        backbone, num_classes=3, min_size=96, max_size=128, rpn_anchor_generator=anchors, box_score_thresh=0.0,
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2), mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
    )  # fmt: skip
    image = torch.rand(3, 96, 128)
    target = {"boxes": torch.tensor([[8.0, 8.0, 70.0, 60.0]]), "labels": torch.tensor([1]), "masks": torch.ones(1, 96, 128).byte()}
    return detector, image, target


def test_a_detector_finds_the_same(calls):
    detector, image, _ = small_mask_rcnn()
    detector.eval()
    with torch.no_grad():
        expected = detector([image])
        with accelerate_torchvision():
            found = detector([image])
    assert calls["roi_align"] == 2 and len(expected[0]["boxes"]) > 10, "boxes and masks"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_training_step_has_the_same_gradients(calls):
    detector, image, target = small_mask_rcnn()
    detector, image, target["boxes"] = detector.double(), image.double(), target["boxes"].double()

    def gradients():
        detector.zero_grad()
        torch.manual_seed(1)  # of the sampled RoIs
        sum(detector([image], [target]).values()).backward()
        return {name: p.grad.clone() for name, p in detector.named_parameters()}

    expected = gradients()
    with accelerate_torchvision():
        found = gradients()
    assert calls["_roi_align_backward"] == 2, "of boxes and of masks"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-9 * float(gradient.abs().max()), msg=name)


def test_compiled_code_calls_it_too(calls):
    features, boxes = inputs(torch.float32)
    expected = torchvision.ops.roi_align(features, boxes, 2, 1 / 8)
    with accelerate_torchvision():
        compiled = torch.compile(lambda f, b: torchvision.ops.roi_align(f, b, 2, 1 / 8), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(features, boxes), expected, rtol=1e-5, atol=1e-5)
    assert calls["roi_align"] >= 1
