import math
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.model.optim import build_optimizer, is_fused, one_cycle, parameter_groups, step_decay


def detector(*head):
    """As far as the groups are concerned."""
    return nn.Sequential(OrderedDict(backbone=nn.Linear(2, 3), **{f"head{i}": layer for i, layer in enumerate(head)}))


def test_groups_of_weights_biases_and_norms():
    model = detector(nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[2].requires_grad_(False)
    weights, biases, norms = parameter_groups(model, lr=0.1, weight_decay=0.01, bias_lr_factor=2.0, decay_biases_and_norms=False)
    assert weights["params"] == [model[0].weight]
    assert biases["params"] == [model[0].bias]
    assert norms["params"] == [model[1].weight, model[1].bias]
    assert [group["lr"] for group in (weights, biases, norms)] == [0.1, 0.2, 0.1]
    assert [group["weight_decay"] for group in (weights, biases, norms)] == [0.01, 0.0, 0.0]


def test_a_step_by_hand():
    """Weight and bias are 2 and their gradients 1: 2 - 0.1 (1 + 0.5 x 2) = 1.8, and the bias, twice as fast and without decay, 2 - 0.2."""
    layer = nn.Linear(1, 1)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 2.0)
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameter_groups(layer, lr=0.1, weight_decay=0.5, bias_lr_factor=2.0, decay_biases_and_norms=False)).step()
    assert (layer.weight.item(), layer.bias.item()) == pytest.approx((1.8, 1.8))


def test_nothing_to_train_in_a_group_leaves_it_out():
    model = nn.Sequential(OrderedDict(backbone=nn.Linear(2, 3, bias=False)))
    assert [group["params"] for group in parameter_groups(model, lr=0.1, weight_decay=0.0)] == [[model.backbone.weight]]


def test_the_backbone_may_have_a_rate_of_its_own():
    model = detector(nn.Linear(3, 1))
    groups = parameter_groups(model, lr=0.1, weight_decay=0.0, bias_lr_factor=2.0, backbone_lr_factor=0.5)
    head, backbone = model.head0, model.backbone
    assert [group["params"] for group in groups] == [[head.weight], [head.bias], [backbone.weight], [backbone.bias]]
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.2, 0.05, 0.1])


def rates(schedule, steps, groups=1):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 10.0**-i} for i in range(groups)], momentum=0.9)
    scheduler = schedule(optimizer, total_steps=steps)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


def test_step_decay_warms_up_and_drops():
    """From a tenth of the rate in two steps, and a tenth of it again from step 4 on."""
    seen = rates(lambda o, total_steps: step_decay(o, total_steps, milestones=[4], warmup_steps=2, warmup_factor=0.1), steps=6)
    assert [rate for (rate,) in seen] == pytest.approx([0.1, 0.55, 1.0, 1.0, 0.1, 0.1])


def test_one_cycle_peaks_at_each_groups_own_rate():
    seen = rates(
        lambda o, total_steps: one_cycle(o, total_steps, warmup_fraction=0.5, start_factor=0.1, end_factor=0.01), steps=12, groups=2
    )
    first, second = zip(*seen, strict=True)
    assert (first[0], max(first), first[-1]) == pytest.approx((0.1, 1.0, 0.01), rel=1e-3)
    assert second == pytest.approx([rate / 10 for rate in first])


@pytest.mark.parametrize(
    ("schedule", "setting", "wanted"),
    [
        (one_cycle, {"warmup_fraction": -0.1}, "from 0 to 1"),
        (one_cycle, {"start_factor": 0}, "above 0"),
        (one_cycle, {"end_factor": -1}, "above 0"),
        (step_decay, {"gamma": -0.1}, "from 0 on"),
        (step_decay, {"warmup_steps": -1}, "from 0 on"),
        (step_decay, {"warmup_factor": math.nan}, "from 0 on"),
    ],
)
def test_a_setting_out_of_its_range_is_named(schedule, setting, wanted):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=rf"optim\.schedule\.{name}={value}: expected a number {wanted}"):
        schedule(optimizer, total_steps=10, **setting)


def test_a_cycle_goes_on_with_another_length():
    """Half of a cycle of 8 steps, then the second half of one of 16: at step 12 of 16 as if it had been 16 from the beginning."""

    def scheduled(steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        return optimizer, one_cycle(optimizer, steps)

    def step(optimizer, scheduler, times):
        for _ in range(times):
            optimizer.step()
            scheduler.step()

    short, long, resumed = scheduled(8), scheduled(16), scheduled(16)
    step(*short, 4)
    for part, state in zip(resumed, short, strict=True):
        part.load_state_dict(state.state_dict())
    step(*resumed, 8)
    step(*long, 12)
    assert resumed[0].param_groups[0]["lr"] == pytest.approx(long[0].param_groups[0]["lr"])
    step(*resumed, 3)


@pytest.mark.parametrize(
    ("given", "may_fuse", "on_gpu", "fused"),
    [
        ({"fused": None}, True, True, True),
        ({"fused": None}, True, False, None),
        ({"fused": None}, False, True, None),
        ({"fused": False}, True, True, False),
        ({}, True, True, None),  # an optimizer that may not know the word
    ],
)
def test_an_optimizer_is_fused_on_a_gpu_where_it_is_left_open(given, may_fuse, on_gpu, fused):
    groups = [{"params": [SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=on_gpu)]}]

    def optimizer(groups, fused=None):
        return fused

    assert build_optimizer(partial(optimizer, **given), groups, may_fuse) is fused


@pytest.mark.parametrize("fused", [True, False, None])
def test_whether_an_optimizer_is_fused_is_asked_of_all_groups(fused):
    assert is_fused(torch.optim.AdamW([{"params": [torch.ones(1)]}], fused=fused)) == bool(fused)
