"""What torchvision tests of its own RoIPool and RoIAlign, asked of ours with the same parameters.

Not asked: TorchScript (half of each test of the backward pass, and of the lists of boxes), quantized tensors, MPS; see docs/kernels.md.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import get_graph_node_names

from roi_quantization import ops

BOXES = [[0, 0, 0, 9, 9], [0, 0, 5, 4, 9], [0, 5, 5, 9, 9], [1, 0, 0, 9, 9]]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
CONTIGUOUS = pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "transposed"])
MODULES = {
    "RoIPool": lambda size: ops.RoIPool(size, 1),
    "RoIAlign": lambda size: ops.RoIAlign(size, spatial_scale=1, sampling_ratio=-1),
    "RoIAlign-aligned": lambda size: ops.RoIAlign(size, spatial_scale=1, sampling_ratio=-1, aligned=True),
}


def pool_bin(feature: Tensor, y: tuple[float, float], x: tuple[float, float]) -> Tensor:
    rows, columns = (slice(math.floor(low), math.ceil(high)) for low, high in (y, x))
    return feature[:, rows, columns].amax((1, 2))


def align_bin(feature: Tensor, y: tuple[float, float], x: tuple[float, float]) -> Tensor:
    """The mean of `ceil(extent)` samples a side."""

    def samples(low, high):
        count = math.ceil(high - low)
        return [low + (i + 0.5) * (high - low) / count for i in range(count)]

    values = [sample(feature, v, h) for v in samples(*y) for h in samples(*x)]
    return sum(values) / len(values)


def sample(feature: Tensor, y: float, x: float) -> Tensor:
    """Bilinear; positions beyond an outermost centre are moved onto it, as all of them here are less than a cell beyond."""
    y, x = (min(max(v, 0), size - 1) for v, size in zip((y, x), feature.shape[1:], strict=True))
    total = torch.zeros(len(feature), dtype=feature.dtype)
    for row in {math.floor(y), math.ceil(y)}:
        for column in {math.floor(x), math.ceil(x)}:
            total += (1 - abs(y - row)) * (1 - abs(x - column)) * feature[:, row, column]
    return total


def by_hand(name: str, features: Tensor, bins: int) -> Tensor:
    """The definition, bin by bin in float64, for boxes inside the map with whole edges."""
    rows = []
    for image, x1, y1, x2, y2 in BOXES:
        offset, longer = {"RoIPool": (0, 1), "RoIAlign": (0, 0), "RoIAlign-aligned": (0.5, 0)}[name]
        reduce = pool_bin if name == "RoIPool" else align_bin

        def edges(low, high, p, offset=offset, longer=longer):
            size = (high + longer - low) / bins
            return low - offset + p * size, low - offset + (p + 1) * size

        of_bins = [reduce(features[image].double(), edges(y1, y2, p), edges(x1, x2, q)) for p in range(bins) for q in range(bins)]
        rows.append(torch.stack(of_bins, 1).unflatten(1, (bins, bins)))
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODULES)
@CONTIGUOUS
@DTYPES
def test_forward(name, contiguous, dtype):
    features = torch.rand(2, 50, 10, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    features = features if contiguous else features.transpose(2, 3)
    out = MODULES[name]((5, 5))(features, torch.tensor(BOXES, dtype=dtype))
    assert out.dtype == dtype
    tolerance = 4e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(out.double(), by_hand(name, features, 5), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "operator", [lambda f, b: ops.roi_pool(f, b, 2), lambda f, b: ops.roi_align(f, b, 2, 1, 1)], ids=["roi_pool", "roi_align"]
)
@CONTIGUOUS
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))])
def test_backward(operator: Callable[[Tensor, Tensor], Tensor], contiguous, seed):
    features = torch.rand(1, 8, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0, 0, 0, 4, 4], [0, 0, 2, 3, 4], [0, 2, 2, 4, 4]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: operator(f if contiguous else f.transpose(2, 3), boxes), (features,), atol=1e-5)


class Called(nn.Module):
    def __init__(self, operator: nn.Module) -> None:
        super().__init__()
        self.layer = operator

    def forward(self, features: Tensor, boxes: Tensor) -> None:
        self.layer(features, boxes)


@pytest.mark.parametrize("name", MODULES)
def test_fx_traces_one_node(name):
    training, evaluation = get_graph_node_names(Called(MODULES[name](5)))
    assert len(training) == len(evaluation) == 3, "two inputs and the call"


@pytest.mark.parametrize("name", MODULES)
def test_fx_traces(name):
    module, features, boxes = MODULES[name](5), torch.rand(2, 50, 5, 5), torch.tensor(BOXES, dtype=torch.float32)
    assert torch.equal(torch.fx.symbolic_trace(module)(features, boxes), module(features, boxes))


@pytest.mark.parametrize("operator", [ops.roi_pool, ops.roi_align])
@pytest.mark.parametrize("boxes", [torch.zeros(1, 4), [torch.zeros(1, 3)]], ids=["table", "list"])
@pytest.mark.parametrize("error", [AssertionError, ValueError], ids=["torchvision's", "ours"])
def test_boxes_of_another_shape(operator, boxes, error):
    with pytest.raises(error, match="boxes"):
        operator(torch.rand(1, 1, 8, 8), boxes, output_size=(2, 2))


@pytest.mark.parametrize("name", MODULES)
def test_lists_of_boxes_that_are_not_contiguous(name):
    boxes = torch.tensor(BOXES, dtype=torch.float32).t()
    assert MODULES[name]([3, 3])(torch.rand(2, 1, 10, 10), [boxes, boxes]).shape == (10, 1, 3, 3)
