"""The operators as PyTorch knows them: `torch.library` operators with shapes for tracing and gradients, and the kernels behind them.

`roi::lattice_pool` and `roi::integral_pool` take lattices, never boxes: what is rounded was rounded before (`ops/geometry.py`).
"""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from roi_quantization.ops.geometry import Axis, Bounds

_NONE = torch.Size([0])
_DEVICES = ("cpu", "cuda")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def kernels(device: torch.device) -> ModuleType:
    """The module with the kernels of a device; loaded when first used, as Triton is not everywhere."""
    return importlib.import_module(f"roi_quantization.ops.{device.type}.kernels")


def supports(features: Tensor) -> bool:
    """Whether there are kernels for this device and dtype."""
    return features.is_cpu or (features.is_cuda and _HAS_TRITON and features.dtype != torch.float64)


@torch.library.custom_op("roi::lattice_pool", mutates_args=(), device_types=_DEVICES)
def lattice_pool(
    features: Tensor,
    image: Tensor,
    y_first: Tensor,
    y_step: Tensor,
    y_count: Tensor,
    y_total: Tensor,
    x_first: Tensor,
    x_step: Tensor,
    x_count: Tensor,
    x_total: Tensor,
    reduce: str,
    arg_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Reduce each bin's samples. -> `[K, C, P, P]` in the dtype of the features, and for `max` which won, in the kernels' own order."""
    y, x = Axis(y_first, y_step, y_count, y_total), Axis(x_first, x_step, x_count, x_total)
    return kernels(features.device).lattice_forward(features, image, y, x, reduce, arg_dtype)


@lattice_pool.register_fake
def _(features, image, y_first, y_step, y_count, y_total, x_first, x_step, x_count, x_total, reduce, arg_dtype):
    rois, channels, bins = image.shape[0], features.shape[1], (y_first.shape[1], x_first.shape[1])
    winners = rois * channels * bins[0] * bins[1] if reduce == "max" and arg_dtype else 0
    return features.new_empty(rois, channels, *bins), features.new_empty(winners, dtype=arg_dtype or torch.int8)


@torch.library.custom_op("roi::lattice_pool_backward", mutates_args=(), device_types=_DEVICES)
def lattice_pool_backward(
    grad: Tensor,
    features: Tensor,
    winners: Tensor,
    image: Tensor,
    y_first: Tensor,
    y_step: Tensor,
    y_count: Tensor,
    y_total: Tensor,
    x_first: Tensor,
    x_step: Tensor,
    x_count: Tensor,
    x_total: Tensor,
    reduce: str,
    of_features: bool,
    of_lattice: bool,
) -> list[Tensor]:
    """-> gradients of features, y_first, y_step, x_first, x_step; what is not asked for is empty."""
    y, x = Axis(y_first, y_step, y_count, y_total), Axis(x_first, x_step, x_count, x_total)
    backward = kernels(features.device).lattice_backward
    return _filled(features, y_first, *backward(grad, features, winners, image, y, x, reduce, of_features, of_lattice))


@lattice_pool_backward.register_fake
def _(
    grad, features, winners, image, y_first, y_step, y_count, y_total, x_first, x_step, x_count, x_total, reduce, of_features, of_lattice
):
    lattice = [torch.empty_like(t) for t in (y_first, y_step, x_first, x_step)] if of_lattice else None
    return _filled(features, y_first, torch.empty_like(features) if of_features else None, lattice)


def _lattice_setup(ctx, inputs, output):
    features, image, *lattice, ctx.reduce, _ = inputs
    ctx.save_for_backward(features, output[1], image, *lattice)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros as large as the output for the indices, which have no gradient


def _lattice_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 12
    of_features, of_lattice = ctx.needs_input_grad[0], any(ctx.needs_input_grad[i] for i in (2, 3, 6, 7))
    out = lattice_pool_backward(grad, *ctx.saved_tensors, ctx.reduce, of_features, of_lattice)
    of_source, y_first, y_step, x_first, x_step = (
        g if asked else None for g, asked in zip(out, [of_features] + [of_lattice] * 4, strict=True)
    )
    return of_source, None, y_first, y_step, None, None, x_first, x_step, None, None, None, None


lattice_pool.register_autograd(_lattice_backward, setup_context=_lattice_setup)


@torch.library.custom_op("roi::integral_pool", mutates_args=(), device_types=_DEVICES)
def integral_pool(features: Tensor, image: Tensor, y_low: Tensor, y_high: Tensor, x_low: Tensor, x_high: Tensor) -> Tensor:
    """The mean of the interpolated map over each bin. -> `[K, C, P, P]` in the dtype of the features."""
    return kernels(features.device).integral_forward(features, image, Bounds(y_low, y_high), Bounds(x_low, x_high))


@integral_pool.register_fake
def _(features, image, y_low, y_high, x_low, x_high):
    return features.new_empty(image.shape[0], features.shape[1], y_low.shape[1], x_low.shape[1])


@torch.library.custom_op("roi::integral_pool_backward", mutates_args=(), device_types=_DEVICES)
def integral_pool_backward(
    grad: Tensor,
    features: Tensor,
    image: Tensor,
    y_low: Tensor,
    y_high: Tensor,
    x_low: Tensor,
    x_high: Tensor,
    of_features: bool,
    of_bounds: bool,
) -> list[Tensor]:
    """-> gradients of features, y_low, y_high, x_low, x_high; what is not asked for is empty."""
    backward, y, x = kernels(features.device).integral_backward, Bounds(y_low, y_high), Bounds(x_low, x_high)
    return _filled(features, y_low, *backward(grad, features, image, y, x, of_features, of_bounds))


@integral_pool_backward.register_fake
def _(grad, features, image, y_low, y_high, x_low, x_high, of_features, of_bounds):
    bounds = [torch.empty_like(t) for t in (y_low, y_high, x_low, x_high)] if of_bounds else None
    return _filled(features, y_low, torch.empty_like(features) if of_features else None, bounds)


def _integral_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _integral_backward(ctx, grad):
    of_features, of_bounds = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:])
    of_source, *bounds = integral_pool_backward(grad, *ctx.saved_tensors, of_features, of_bounds)
    return of_source if of_features else None, None, *(bounds if of_bounds else [None] * 4)


integral_pool.register_autograd(_integral_backward, setup_context=_integral_setup)


def _filled(features: Tensor, edges: Tensor, of_features: Tensor | None, of_edges: list[Tensor] | None) -> list[Tensor]:
    """An operator returns tensors: empty ones for gradients that nobody asked for."""
    of_features = features.new_empty(_NONE) if of_features is None else of_features
    return [of_features, *(of_edges or [edges.new_empty(_NONE) for _ in range(4)])]
