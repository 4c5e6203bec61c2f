"""The operators as PyTorch knows them: `torch.library` operators with shapes for tracing and gradients, and the kernels behind them.

`roi::lattice_pool` and `roi::integral_pool` take lattices, never boxes: what is rounded was rounded before (`ops/geometry.py`).
"""

import torch
from torch import Tensor

from ops import cpu
from ops.geometry import Axis, Bounds

_NONE = torch.Size([0])


@torch.library.custom_op("roi::lattice_pool", mutates_args=(), device_types="cpu")
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
    """Reduce each bin's samples. -> `[K, C, P, P]` in the dtype of the features, and for `max` the winners' indices in `arg_dtype`."""
    y, x = Axis(y_first, y_step, y_count, y_total), Axis(x_first, x_step, x_count, x_total)
    _finite(y_first, x_first)
    source = _accumulable(features)
    if reduce == "max":
        out, arg = cpu.max_forward(source, image, y, x, arg_dtype)
    else:
        out = cpu.window_forward(source, image, cpu.lattice_windows(y, x, *features.shape[2:]))
        arg = torch.empty(_NONE, dtype=torch.int8)
    return out.to(features.dtype), arg


@lattice_pool.register_fake
def _(features, image, y_first, y_step, y_count, y_total, x_first, x_step, x_count, x_total, reduce, arg_dtype):
    rois, channels, bins = image.shape[0], features.shape[1], (y_first.shape[1], x_first.shape[1])
    remembered = rois * channels * bins[0] * bins[1] if reduce == "max" and arg_dtype else 0
    return features.new_empty(rois, channels, *bins), features.new_empty(remembered, dtype=arg_dtype or torch.int8)


@torch.library.custom_op("roi::lattice_pool_backward", mutates_args=(), device_types="cpu")
def lattice_pool_backward(
    grad: Tensor,
    features: Tensor,
    arg: Tensor,
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
    source, grad = _accumulable(features), _accumulable(grad).contiguous()
    windows = cpu.lattice_windows(y, x, *features.shape[2:]) if reduce == "mean" else None
    out = [features.new_empty(_NONE)] + [y_first.new_empty(_NONE) for _ in range(4)]
    if of_features:
        of_source = cpu.window_backward(grad, image, windows, source) if windows else cpu.max_backward(grad, arg, image, y, x, source)
        out[0] = of_source.to(features.dtype)
    if of_lattice and windows:
        out[1:] = cpu.lattice_gradient(y, x, windows, cpu.window_weight_gradient(source, grad, image, windows), *features.shape[2:])
    elif of_lattice:
        out[1:] = cpu.max_lattice_gradient(source, grad, arg, image, y, x)
    return out


@lattice_pool_backward.register_fake
def _(grad, features, arg, image, y_first, y_step, y_count, y_total, x_first, x_step, x_count, x_total, reduce, of_features, of_lattice):
    lattice = [torch.empty_like(t) if of_lattice else t.new_empty(_NONE) for t in (y_first, y_step, x_first, x_step)]
    return [torch.empty_like(features) if of_features else features.new_empty(_NONE), *lattice]


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
        g if g.numel() or asked else None for g, asked in zip(out, [of_features] + [of_lattice] * 4, strict=True)
    )
    return of_source, None, y_first, y_step, None, None, x_first, x_step, None, None, None, None


lattice_pool.register_autograd(_lattice_backward, setup_context=_lattice_setup)


@torch.library.custom_op("roi::integral_pool", mutates_args=(), device_types="cpu")
def integral_pool(features: Tensor, image: Tensor, y_low: Tensor, y_high: Tensor, x_low: Tensor, x_high: Tensor) -> Tensor:
    """The mean of the interpolated map over each bin. -> `[K, C, P, P]` in the dtype of the features."""
    _finite(y_low, x_low)
    windows = cpu.integral_windows(Bounds(y_low, y_high), Bounds(x_low, x_high), *features.shape[2:])
    return cpu.window_forward(_accumulable(features), image, windows).to(features.dtype)


@integral_pool.register_fake
def _(features, image, y_low, y_high, x_low, x_high):
    return features.new_empty(image.shape[0], features.shape[1], y_low.shape[1], x_low.shape[1])


@torch.library.custom_op("roi::integral_pool_backward", mutates_args=(), device_types="cpu")
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
    y, x = Bounds(y_low, y_high), Bounds(x_low, x_high)
    source, grad = _accumulable(features), _accumulable(grad).contiguous()
    windows = cpu.integral_windows(y, x, *features.shape[2:])
    out = [features.new_empty(_NONE)] + [y_low.new_empty(_NONE) for _ in range(4)]
    if of_features:
        out[0] = cpu.window_backward(grad, image, windows, source).to(features.dtype)
    if of_bounds:
        out[1:] = cpu.integral_gradient(y, x, windows, cpu.window_weight_gradient(source, grad, image, windows))
    return out


@integral_pool_backward.register_fake
def _(grad, features, image, y_low, y_high, x_low, x_high, of_features, of_bounds):
    bounds = [torch.empty_like(t) if of_bounds else t.new_empty(_NONE) for t in (y_low, y_high, x_low, x_high)]
    return [torch.empty_like(features) if of_features else features.new_empty(_NONE), *bounds]


def _integral_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _integral_backward(ctx, grad):
    of_features, of_bounds = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:])
    of_source, *bounds = integral_pool_backward(grad, *ctx.saved_tensors, of_features, of_bounds)
    return of_source if of_features else None, None, *(bounds if of_bounds else [None] * 4)


integral_pool.register_autograd(_integral_backward, setup_context=_integral_setup)


def _accumulable(tensor: Tensor) -> Tensor:
    """Sums are kept in float32 at least, whatever the features are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _finite(*first: Tensor) -> None:
    if not all(bool(t.isfinite().all()) for t in first):
        raise ValueError("boxes: every coordinate must be finite and every image index in range; a lattice of this call is not a number")
