"""The Triton kernel of the geometry against `ops/geometry.py`: on a GPU or, without one, under Triton's interpreter."""

from dataclasses import astuple

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from roi_quantization.ops import functional, library
from roi_quantization.ops.cuda import kernels as cuda
from roi_quantization.ops.geometry import IntegralRule, LatticeRule
from roi_quantization.ops.inputs import mask_invalid_boxes

from .presets import AWKWARD, preset, random_boxes, rule_of
from .test_against_reference import KNOBS, feature_map
from .test_cuda import DEVICE, ONE_OF_EACH, triton_kernels  # noqa: F401 - a fixture of every test

WHOLE_CELLS = torch.tensor([[0, 0.0, 0.0, 16.0 * side, 16.0 * side] for side in range(64)])
"""Boxes where the last bit of a quotient decides which cells a bin has."""
OVERFLOWING = torch.tensor(
    [[0, -3e38, 0, 3e38, 9], [0, 1e30, 1e30, 2e38, 3e38], [0, 1e-40, 0, 2e-40, 1e-45], [0, torch.nan, 1, 2, 3], [9, 0, 0, 9, 9]]
)
RULES = {
    **{p.id: p.values[0] for p in KNOBS},
    "border and offset": preset("align", border=0.3, sample_offset=0.1, sampling_ratio=3),
    "adaptive with a border": preset("warp", border=0.7, sampling_ratio=-1),
    "more samples than are tested": preset("align", sampling_ratio=20, min_extent=2.7),
    "endless border": preset("align", border=2**28),
    "mean of floored cells": preset("pool_floor", inclusive_end=True),
}


@pytest.mark.parametrize("name", RULES)
def test_the_kernel_of_the_geometry_has_the_bits_of_geometry_py(name, monkeypatch):
    monkeypatch.setattr(cuda, "BINS_PLACED", 4096)  # few programs are quick under the interpreter
    rule = rule_of(RULES[name])
    boxes = torch.cat([random_boxes(300, 2, 1008, 608).float(), AWKWARD.float(), WHOLE_CELLS, OVERFLOWING])
    for scale, bins in ((1 / 16, (7, 6)), (1 / 12, (14, 1)), (0.3, (3, 7))):
        image, box = mask_invalid_boxes(boxes[:, 0], boxes[:, 1:], 2)
        y, x = rule.axis(box[:, 1], box[:, 3], scale, bins[0], 38), rule.axis(box[:, 0], box[:, 2], scale, bins[1], 63)
        on_device = boxes.to(DEVICE)
        found = cuda.place_boxes(rule, on_device[:, 0], on_device[:, 1:], scale, 2, bins, [38, 63])
        expected = (y[0], y[1], y[3], y[2], x[0], x[1], x[3], x[2]) if isinstance(rule, LatticeRule) else (*y, *x)
        of_x = [] if isinstance(rule, IntegralRule) else [found[4]]
        of_y = [] if isinstance(rule, IntegralRule) else [found[2]]
        assert torch.equal(found[0].cpu(), image)
        for a, b in zip((*found[1], *of_y, *found[3], *of_x), expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


def test_the_geometry_takes_images_as_integers_and_no_boxes():
    box = random_boxes(3, 2, 96, 80).float().to(DEVICE)
    rule = LatticeRule()
    for image in (box[:, 0], box[:, 0].long()):
        assert torch.equal(cuda.place_boxes(rule, image, box[:, 1:], 0.5, 2, [2, 3], [5, 6])[0], box[:, 0].long())
    empty = cuda.place_boxes(rule, box[:0, 0], box[:0, 1:], 0.5, 2, [2, 3], [5, 6])
    assert [tuple(t.shape) for t in empty] == [(0,), (3, 0, 2), (0, 2), (3, 0, 3), (0, 3)]


@pytest.mark.parametrize("rois", [1, 2, 3, 5])
def test_placed_planes_are_aligned_and_have_the_strides_of_the_fake_ones(rois):
    """Triton would compile each kernel anew for pointers that are no multiple of 16 bytes."""
    image, box = torch.zeros(rois, device=DEVICE), torch.zeros(rois, 4, device=DEVICE)
    lattices = cuda.place_boxes(LatticeRule(), image, box, 0.5, 1, [3, 7], [5, 6])
    _, low_high_y, _, low_high_x, _ = cuda.place_boxes(IntegralRule(), image, box, 0.5, 1, [3, 7], [5, 6])
    planes = [*lattices[1], *lattices[3], *low_high_y, *low_high_x]
    assert {plane.data_ptr() % 16 for plane in planes} == {0}
    assert all(plane.is_contiguous() for plane in planes)
    fakes = library.place_lattice(image.to("meta"), box.to("meta"), 0.5, 1, [3, 7], [5, 6], *astuple(LatticeRule()))
    assert [(t.shape, t.stride(), t.dtype) for t in fakes] == [(t.shape, t.stride(), t.dtype) for t in lattices]
    fakes = library.place_edges(image.to("meta"), box.to("meta"), 0.5, 1, [3, 7], False)
    assert [t.stride() for t in fakes[1:]] == [low_high_y.stride(), low_high_x.stride()]


@pytest.mark.parametrize("operator", ONE_OF_EACH[::3])
def test_boxes_placed_by_the_kernel_give_the_same_output(operator, monkeypatch):
    """What a call on a GPU does, whose device a test cannot pretend: place by the kernel, then pool."""
    features, boxes = feature_map(2, 3, 6, 7, dtype=torch.float32).to(DEVICE), random_boxes(2, 2, 112, 96).float().to(DEVICE)
    expected = operator(features, boxes, 3, 1 / 16)

    def place(image, box, scale, images, bins, size, *knobs):
        rule = LatticeRule(*knobs)
        return cuda.place_boxes(rule, image, box, scale, images, bins, size)

    def place_integral(image, box, scale, images, bins, half_pixel):
        image, y, _, x, _ = cuda.place_boxes(IntegralRule(half_pixel), image, box, scale, images, bins, [1, 1])
        return image, y, x

    monkeypatch.setattr(library, "place_lattice", place)
    monkeypatch.setattr(library, "place_edges", place_integral)
    monkeypatch.setattr(functional, "places_by_kernel", lambda features, box: True)
    assert torch.equal(operator(features, boxes, 3, 1 / 16), expected)


def test_other_numbers_of_boxes_placed_by_the_kernel_are_not_compiled_anew(monkeypatch):
    monkeypatch.setattr(functional, "places_by_kernel", lambda features, box: True)
    features, graphs = torch.zeros(2, 3, 6, 7, device=DEVICE), []

    def placed(boxes):
        _, y, x = functional.place_bins(LatticeRule(), features, boxes, 3, 1 / 16)
        return y.first.sum() + y.step.sum() + x.total.sum()

    torch.compiler.reset()
    compiled = torch.compile(placed, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs))
    kernel = torch.library.Library("roi_quantization", "IMPL")  # until the end of the test
    if DEVICE == "cpu":
        kernel.impl("place_lattice", library.place_lattice._init_fn, "CPU")
    for rois in (5, 9, 12, 3):
        boxes = random_boxes(rois, 2, 112, 96).float().to(DEVICE)
        torch.testing.assert_close(compiled(boxes), placed(boxes))
    assert len(graphs) <= 2
