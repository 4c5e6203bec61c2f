"""The operators under `torch.compile` and autocast: one graph for any number of boxes, and the geometry compiled to one kernel."""

import pytest
import torch
from torch import nn

from roi_quantization import ops
from roi_quantization.ops import library
from roi_quantization.ops.functional import fused
from roi_quantization.ops.geometry import IntegralRule, LatticeRule

from .presets import AWKWARD, PRESETS, WITHOUT_BOX_GRADIENT, preset, random_boxes
from .test_against_reference import feature_map


class Pooled(nn.Module):
    """A model around an operator, with something to train before it."""

    def __init__(self, operator, bins=3) -> None:
        super().__init__()
        self.operator, self.bins, self.before = operator, bins, nn.Conv2d(3, 4, 1)

    def forward(self, images, boxes):
        return self.operator(self.before(images), boxes, self.bins, 1 / 16).relu().sum((1, 2, 3))


def in_ci(*names: str) -> list:
    """All presets, those beside `names` marked slow: compiling takes seconds."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in sorted(PRESETS)]


@pytest.mark.parametrize("name", in_ci("align_adaptive", "pool", "pool_floor", "prroi", "warp_max"))
def test_a_model_compiles_to_one_graph_and_recompiles_once_at_most_for_other_numbers_of_boxes(name):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model, images = Pooled(preset(name)), feature_map(2, 3, 8, 10, dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for count in (5, 9, 12, 30):
        boxes = random_boxes(count, 2, 160, 128).float().requires_grad_(name not in WITHOUT_BOX_GRADIENT)
        out = compiled(images, boxes)
        torch.testing.assert_close(out, model(images, boxes))
        out.sum().backward()
        assert model.before.weight.grad.abs().sum() > 0
    assert len(graphs) <= 2


@pytest.mark.parametrize("name", ["align", "pool", "prroi"])
def test_gradients_through_the_compiler(name):
    torch.compiler.reset()
    model, images, boxes = Pooled(preset(name)), feature_map(2, 3, 8, 10, dtype=torch.float32), random_boxes(6, 2, 160, 128).float()
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(images, boxes).sum().backward()
        gradients.append(model.before.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", in_ci("pool_bins"))
def test_the_geometry_as_one_kernel_has_the_same_bits(name):
    """Compiled for this CPU here; for a GPU in test_on_gpu. Once for all numbers of boxes, bins and cells."""
    rule = rule_of(name)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for count, height, width, bins in ((9, 38, 50, 7), (100, 50, 38, 7), (3, 20, 31, 14)):
        box = torch.cat([random_boxes(count, 1, 16 * width, 16 * height), AWKWARD])[:, 1:].float()
        _, y, x = fused(rule, 1 / 16)(torch.zeros(len(box)), box, 1, bins, bins, height, width)
        expected = (
            *rule.axis(box[:, 1], box[:, 3], 1 / 16, bins, height),
            *rule.axis(box[:, 0], box[:, 2], 1 / 16, bins, width),
        )
        assert all(torch.equal(a, b) for a, b in zip((*y, *x), expected, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 1


@torch._dynamo.config.patch(recompile_limit=2)
def test_each_geometry_has_its_own_compiled_variants(monkeypatch):
    """PyTorch keeps eight variants of a function (here two) and compiles no more: operators must not share them."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, options: original(function, dynamic=dynamic, backend="eager"))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for samples in (1, 2, 3):
        geometry = fused.__wrapped__(LatticeRule(sampling_ratio=samples), 1 / 16)
        for count, images in ((9, 2), (100, 3)):
            geometry(torch.zeros(count), torch.rand(count, 4), images, 7, 7, 38, 50)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 3


def rule_of(name: str) -> LatticeRule | IntegralRule:
    knobs = {k: v for k, v in preset(name).keywords.items() if k != "reduce"}
    return LatticeRule(**knobs) if len(knobs) > 1 else IntegralRule(**knobs)


@pytest.mark.parametrize("name", ["align", "align_max", "pool", "prroi"])
def test_under_autocast_the_result_has_the_dtype_of_the_features(name):
    boxes = random_boxes(4, 2, 160, 128).float()
    for dtype in (torch.float32, torch.bfloat16):
        features = feature_map(2, 3, 8, 10, dtype=dtype)
        plain = preset(name)(features, boxes, 3, 1 / 16)
        with torch.autocast("cpu", torch.bfloat16):
            cast = preset(name)(features, boxes, 3, 1 / 16)
        assert cast.dtype == dtype
        assert torch.equal(cast, plain)


def test_a_device_without_kernels_is_logged_once(caplog, monkeypatch):
    ops.functional._warn_of_plain_pytorch.cache_clear()
    monkeypatch.setattr(library, "supports", lambda features: False)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            ops.functional._has_kernels(torch.zeros(1, 2, 4, 4))
    assert [r.message for r in caplog.records] == [
        "no kernels for torch.float32 on cpu: the RoI operators run in plain PyTorch, which is slower and takes more memory"
    ]
