"""The operators as PyTorch knows them: `torch.library` operators with shapes for tracing and gradients, and the kernels behind them.

`roi_quantization::lattice_pool` and `roi_quantization::integral_pool` take lattices, never boxes.
A traced or exported file names its operators, so that their namespace is the import that such a file needs.
"""

import importlib
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils import deterministic as _deterministic

from roi_quantization.ops.geometry import Axis, Bounds, IntegralRule, LatticeRule, empty_planes

deterministic: Any = _deterministic  # a module with a property, which mypy does not know
_DEVICES = ("cpu", "cuda")
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_fill_lock = threading.Lock()
_unfilled_calls = 0
_fill_before = True


def kernels(device: torch.device) -> ModuleType:
    """Import the module with the kernels of a device, when it is first used: Triton is not installed everywhere."""
    return importlib.import_module(f"roi_quantization.ops.{device.type}.kernels")


@contextmanager
def unfilled_memory() -> Iterator[None]:
    """Allocate without the fill of PyTorch's deterministic mode: kernels write every element of what they return.

    The setting is that of the process. Of calls in several threads the first notes and the last restores it.
    """
    global _unfilled_calls, _fill_before
    if not torch.are_deterministic_algorithms_enabled():  # nothing is filled
        yield
        return
    with _fill_lock:
        if _unfilled_calls == 0:
            _fill_before = deterministic.fill_uninitialized_memory
            deterministic.fill_uninitialized_memory = False
        _unfilled_calls += 1
    try:
        yield
    finally:
        with _fill_lock:
            _unfilled_calls -= 1
            if _unfilled_calls == 0:
                deterministic.fill_uninitialized_memory = _fill_before


def supports(features: Tensor) -> bool:
    """Whether there are kernels for this device and dtype. A meta tensor has shapes alone, for which none is needed.

    AMD's GPUs are `cuda` to PyTorch, but Triton refuses `maxnreg` for them, which the kernels are launched with.
    """
    if features.is_cuda:
        return _HAS_TRITON and torch.version.hip is None and features.dtype != torch.float64
    return features.is_cpu or features.is_meta


def refuse_tangents(*tensors: Tensor) -> None:
    """Raise RuntimeError for a tensor with a tangent of forward-mode differentiation: the tangent of the output would be lost.

    PyTorch offers no forward mode to a `custom_op`, and takes the tangent for 0.
    """
    try:
        has_tangent = any(unpack_dual(tensor).tangent is not None for tensor in tensors)
    except RuntimeError:  # a vmap inside of a forward mode cannot tell
        has_tangent = True
    if has_tangent:
        raise RuntimeError(
            "the RoI operators have no forward-mode derivative (torch.func.jvp, torch.func.jacfwd, torch.autograd.forward_ad), and their "
            "input, boxes or output gradient has a tangent. Use backward() or torch.autograd.grad, or detach() it."
        )


@torch.library.custom_op("roi_quantization::place_lattice", mutates_args=(), device_types="cuda")
def place_lattice(
    image: Tensor,
    box: Tensor,
    spatial_scale: float,
    images: int,
    bins: list[int],
    size: list[int],
    quantize_roi: str,
    inclusive_end: bool,
    half_pixel: bool,
    min_extent: float | None,
    quantize_bins: str,
    sampling_ratio: int,
    sample_offset: float,
    border: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the lattices of boxes by one kernel, for which there is no gradient.

    Args:
        image: `[K]` index of each box's image, of any dtype.
        box: `[K, 4]` in pixels, float32.
        spatial_scale: cells per pixel.
        images: number of images in the map.
        bins, size: bins of a RoI and cells of the map, each along height and width.
        quantize_roi, ..., border: the knobs of `LatticeRule`, in its order.

    Returns:
        As `place_boxes` of `ops/cuda/kernels.py`.
    """
    roi, cut = cast(Any, quantize_roi), cast(Any, quantize_bins)  # an operator of PyTorch takes strings, not literals
    rule = LatticeRule(roi, inclusive_end, half_pixel, min_extent, cut, sampling_ratio, sample_offset, border)
    with unfilled_memory():
        placed: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = kernels(box.device).place_boxes(
            rule, image, box, spatial_scale, images, bins, size
        )
    return placed


@place_lattice.register_fake
def _(
    image: Tensor, box: Tensor, spatial_scale: float, images: int, bins: list[int], size: list[int], *knobs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rois, (bins_y, bins_x) = image.shape[0], bins
    counts = (image.new_empty(rois, of_side, dtype=torch.int32) for of_side in bins)
    return (
        image.new_empty(rois, dtype=torch.int64),
        empty_planes(box, 3, rois, bins_y),
        next(counts),
        empty_planes(box, 3, rois, bins_x),
        next(counts),
    )


@torch.library.custom_op("roi_quantization::place_edges", mutates_args=(), device_types="cuda")
def place_edges(
    image: Tensor, box: Tensor, spatial_scale: float, images: int, bins: list[int], half_pixel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the edges of the bins of boxes by one kernel, for which there is no gradient: images `[K]`, y and x `[2, K, P]`."""
    rule = IntegralRule(half_pixel)
    with unfilled_memory():
        image, y, _, x, _ = kernels(box.device).place_boxes(rule, image, box, spatial_scale, images, bins, [1, 1])
    return image, y, x


@place_edges.register_fake
def _(image: Tensor, box: Tensor, spatial_scale: float, images: int, bins: list[int], half_pixel: bool) -> tuple[Tensor, Tensor, Tensor]:
    rois, (bins_y, bins_x) = image.shape[0], bins
    return image.new_empty(rois, dtype=torch.int64), empty_planes(box, 2, rois, bins_y), empty_planes(box, 2, rois, bins_x)


@torch.library.custom_op("roi_quantization::lattice_pool", mutates_args=(), device_types=_DEVICES)
def lattice_pool(
    features: Tensor,
    image: Tensor,
    y_first: Tensor,
    y_step: Tensor,
    y_visited: Tensor,
    y_total: Tensor,
    x_first: Tensor,
    x_step: Tensor,
    x_visited: Tensor,
    x_total: Tensor,
    reduce: str,
    winners_dtype: torch.dtype | None,
    whole_cells: bool,
) -> tuple[Tensor, Tensor]:
    """Reduce each bin's samples.

    Args:
        features: `[N, C, H, W]`.
        image: `[K]` index of each RoI's image, int64.
        y_first, ..., x_total: `Axis` along y and along x, each `[K, P]`.
        reduce: `mean` or `max`.
        winners_dtype: of the numbers of the samples that won, for `max`; None where no gradient needs them.
        whole_cells: whether the lattices are known to be whole cells, one apart, which need no interpolation.

    Returns:
        `[K, C, P, P]` in the dtype of the features, contiguous, and which sample won, in the kernels' own order, or an empty tensor.
    """
    y, x = Axis(y_first, y_step, y_visited, y_total), Axis(x_first, x_step, x_visited, x_total)
    with unfilled_memory():
        out, winners = kernels(features.device).lattice_forward(features, image, y, x, reduce, winners_dtype, whole_cells)
    return out, winners


@lattice_pool.register_fake
def _(
    features: Tensor,
    image: Tensor,
    y_first: Tensor,
    y_step: Tensor,
    y_visited: Tensor,
    y_total: Tensor,
    x_first: Tensor,
    x_step: Tensor,
    x_visited: Tensor,
    x_total: Tensor,
    reduce: str,
    winners_dtype: torch.dtype | None,
    whole_cells: bool,
) -> tuple[Tensor, Tensor]:
    rois, channels, bins = image.shape[0], features.shape[1], (y_first.shape[1], x_first.shape[1])
    winners = rois * channels * bins[0] * bins[1] if reduce == "max" and winners_dtype else 0
    return features.new_empty(rois, channels, *bins), features.new_empty(winners, dtype=winners_dtype or torch.int8)


@torch.library.custom_op("roi_quantization::lattice_pool_backward", mutates_args=(), device_types=_DEVICES)
def lattice_pool_backward(
    grad: Tensor,
    features: Tensor | None,
    winners: Tensor,
    image: Tensor,
    y_first: Tensor,
    y_step: Tensor,
    y_visited: Tensor,
    y_total: Tensor,
    x_first: Tensor,
    x_step: Tensor,
    x_visited: Tensor,
    x_total: Tensor,
    reduce: str,
    whole_cells: bool,
    shape: list[int],
    channels_last: bool,
    of_features: bool,
    of_lattice: bool,
) -> list[Tensor]:
    """Gradients of features, y_first, y_step, x_first and x_step; what is not asked for is empty.

    Args:
        grad: `[K, C, P, P]`.
        features: the map. None where no gradient that is asked for reads it.
        winners: as the forward gave them. Where it was not asked for them, the forward runs once more.
        image, ..., reduce, whole_cells: as of the forward.
        shape, channels_last: of the features, and of their gradient.
        of_features, of_lattice: which gradients are asked for.
    """
    y, x = Axis(y_first, y_step, y_visited, y_total), Axis(x_first, x_step, x_visited, x_total)
    with unfilled_memory():
        device = kernels(grad.device)
        if reduce == "max" and winners.numel() != grad.numel():
            winners = device.lattice_forward(features, image, y, x, reduce, torch.int32, whole_cells)[1]
        out = _empty_map(grad, shape, channels_last) if of_features else None
        of_edges = device.lattice_backward(grad, features, winners, image, y, x, reduce, out, of_lattice, whole_cells)
    return _all_gradients(grad, y_first, out, of_edges)


@lattice_pool_backward.register_fake
def _(
    grad: Tensor,
    features: Tensor | None,
    winners: Tensor,
    image: Tensor,
    y_first: Tensor,
    y_step: Tensor,
    y_visited: Tensor,
    y_total: Tensor,
    x_first: Tensor,
    x_step: Tensor,
    x_visited: Tensor,
    x_total: Tensor,
    reduce: str,
    whole_cells: bool,
    shape: list[int],
    channels_last: bool,
    of_features: bool,
    of_lattice: bool,
) -> list[Tensor]:
    of_edges = [torch.empty_like(t) for t in (y_first, y_step, x_first, x_step)] if of_lattice else None
    return _all_gradients(grad, y_first, _empty_map(grad, shape, channels_last) if of_features else None, of_edges)


def _lattice_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, image, *lattice, ctx.reduce, winners_dtype, ctx.whole_cells = inputs
    ctx.shape, ctx.channels_last = features.shape, _is_channels_last(features)
    # Only these gradients read the map. For the others it is not saved, so that it can be changed in place.
    needs_map = any(ctx.needs_input_grad[i] for i in (2, 3, 6, 7)) or (ctx.reduce == "max" and winners_dtype is None)
    ctx.save_for_backward(features if needs_map else None, output[1], image, *lattice)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # the winners have no gradient: save zeros as large as the output


def _lattice_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    refuse_tangents(grad)
    of_features, of_lattice = ctx.needs_input_grad[0], any(ctx.needs_input_grad[i] for i in (2, 3, 6, 7))
    out = lattice_pool_backward(
        grad, *ctx.saved_tensors, ctx.reduce, ctx.whole_cells, ctx.shape, ctx.channels_last, of_features, of_lattice
    )
    of_map, y_first, y_step, x_first, x_step = (
        g if asked else None for g, asked in zip(out, [of_features] + [of_lattice] * 4, strict=True)
    )
    return of_map, None, y_first, y_step, None, None, x_first, x_step, None, None, None, None, None


lattice_pool.register_autograd(_lattice_backward, setup_context=_lattice_setup)


@torch.library.custom_op("roi_quantization::integral_pool", mutates_args=(), device_types=_DEVICES)
def integral_pool(features: Tensor, image: Tensor, y_low: Tensor, y_high: Tensor, x_low: Tensor, x_high: Tensor) -> Tensor:
    """Take the mean of the interpolated map over each bin.

    Args:
        features: `[N, C, H, W]`.
        image: `[K]` index of each RoI's image, int64.
        y_low, ..., x_high: `Bounds` of the bins along y and along x, each `[K, P]`.

    Returns:
        `[K, C, P, P]` in the dtype of the features, contiguous.
    """
    with unfilled_memory():
        out: Tensor = kernels(features.device).integral_forward(features, image, Bounds(y_low, y_high), Bounds(x_low, x_high))
    return out


@integral_pool.register_fake
def _(features: Tensor, image: Tensor, y_low: Tensor, y_high: Tensor, x_low: Tensor, x_high: Tensor) -> Tensor:
    return features.new_empty(image.shape[0], features.shape[1], y_low.shape[1], x_low.shape[1])


@torch.library.custom_op("roi_quantization::integral_pool_backward", mutates_args=(), device_types=_DEVICES)
def integral_pool_backward(
    grad: Tensor,
    features: Tensor | None,
    image: Tensor,
    y_low: Tensor,
    y_high: Tensor,
    x_low: Tensor,
    x_high: Tensor,
    shape: list[int],
    channels_last: bool,
    of_features: bool,
    of_bounds: bool,
) -> list[Tensor]:
    """Gradients of features, y_low, y_high, x_low and x_high; arguments as of `lattice_pool_backward`."""
    y, x = Bounds(y_low, y_high), Bounds(x_low, x_high)
    with unfilled_memory():
        out = _empty_map(grad, shape, channels_last) if of_features else None
        of_edges = kernels(grad.device).integral_backward(grad, features, image, y, x, out, of_bounds)
    return _all_gradients(grad, y_low, out, of_edges)


@integral_pool_backward.register_fake
def _(
    grad: Tensor,
    features: Tensor | None,
    image: Tensor,
    y_low: Tensor,
    y_high: Tensor,
    x_low: Tensor,
    x_high: Tensor,
    shape: list[int],
    channels_last: bool,
    of_features: bool,
    of_bounds: bool,
) -> list[Tensor]:
    of_edges = [torch.empty_like(t) for t in (y_low, y_high, x_low, x_high)] if of_bounds else None
    return _all_gradients(grad, y_low, _empty_map(grad, shape, channels_last) if of_features else None, of_edges)


def _integral_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    features, *rest = inputs
    ctx.shape, ctx.channels_last = features.shape, _is_channels_last(features)
    ctx.save_for_backward(features if any(ctx.needs_input_grad[2:]) else None, *rest)


def _integral_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_tangents(grad)
    of_features, of_bounds = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:])
    of_map, *of_edges = integral_pool_backward(grad, *ctx.saved_tensors, ctx.shape, ctx.channels_last, of_features, of_bounds)
    return of_map if of_features else None, None, *(of_edges if of_bounds else [None] * 4)


integral_pool.register_autograd(_integral_backward, setup_context=_integral_setup)


def _is_channels_last(features: Tensor) -> bool:
    return features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous()


def _empty_map(grad: Tensor, shape: list[int], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


def _all_gradients(grad: Tensor, edges: Tensor, of_features: Tensor | None, of_edges: list[Tensor] | None) -> list[Tensor]:
    """An operator returns tensors: a gradient that was not asked for is an empty one."""
    return [grad.new_empty(0) if of_features is None else of_features, *(of_edges or [edges.new_empty(0) for _ in range(4)])]
