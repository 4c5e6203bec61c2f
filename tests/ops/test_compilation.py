"""The operators under `torch.compile` and autocast: one graph for any number of boxes from two on."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from roi_quantization import ops
from roi_quantization.ops import library

from .presets import PRESETS, WITHOUT_BOX_GRADIENT, preset, random_boxes
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


def test_amd_gpus_run_plain_pytorch(monkeypatch, caplog):
    """They are `cuda` to PyTorch and have Triton, but the kernels ask for limits of registers that only NVIDIA's compiler knows."""
    ops.functional._warn_of_plain_pytorch.cache_clear()
    with FakeTensorMode():
        features = torch.empty(2, 3, 8, 10, device="cuda")
        boxes = torch.empty(4, 4, device="cuda")
        assert ops.functional._has_kernels(features) and ops.functional.places_by_kernel(features, boxes)
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert not (ops.functional._has_kernels(features) or ops.functional.places_by_kernel(features, boxes))
    assert [r.message[:36] for r in caplog.records] == ["no kernels for torch.float32 on cuda"]


def test_a_device_without_kernels_is_logged_once(caplog, monkeypatch):
    ops.functional._warn_of_plain_pytorch.cache_clear()
    monkeypatch.setattr(library, "supports", lambda features: False)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            ops.functional._has_kernels(torch.zeros(1, 2, 4, 4))
    assert [r.message for r in caplog.records] == [
        "no kernels for torch.float32 on cpu: the RoI operators run in plain PyTorch, which is slower and takes more memory"
    ]
