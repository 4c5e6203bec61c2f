from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, roi_align

from roi_quantization import ops
from roi_quantization.ops import functional
from roi_quantization.roi_heads import MultiScaleRoIExtractor, RoIExtractor
from roi_quantization.roi_heads import extractor as extractor_module
from roi_quantization.roi_heads.extractor import replaced_operator

align = partial(roi_align, sampling_ratio=2, aligned=True)


def test_the_operator_gets_scale_and_size():
    """A map whose cells hold their own x at stride 16: the mean over a box is its centre, in cells."""
    features = torch.arange(8.0).expand(1, 1, 8, 8)
    boxes = [torch.tensor([[32.0, 16.0, 96.0, 80.0]])]  # x from cell edge 2 to cell edge 6: centre 4, the value there is 3.5
    pooled = RoIExtractor(align, output_size=2, spatial_scale=1 / 16)(features, boxes)
    assert pooled.shape == (1, 1, 2, 2)
    assert pooled.mean().item() == pytest.approx(3.5)


def test_any_callable_is_an_operator():
    def corners(features, boxes, output_size, spatial_scale):
        return torch.cat(boxes)[:, :, None, None] * spatial_scale

    pooled = RoIExtractor(corners, output_size=1, spatial_scale=0.5)(torch.zeros(1, 4, 2, 2), [torch.tensor([[2.0, 4.0, 6.0, 8.0]])])
    assert pooled.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "operator",
    [
        ops.RoIAlign(7, 1 / 16, 2),
        ops.RoIWarp(7, 1 / 16),
        ops.PrRoIPool,
        torchvision.ops.RoIPool(7, 1 / 16),
        torchvision.ops.PSRoIAlign(7, 1 / 16, 2),
        MultiScaleRoIAlign(["0"], 7, 2),
        RoIExtractor(align, 7, 1 / 16),
    ],
    ids=lambda operator: getattr(operator, "__name__", type(operator).__name__),
)
def test_a_module_in_the_place_of_a_function_is_an_error(operator):
    for make in (lambda: RoIExtractor(operator, 7, 1 / 16), lambda: MultiScaleRoIExtractor(operator, MultiScaleRoIAlign(["0"], 7, 2))):
        with pytest.raises(ValueError, match=r"operator: got \w+, which has an output size and a scale of its own\. Expected a function"):
            make()


def test_other_arguments_of_another_type_are_named():
    with pytest.raises(ValueError, match=r"operator: got 'align'\. Expected a function, such as functools\.partial"):
        RoIExtractor("align", 7, 1 / 16)
    with pytest.raises(ValueError, match=r"spatial_scale=\(0.0625, 0.0625\): expected cells per pixel"):
        RoIExtractor(align, 7, (1 / 16, 1 / 16))
    with pytest.raises(ValueError, match=r"pooler: expected the MultiScaleRoIAlign .* detector\.roi_heads\.box_roi_pool, got functools"):
        MultiScaleRoIExtractor(align, align)


@pytest.mark.parametrize("base", [nn.Module, ops.RoIAlign])
def test_a_module_of_ones_own_that_is_called_as_an_operator_is_one(base):
    class Mine(base):
        def forward(self, features, boxes, output_size, spatial_scale):
            return align(features, boxes, output_size, spatial_scale)

    features, boxes = torch.rand(1, 3, 8, 8), [torch.tensor([[0.0, 0.0, 64.0, 48.0]])]
    mine = Mine() if base is nn.Module else Mine(7, 1 / 16, 2)
    assert torch.equal(RoIExtractor(mine, 7, 1 / 16)(features, boxes), align(features, boxes, 7, 1 / 16))


def test_bins_need_not_be_as_many_in_height_as_in_width():
    features, boxes = torch.rand(1, 3, 8, 8), [torch.tensor([[0.0, 0.0, 64.0, 48.0]])]
    for size in ((7, 5), [7, 5], torch.Size([7, 5])):
        extractor = RoIExtractor(align, size, 1 / 16)
        assert torch.equal(extractor(features, boxes), align(features, boxes, (7, 5), 1 / 16))
        assert "output_size=(7, 5)" in repr(extractor)
    assert RoIExtractor(align, np.int64(7), 1 / 16)(features, boxes).shape == (1, 3, 7, 7)
    with pytest.raises(ValueError, match="output_size: expected a positive int or two of them"):
        RoIExtractor(align, (7, 0), 1 / 16)


def test_a_map_by_name_is_that_map_and_two_are_an_error():
    features, boxes = torch.rand(1, 3, 8, 8), [torch.tensor([[0.0, 0.0, 64.0, 64.0]])]
    extractor = RoIExtractor(align, output_size=7, spatial_scale=1 / 16)
    assert torch.equal(extractor({"0": features}, boxes), extractor(features, boxes))
    with pytest.raises(ValueError, match="one feature map, the backbone gives 2: fine, coarse"):
        extractor({"fine": features, "coarse": features}, boxes)


def test_it_stands_in_torchvisions_faster_rcnn():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=16, padding=1), nn.ReLU())
    backbone.out_channels = 8
    detector = FasterRCNN(
        backbone,
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((32,),), ((1.0,),)),
        box_roi_pool=RoIExtractor(align, output_size=3, spatial_scale=1 / 16),
        min_size=64,
        max_size=64,
    )
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    losses = detector([torch.rand(3, 64, 64)], targets)
    sum(losses.values()).backward()
    assert backbone[0].weight.grad.abs().sum() > 0
    assert set(detector.eval()([torch.rand(3, 64, 64)])[0]) == {"boxes", "labels", "scores"}


@pytest.mark.parametrize(
    ("stride", "scale", "message"),
    [
        (
            32,
            1 / 16,
            r"spatial_scale=1/16: the map has 8 x 10 cells for images of 256 x 320 pixels \(height x width\), and about 16 x 20 "
            r"are expected\. The scale is the number of cells per pixel, 1 / stride\. Set spatial_scale=1/32",
        ),
        (16, 16, r"spatial_scale=16: the map has 16 x 20 cells .* about 4096 x 5120 are .* Set spatial_scale=1/16"),
        (16, 1 / 32, r"spatial_scale=1/32: .* Set spatial_scale=1/16"),
        (8, 1, r"spatial_scale=1: .* Set spatial_scale=1/8"),
    ],
)
def test_a_scale_that_does_not_fit_the_map_is_an_error(stride, scale, message):
    features, boxes = torch.rand(2, 3, 256 // stride, 320 // stride), [torch.tensor([[0.0, 0.0, 64.0, 64.0]])] * 2
    extractor = RoIExtractor(align, 2, scale)
    for given in (features, {"0": features}):
        with pytest.raises(ValueError, match=message):
            extractor(given, boxes, [(256, 200), (180, 320)])
    assert extractor(features, boxes).shape == (2, 3, 2, 2), "without the sizes of the images nothing is known"
    assert RoIExtractor(align, 2, 1 / stride)(features, boxes, [(256, 200), (180, 320)]).shape == (2, 3, 2, 2)


@pytest.mark.parametrize("stride", [1, 4, 8, 16, 32, 64, 14])
def test_a_map_of_any_image_that_is_padded_fits_its_scale(stride):
    """torchvision pads to multiples of 32, `FastRCNN` to those of the stride. Some backbones round sizes up, some lose cells."""
    extractor = RoIExtractor(lambda features, boxes, size, scale: torch.zeros(len(boxes[0]), 1, size, size), 2, 1 / stride)
    boxes = [torch.zeros(1, 4)]
    for height, width in ((1, 1), (5, 90), (33, 33), (97, 600), (600, 1001), (1333, 800)):
        for multiple in (32, stride):
            padded = [-(-side // multiple) * multiple for side in (height, width)]
            for cells in ([side // stride for side in padded], [-(-side // stride) for side in padded], [s // stride - 3 for s in padded]):
                if min(cells) > 0:
                    extractor(torch.zeros(1, 1, *cells), boxes, [(height, width)])
    fixed = -(-1024 // stride)  # all images padded to one size, for graphs of a fixed size
    extractor(torch.zeros(1, 1, fixed, fixed), boxes, [(600, 1001)])


@pytest.mark.filterwarnings("ignore")  # of tracing
def test_the_scale_is_not_looked_at_in_graphs():
    """What cannot be read without waiting or without a guard: sizes that are symbols or tensors, and code that is compiled."""
    extractor = RoIExtractor(align, 2, 1 / 16)
    maps, boxes = torch.rand(1, 3, 8, 10), [torch.tensor([[0.0, 0.0, 64.0, 64.0]])]

    def pool(features, boxes):
        return extractor(features, [boxes], [(256, 320)])

    expected = extractor(maps, boxes)
    assert torch.equal(torch.compile(pool, backend="eager", fullgraph=True)(maps, *boxes), expected)
    assert torch.equal(torch.jit.trace(pool, (maps, *boxes), check_trace=False)(maps, *boxes), expected)
    assert torch.equal(extractor(maps, boxes, torch.tensor([[256, 320]])), expected)


def pyramid():
    """Four maps of two images with boxes for all levels, on the border between two, and none in the second image."""
    torch.manual_seed(0)
    maps = {str(level): torch.rand(2, 3, 256 // stride, 192 // stride, requires_grad=True) for level, stride in enumerate((4, 8, 16, 32))}
    sides = torch.tensor([5.0, 55.9, 56.0, 56.1, 111.9, 112.0, 150.0])
    return (
        maps,
        [torch.stack([sides / 9, sides / 5, sides / 9 + sides, sides / 5 + sides], dim=1), torch.zeros(0, 4)],
        [(250, 190), (256, 180)],
    )


@pytest.mark.parametrize("names", [["0", "1", "2", "3"], ["1", "2"], ["2"]], ids=str)
def test_boxes_are_read_from_the_levels_that_torchvision_reads(names):
    pooler = MultiScaleRoIAlign(names, output_size=(3, 2), sampling_ratio=2, canonical_scale=112)
    maps, boxes, shapes = pyramid()
    expected = pooler(maps, boxes, shapes)
    pooled = MultiScaleRoIExtractor(partial(roi_align, sampling_ratio=2, aligned=False), pooler)(maps, boxes, shapes)
    assert torch.equal(pooled, expected)
    used = [maps[name] for name in names]
    for mine, its in zip(*(torch.autograd.grad(one.square().sum(), used) for one in (pooled, expected)), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("operator", [partial(ops.roi_align, sampling_ratio=2), align], ids=["ours", "torchvision's"])
@pytest.mark.parametrize("edge", [torch.nan, torch.inf])
def test_an_invalid_box_of_a_pyramid_is_an_error_that_counts_all_boxes(operator, edge):
    maps, (boxes, _), shapes = pyramid()
    boxes[2, 0] = edge
    extractor = MultiScaleRoIExtractor(operator, MultiScaleRoIAlign(["0", "1", "2", "3"], 2, 2))
    with pytest.raises(ValueError, match=rf"boxes: box 5 is \[{edge}, .* must be finite"):
        extractor(maps, [torch.tensor([[0.0, 0, 20, 20]] * 3), boxes], shapes)


def test_on_other_devices_an_invalid_box_of_a_pyramid_is_nan(monkeypatch):
    """They do not look at boxes, because that would wait for the device. torchvision gives zeros."""
    for module in (extractor_module, functional):
        monkeypatch.setattr(module, "check_boxes", lambda image, *_: image)
    monkeypatch.setattr(functional, "_has_kernels", lambda features: False)
    maps, _, shapes = pyramid()
    boxes = torch.tensor([[0, 0, 20, 20], [torch.nan, 0, 20, 20], [0, 0, torch.inf, 20], [0, torch.inf, 0, torch.inf], [0, 0, 150, 150]])
    extractor = MultiScaleRoIExtractor(ops.roi_align, MultiScaleRoIAlign(["0", "1", "2", "3"], 2, 2, canonical_scale=112))
    pooled, alone = extractor(maps, [boxes, boxes[:1]], shapes), extractor(maps, [boxes[[0, 4]], boxes[:1]], shapes)
    assert pooled.flatten(1).isnan().all(1).tolist() == [False, True, True, True, False, False]
    assert torch.equal(pooled[[0, 4, 5]], alone)


@pytest.mark.parametrize(
    "operator", [partial(ops.roi_align, sampling_ratio=2, aligned=True), ops.roi_pool, align], ids=["align", "pool", "torchvision's"]
)
def test_a_box_of_a_pyramid_that_is_reversed_along_one_axis_is_read_from_the_finest_map(operator):
    maps, _, shapes = pyramid()
    boxes = [torch.tensor([[90.0, 10, 20, 100], [10, 90, 120, 20]]), torch.zeros(0, 4)]
    pooled = MultiScaleRoIExtractor(operator, MultiScaleRoIAlign(["0", "1", "2", "3"], 2, 2))(maps, boxes, shapes)
    assert torch.equal(pooled, operator(maps["0"], boxes, 2, 1 / 4))
    assert (pooled.flatten(1).abs().sum(1) > 0).all()


def test_a_box_whose_level_has_no_map_is_read_from_the_coarsest():
    """Scales of 1/4 and 1/16 are three levels for torchvision, which leaves the output of the third 0."""
    maps, (boxes, none), shapes = pyramid()
    pooled = MultiScaleRoIExtractor(align, MultiScaleRoIAlign(["0", "2"], 2, 2, canonical_scale=56))(maps, [boxes[-1:], none], shapes)
    assert torch.equal(pooled, align(maps["2"], [boxes[-1:], none], 2, 1 / 16))


def test_maps_of_a_pyramid_that_are_absent_or_in_another_order_are_an_error():
    maps, boxes, shapes = pyramid()
    extractor = MultiScaleRoIExtractor(align, MultiScaleRoIAlign(["0", "1"], 2, 2))
    with pytest.raises(ValueError, match="features: expected some of the maps 0, 1, got 2"):
        extractor({"2": maps["2"]}, boxes, shapes)
    with pytest.raises(ValueError, match="expected the finest map first, got the scales 1/8, 1/4: reverse them"):
        extractor({"1": maps["1"], "0": maps["0"]}, boxes, shapes)


def test_the_number_of_samples_is_the_operators_not_the_poolers():
    """As its docstring and docs/recipes.md say."""
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=3, sampling_ratio=2, canonical_scale=112)
    maps, boxes, shapes = pyramid()
    expected = pooler(maps, boxes, shapes)
    same = partial(ops.roi_align, sampling_ratio=pooler.sampling_ratio)
    torch.testing.assert_close(MultiScaleRoIExtractor(same, pooler)(maps, boxes, shapes), expected, rtol=0, atol=1e-5)
    for other in (ops.roi_align, partial(same, aligned=True)):
        assert (MultiScaleRoIExtractor(other, pooler)(maps, boxes, shapes) - expected).abs().max() > 0.01


def test_a_level_has_its_scale_and_an_operator_its_size():
    calls = []

    def operator(features, boxes, output_size, spatial_scale):
        calls.append((len(torch.cat(boxes)), spatial_scale, output_size))
        return align(features, boxes, 5, spatial_scale)

    extractor = MultiScaleRoIExtractor(operator, MultiScaleRoIAlign(["0", "1", "2", "3"], 5, 2, canonical_scale=112))
    extractor(*pyramid())
    assert calls == [(2, 1 / 4, 5), (3, 1 / 8, 5), (2, 1 / 16, 5), (0, 1 / 32, 5)]
    for other in (MultiScaleRoIExtractor(operator, MultiScaleRoIAlign(["0"], 7, 2)), RoIExtractor(operator, 7, 1 / 4)):
        maps, boxes, shapes = pyramid()
        with pytest.raises(
            ValueError, match=r"the RoI operator gives 5 x 5 bins, the head wants 7 x 7\. Let it use its argument output_size"
        ):
            other({"0": maps["0"]}, boxes, shapes)


def test_another_operator_for_a_while():
    model = nn.ModuleList([RoIExtractor(align, 7, 1 / 16), MultiScaleRoIExtractor(align, MultiScaleRoIAlign(["0"], 7, 2)), nn.Identity()])
    with pytest.raises(KeyError), replaced_operator(model, sum):
        assert [extractor.operator for extractor in model[:2]] == [sum, sum]
        raise KeyError
    assert [extractor.operator for extractor in model[:2]] == [align, align]
