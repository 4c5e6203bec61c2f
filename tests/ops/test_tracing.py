"""The operators exported, traced, on meta and fake tensors and under transforms.

A captured program must work for other boxes, maps and gradients than those it was captured with.
"""

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from roi_quantization import ops

from .test_against_reference import feature_map

OPERATORS = [
    pytest.param(ops.roi_pool, id="pool"),
    pytest.param(partial(ops.roi_align, sampling_ratio=2, aligned=True), id="align"),
    pytest.param(partial(ops.roi_align, reduce="max"), id="align_max-adaptive"),
    pytest.param(ops.prroi_pool, id="prroi"),
]
every_operator = pytest.mark.parametrize("operator", OPERATORS)
FEATURES = feature_map(2, 3, 8, 10, dtype=torch.float32)
BOXES = torch.tensor([[0, 1.0, 2, 60, 70], [1, 3, 4, 90, 100], [1, 10, 10, 50, 60]])
OTHER = torch.tensor([[0, 1.0, 2, 660, 570], [0, 20, 10, 40, 90], [1, 3, 4, 90, 100], [1, 10, 10, 50, 60]])
LARGER = feature_map(2, 3, 40, 50, dtype=torch.float32)
tracing_warns = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Lists(nn.Module):
    """Two images, each with boxes of its own."""

    def __init__(self, operator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, features: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return self.operator(features, [first, second], 3, 1 / 16)


def gradient(call, features: Tensor, *boxes: Tensor) -> Tensor:
    features = features.detach().clone().requires_grad_()
    call(features, *boxes).square().sum().backward()
    return features.grad


def assert_same(captured, model, features: Tensor, *boxes: Tensor) -> None:
    """Output and gradient."""
    assert_close(captured(features, *boxes), model(features, *boxes))
    assert_close(gradient(captured, features, *boxes), gradient(model, features, *boxes))


IN_CI = [("pool", False, False), ("align_max-adaptive", True, False), ("align", False, True), ("prroi", True, True)]  # seconds each
EXPORTS = [
    pytest.param(*p.values, *modes, id=f"{p.id}-{modes}", marks=[] if (p.id, *modes) in IN_CI else [pytest.mark.slow])
    for p in OPERATORS
    for modes in product([False, True], repeat=2)
]


@pytest.mark.parametrize(("operator", "strict", "with_gradient"), EXPORTS)
def test_an_exported_model_takes_any_split_of_boxes_and_has_their_gradient(operator, strict, with_gradient):
    model = Lists(operator)
    count, other = torch.export.Dim("count", min=0, max=1000), torch.export.Dim("other", min=0, max=1000)
    args = FEATURES.clone().requires_grad_(with_gradient), 50 * torch.rand(5, 4), 50 * torch.rand(7, 4)
    with torch.set_grad_enabled(with_gradient):
        program = torch.export.export(model, args, dynamic_shapes=(None, {0: count}, {0: other}), strict=strict)
    exported, boxes = program.module(), BOXES[:, 1:]
    for split in (1, 2, 3):
        assert_same(exported, model, FEATURES, boxes[:split], boxes[split:])
    assert_close(program.run_decompositions().module()(FEATURES, boxes, boxes), model(FEATURES, boxes, boxes))
    with pytest.raises(ValueError, match=r"box 1 is \[nan, .*must be finite"):
        exported(FEATURES, boxes[:1], torch.tensor([[torch.nan, 1, 1, 1]]))


@tracing_warns
@every_operator
def test_a_trace_takes_any_split_of_boxes_and_any_map(operator):
    model = Lists(operator)
    traced = torch.jit.trace(model, (FEATURES, BOXES[:1, 1:], BOXES[1:, 1:]), check_trace=False)
    for features in (FEATURES, LARGER):
        assert_same(traced, model, features, OTHER[:2, 1:], OTHER[2:, 1:])
        assert_same(traced, model, features, OTHER[:0, 1:], OTHER[:, 1:])

    def call(features, boxes):
        return operator(features, boxes, 3, 1 / 16)

    assert_same(torch.jit.trace(call, (FEATURES, BOXES), check_trace=False), call, LARGER, OTHER)


@tracing_warns
def test_a_scale_may_be_a_quotient_of_sizes():
    """Which is a tensor in a trace, and symbolic in an export."""

    class Pooled(nn.Module):
        def forward(self, features: Tensor, boxes: Tensor, images: Tensor) -> Tensor:
            return ops.roi_align(features, boxes, 3, features.shape[2] / images.shape[2], 2, True)

    model, images, size = Pooled(), torch.zeros(2, 3, 128, 160), {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    traced = torch.jit.trace(model, (FEATURES, BOXES, images), check_trace=False)
    exported = torch.export.export(model, (FEATURES, BOXES, images), dynamic_shapes=(size, None, size), strict=True).module()
    for captured in (traced, exported):
        for features in (FEATURES, LARGER):
            assert_close(captured(features, BOXES, images), model(features, BOXES, images))


@every_operator
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(operator, mode):
    call = partial(operator, output_size=3, spatial_scale=1 / 16)
    graph = make_fx(call, tracing_mode=mode)(FEATURES, BOXES)
    assert_same(graph, call, FEATURES, OTHER[1:])


@every_operator
def test_meta_and_fake_tensors_have_shapes(operator):
    for dtype in (torch.float32, torch.bfloat16):
        out = operator(FEATURES.to("meta", dtype), BOXES.to("meta"), (3, 4), 1 / 16)
        assert (out.shape, out.dtype, out.device.type) == ((3, 3, 3, 4), dtype, "meta")
    with FakeTensorMode() as mode:
        features = mode.from_tensor(FEATURES).requires_grad_()
        out = operator(features, mode.from_tensor(BOXES), (3, 4), 1 / 16)
        out.sum().backward()
    assert (out.shape, features.grad.shape) == ((3, 3, 3, 4), FEATURES.shape)


@every_operator
def test_fake_tensors_of_a_gpu(operator):
    """Where a GPU places the bins by a kernel of its own; none is needed to compute shapes."""
    with FakeTensorMode():
        features, boxes = torch.empty(2, 3, 8, 10, device="cuda", requires_grad=True), torch.empty(4, 5, device="cuda")
        out = operator(features, boxes, (3, 4), 1 / 16)
        assert (out.shape, out.device.type, out.requires_grad) == ((4, 3, 3, 4), "cuda", True)


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("operator", [OPERATORS[1], OPERATORS[3]])
def test_an_export_of_a_gpu_fixes_nothing_about_the_number_of_boxes(operator, count):
    """The planes of lattices are padded: with a stride that depended on `count % 4`, only such counts could follow."""

    class Pooled(nn.Module):
        def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
            return operator(features, boxes, 3, 1 / 16)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        features, boxes = torch.empty(2, 3, 8, 10, device="cuda"), torch.empty(count, 5, device="cuda")
    program = torch.export.export(Pooled(), (features, boxes), dynamic_shapes=(None, {0: torch.export.Dim.DYNAMIC}))
    assert program._guards_code == []
    exported = program.module()
    with mode:
        shapes = [exported(features, torch.empty(other, 5, device="cuda")).shape for other in (3, 4, 8)]
    assert shapes == [(3, 3, 3, 3), (4, 3, 3, 3), (8, 3, 3, 3)]


@every_operator
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_images(operator):
    def pooled(features, boxes):
        return operator(features[None], [boxes], 3, 1 / 16)

    features, boxes = feature_map(4, 3, 8, 10, dtype=torch.float32), 60 * torch.rand(4, 2, 4)
    assert_close(torch.vmap(pooled, (0, None))(features, boxes[0]), torch.stack([pooled(f, boxes[0]) for f in features]))
    assert_close(torch.vmap(pooled)(features, boxes), torch.stack([pooled(f, b) for f, b in zip(features, boxes, strict=True)]))


@tracing_warns  # PyTorch's own forward mode scripts its formulas
@every_operator
def test_forward_mode_is_refused_and_not_taken_for_zero(operator):
    pool, ones = partial(operator, output_size=3, spatial_scale=1 / 16), torch.ones_like
    for transform in (
        lambda: torch.func.jvp(lambda f: pool(f, BOXES), (FEATURES,), (ones(FEATURES),)),
        lambda: torch.func.jvp(lambda b: pool(FEATURES, [b, b]), (BOXES[:, 1:],), (ones(BOXES[:, 1:]),)),
        lambda: torch.func.jvp(torch.vmap(lambda f: pool(f[None], BOXES[:1])), (FEATURES,), (ones(FEATURES),)),
        lambda: torch.func.jacfwd(lambda f: pool(f, BOXES))(FEATURES[..., :2, :1]),
    ):
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative .*Use backward\(\)"):
            transform()
    features = FEATURES.clone().requires_grad_()
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            pool(forward_ad.make_dual(FEATURES, ones(FEATURES)), BOXES)
        out = pool(features, BOXES)  # has no tangent
        with pytest.raises(RuntimeError, match="output gradient has a tangent"):
            out.backward(forward_ad.make_dual(ones(out), ones(out)))


@every_operator
def test_what_else_pytorch_offers_to_no_custom_op_is_an_error(operator):
    """As docs/kernels.md says: none of them gives a wrong number."""
    features = FEATURES.clone().requires_grad_()
    out = operator(features, BOXES, 3, 1 / 16)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(out, features, torch.ones(2, *out.shape), is_grads_batched=True, retain_graph=True)
    (first,) = torch.autograd.grad(out.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda f: operator(f, BOXES, 3, 1 / 16).sum())(FEATURES)


@every_operator
def test_flops_of_a_model_are_counted(operator):
    convolution = nn.Conv2d(3, 3, 1)
    with FlopCounterMode(display=False) as counter:
        operator(convolution(FEATURES), BOXES, 3, 1 / 16).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 2 * 80 * 3 * 3), "those of the convolution, and of the gradient of its weights"


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_can_be_changed_in_place(operator, dtype):
    def pooled(features):
        return operator(features, BOXES, 3, 1 / 16)

    features = FEATURES.to(dtype)
    assert not pooled(features)._is_view()
    assert torch.equal(gradient(lambda f: torch.relu_(pooled(f)), features), gradient(lambda f: torch.relu(pooled(f)), features))


@every_operator
def test_the_map_is_kept_for_the_gradient_of_the_boxes_alone(operator):
    """Without it, the map may change in place before the backward pass."""

    def pooled(features, boxes):
        features = features * 1
        out = operator(features, boxes, 3, 1 / 16)
        features.zero_()
        return out

    assert torch.equal(gradient(pooled, FEATURES, BOXES), gradient(lambda f, b: operator(f, b, 3, 1 / 16), FEATURES, BOXES))
    if operator is not ops.roi_pool:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(pooled, FEATURES, BOXES.clone().requires_grad_())
