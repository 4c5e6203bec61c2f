"""Parameter groups and learning rate schedules.

A schedule is a callable `(optimizer, total_steps) -> LRScheduler`, stepped once a training step.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from roi_quantization.detection.common.errors import InputError


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    bias_lr_factor: float = 1.0,
    backbone_lr_factor: float = 1.0,
    decay_biases_and_norms: bool = True,
) -> list[dict]:
    """Group the trained parameters into weights, biases and those of norm layers, the head's before the backbone's.

    Args:
        model: a detector whose backbone is `model.backbone`.
        lr: learning rate of weights and norms; biases get `bias_lr_factor` times as much (2 in Fast R-CNN).
        weight_decay: of weights, and of biases and norms where `decay_biases_and_norms` (Fast R-CNN: not).
        backbone_lr_factor: the rates of the backbone over those of the head; 1 puts both into the same groups.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not (isinstance(value, int | float) and value >= 0):
            raise InputError(f"optim.groups.{name}={value}: expected a number from 0 on")
    in_backbone = {id(parameter) for parameter in model.backbone.parameters()} if backbone_lr_factor != 1 else set()
    parts = {False: ([], [], []), True: ([], [], [])}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            weights, biases, norms = parts[id(parameter) in in_backbone]
            if isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm):
                norms.append(parameter)
            elif name == "bias":
                biases.append(parameter)
            else:
                weights.append(parameter)
    other_decay = weight_decay if decay_biases_and_norms else 0.0
    groups = []
    for of_backbone, (weights, biases, norms) in parts.items():
        rate = lr * backbone_lr_factor if of_backbone else lr
        groups += [
            {"params": weights, "lr": rate, "weight_decay": weight_decay},
            {"params": biases, "lr": rate * bias_lr_factor, "weight_decay": other_decay},
            {"params": norms, "lr": rate, "weight_decay": other_decay},
        ]
    return [group for group in groups if group["params"]]


def build_optimizer(optimizer: Callable[..., Optimizer], groups: Iterable[dict], may_fuse: bool) -> Optimizer:
    """Build an optimizer, a fused one where its `fused` is None, it may be, and all parameters are on a GPU.

    Args:
        optimizer: `groups -> Optimizer`; a `functools.partial` where it leaves `fused` open.
        groups: see `parameter_groups`.
        may_fuse: whether nothing else in the training forbids it.
    """
    groups = list(groups)
    is_open = isinstance(optimizer, partial) and optimizer.keywords.get("fused", False) is None
    is_on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return optimizer(groups, fused=True) if may_fuse and is_open and is_on_gpu else optimizer(groups)


def is_fused(optimizer: Optimizer) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)


class _OneCycle(OneCycleLR):
    """Follows the cycle of the new length where a training goes on with another length than it started with."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state | {name: getattr(self, name) for name in ("total_steps", "_schedule_phases")})


def one_cycle(
    optimizer: Optimizer,
    total_steps: int,
    warmup_fraction: float = 0.3,
    start_factor: float = 0.04,
    end_factor: float = 4e-6,
    cycle_momentum: bool = True,
) -> OneCycleLR:
    """Raise each group's rate from `start_factor` of it over `warmup_fraction` of the steps, then lower it to `end_factor` of it; cosine.

    With `cycle_momentum` the momentum (Adam's first beta) falls from 0.95 to 0.85 while the rate rises, and returns.

    Raises:
        InputError: `warmup_fraction` is not from 0 to 1, or a factor is not above 0.
    """
    if not 0 <= warmup_fraction <= 1:
        raise InputError(f"optim.schedule.warmup_fraction={warmup_fraction}: expected a number from 0 to 1")
    for name, value in (("start_factor", start_factor), ("end_factor", end_factor)):
        if not value > 0:
            raise InputError(f"optim.schedule.{name}={value}: expected a number above 0")
    return _OneCycle(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=warmup_fraction,
        div_factor=1 / start_factor,
        final_div_factor=start_factor / end_factor,
        cycle_momentum=cycle_momentum,
    )


def step_decay(
    optimizer: Optimizer,
    total_steps: int,
    milestones: Iterable[int] = (),
    gamma: float = 0.1,
    warmup_steps: int = 0,
    warmup_factor: float = 0.1,
) -> LambdaLR:
    """Multiply the rate by `gamma` at each milestone (a step), after a linear warm-up from `warmup_factor` of it. Ignores `total_steps`.

    Raises:
        InputError: a number is below 0.
    """
    for name, value in (("gamma", gamma), ("warmup_steps", warmup_steps), ("warmup_factor", warmup_factor)):
        if not value >= 0:
            raise InputError(f"optim.schedule.{name}={value}: expected a number from 0 on")
    milestones = sorted(milestones)

    def factor(step: int) -> float:
        warmup = min(1.0, warmup_factor + (1 - warmup_factor) * step / warmup_steps) if warmup_steps else 1.0
        return warmup * gamma ** sum(step >= milestone for milestone in milestones)

    return LambdaLR(optimizer, factor)
