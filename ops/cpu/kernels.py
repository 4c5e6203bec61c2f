"""The operators on a CPU: lattices in, Numba kernels over blocks of channels, tensors out. The same functions as `ops/cuda/kernels.py`.

Blocks share nothing and do not depend on the number of threads, so neither do the results: the same bits on one thread or sixteen.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from roi_quantization.ops.cpu import argmax as argmax_kernels
from roi_quantization.ops.cpu import max as max_kernels
from roi_quantization.ops.cpu import window as window_kernels
from roi_quantization.ops.geometry import Axis, Bounds


class Windows(NamedTuple):
    """Weights of neighbouring cells for each bin along y and along x: the form that a mean has for the kernels."""

    y_start: np.ndarray  # [K, P] first cell
    y_cells: np.ndarray  # [K, P] number of cells
    y_weights: np.ndarray  # [K, P, longest]
    x_start: np.ndarray
    x_cells: np.ndarray
    x_weights: np.ndarray


def lattice_forward(features: Tensor, image: Tensor, y: Axis, x: Axis, reduce: str, arg_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The mean or the largest sample of each bin, `[K, C, P, P]`; and which won, `[K * C * P * P]` in `arg_dtype` (None: empty)."""
    _check_finite(y.first, x.first)
    source = _accumulable(features)
    if reduce == "max":
        out, winners = _max_forward(source, image, y, x, arg_dtype)
    else:
        out = _window_forward(source, image, _lattice_windows(y, x, *features.shape[2:]))
        winners = torch.empty(0, dtype=torch.int8)
    return out.to(features.dtype), winners


def lattice_backward(
    grad: Tensor, features: Tensor, winners: Tensor, image: Tensor, y: Axis, x: Axis, reduce: str, of_features: bool, of_lattice: bool
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gradient of the features, laid out as they are; of `first` and `step`, of y and then of x. None for what is not asked for."""
    source, grad = _accumulable(features), _accumulable(grad).contiguous()
    if reduce == "max":
        out = _max_backward(grad, winners, image, y, x, source).to(features.dtype) if of_features else None
        return out, _max_lattice_gradient(source, grad, winners, image, y, x) if of_lattice else None
    windows = _lattice_windows(y, x, *features.shape[2:])
    out = _window_backward(grad, image, windows, source).to(features.dtype) if of_features else None
    if not of_lattice:
        return out, None
    of_weights = _window_weight_gradient(source, grad, image, windows)
    of_y = window_kernels.lattice_gradient(*_numpy(y), features.shape[2], windows.y_start, of_weights[0].numpy())
    of_x = window_kernels.lattice_gradient(*_numpy(x), features.shape[3], windows.x_start, of_weights[1].numpy())
    return out, [torch.from_numpy(g) for g in (*of_y, *of_x)]


def max_of_cells(features: Tensor, image: Tensor, y: Axis, x: Axis) -> tuple[Tensor, Tensor]:
    """The largest cell of each bin, `[K, C, P, P]`, and its index `row * W + column` as int32, -1 for an empty bin: torchvision's form."""
    out, winners = lattice_forward(features, image, y, x, "max", torch.int32)
    cells = torch.empty(out.flatten(2).shape, dtype=torch.int32)
    arrays = [*_numpy((winners, y.first.int(), x.first.int(), x.count)), features.shape[3], *_numpy((cells,))]
    _each_block(features.shape[1], lambda _, *block: argmax_kernels.cells_of_winners(*arrays, *block))
    return out, cells.view(out.shape)


def scatter_to_cells(grad: Tensor, cells: Tensor, image: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The backward of `max_of_cells`: gradient of features `[N, C, H, W]` of this `shape`, contiguous."""
    source = _accumulable(grad).contiguous()
    out = source.new_empty(*shape[:2], shape[2] * shape[3])
    arrays = _numpy((source.flatten(2), cells.contiguous().flatten(2), image, out))
    _each_block(shape[1], lambda _, *block: argmax_kernels.scatter_to_cells(*arrays, *block))
    return out.view(shape).to(grad.dtype)


def integral_forward(features: Tensor, image: Tensor, y: Bounds, x: Bounds) -> Tensor:
    """The mean of the interpolated map over each bin, `[K, C, P, P]`."""
    _check_finite(y.low, x.low)
    return _window_forward(_accumulable(features), image, _integral_windows(y, x, *features.shape[2:])).to(features.dtype)


def integral_backward(
    grad: Tensor, features: Tensor, image: Tensor, y: Bounds, x: Bounds, of_features: bool, of_bounds: bool
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gradient of the features, laid out as they are; gradients of `low` and `high`, of y and then of x. None for what is not asked for."""
    source, grad = _accumulable(features), _accumulable(grad).contiguous()
    windows = _integral_windows(y, x, *features.shape[2:])
    out = _window_backward(grad, image, windows, source).to(features.dtype) if of_features else None
    if not of_bounds:
        return out, None
    of_weights = _window_weight_gradient(source, grad, image, windows)
    of_y = window_kernels.integral_gradient(*_numpy(y), *windows[:3], of_weights[0].numpy())
    of_x = window_kernels.integral_gradient(*_numpy(x), *windows[3:], of_weights[1].numpy())
    return out, [torch.from_numpy(g) for g in (*of_y, *of_x)]


def _lattice_windows(y: Axis, x: Axis, height: int, width: int) -> Windows:
    return Windows(*window_kernels.lattice_windows(*_numpy(y), height), *window_kernels.lattice_windows(*_numpy(x), width))


def _integral_windows(y: Bounds, x: Bounds, height: int, width: int) -> Windows:
    return Windows(*window_kernels.integral_windows(*_numpy(y), height), *window_kernels.integral_windows(*_numpy(x), width))


def _window_forward(features: Tensor, image: Tensor, windows: Windows) -> Tensor:
    """Weighted sums of cells. `features [N, C, H, W]` in float32 or float64, any strides -> `[K, C, P, P]`."""
    bins = windows.y_start.shape[1], windows.x_start.shape[1]
    out = features.new_empty(len(image), features.shape[1], bins[0] * bins[1])
    arrays = [*_numpy((features, image)), *windows, *_numpy((out,))]
    _each_block(features.shape[1], lambda _, *block: window_kernels.window_forward(*arrays, *block))
    return out.unflatten(2, bins)


def _window_backward(grad: Tensor, image: Tensor, windows: Windows, like: Tensor) -> Tensor:
    """Gradient of the features, laid out as `like`."""
    out = torch.empty_like(like, dtype=grad.dtype)
    arrays = [*_numpy((grad.flatten(2), image)), *windows, *_numpy((out,))]
    _each_block(like.shape[1], lambda _, *block: window_kernels.window_backward(*arrays, *block))
    return out


def _window_weight_gradient(features: Tensor, grad: Tensor, image: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Gradients of `y_weights` and `x_weights`: each block of channels into a slice of its own, the slices added up in order."""
    blocks = len(_blocks(features.shape[1]))
    of_y, of_x = (features.new_zeros(blocks, *w.shape) for w in (windows.y_weights, windows.x_weights))
    arrays, slices = [*_numpy((features, grad.flatten(2), image)), *windows], _numpy((of_y, of_x))
    _each_block(features.shape[1], lambda b, *block: window_kernels.window_weight_gradient(*arrays, *(s[b] for s in slices), *block))
    return of_y.sum(0), of_x.sum(0)


def _max_forward(features: Tensor, image: Tensor, y: Axis, x: Axis, arg_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The largest samples, `[K, C, P, P]`; and which they are, `[K * C * P * P]` in `arg_dtype` and the kernels' order (None: empty)."""
    bins = y.first.shape[1], x.first.shape[1]
    out = features.new_empty(len(image), features.shape[1], bins[0] * bins[1])
    arg = torch.empty(out.numel() if arg_dtype else 0, dtype=arg_dtype or torch.int8)
    samples = max_kernels.lattice_samples(*_numpy((image, *y, *x)), *features.shape[2:])
    arrays = [*_numpy((features, image, y.count, x.count)), *samples, *_numpy((out, arg))]
    _each_block(features.shape[1], lambda _, *block: max_kernels.max_forward(*arrays, *block))
    return out.unflatten(2, bins), arg


def _max_backward(grad: Tensor, arg: Tensor, image: Tensor, y: Axis, x: Axis, like: Tensor) -> Tensor:
    """Gradient of the features, laid out as `like`."""
    out = torch.empty_like(like, dtype=grad.dtype)
    arrays = _numpy((grad.flatten(2), arg, image, *y[:3], *x[:3], out))
    _each_block(like.shape[1], lambda _, *block: max_kernels.max_backward(*arrays, *block))
    return out


def _max_lattice_gradient(features: Tensor, grad: Tensor, arg: Tensor, image: Tensor, y: Axis, x: Axis) -> list[Tensor]:
    """Gradients of `first` and `step`, of y and then of x; slices as in `_window_weight_gradient`."""
    blocks = len(_blocks(features.shape[1]))
    out = [features.new_zeros(blocks, *t.shape) for t in (y.first, y.step, x.first, x.step)]
    arrays, slices = _numpy((features, grad.flatten(2), arg, image, *y[:3], *x[:3])), _numpy(out)
    _each_block(features.shape[1], lambda b, *block: max_kernels.max_lattice_gradient(*arrays, *(s[b] for s in slices), *block))
    return [t.sum(0) for t in out]


def _accumulable(tensor: Tensor) -> Tensor:
    """Sums are kept in float32 at least, whatever the features are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_finite(*first: Tensor) -> None:
    if not all(bool(t.isfinite().all()) for t in first):
        raise ValueError("boxes: every coordinate must be finite and every image index in range; a lattice of this call is not a number")


def _numpy(tensors: Iterable[Tensor]) -> list[np.ndarray]:
    return [t.detach().numpy() for t in tensors]


def _blocks(channels: int) -> list[tuple[int, int]]:
    """Blocks of channels: large enough to vectorise, enough of them to share out."""
    size = min(max(channels // 8, 16), 64)
    return [(c, min(c + size, channels)) for c in range(0, channels, size)]


def _each_block(channels: int, task: Callable[[int, int, int], None]) -> None:
    blocks = _blocks(channels)
    threads = min(torch.get_num_threads(), len(blocks))
    if threads <= 1:
        for b, block in enumerate(blocks):
            task(b, *block)
    else:
        for running in [_pool(threads).submit(task, b, *block) for b, block in enumerate(blocks)]:
            running.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="roi")


if hasattr(os, "register_at_fork"):  # a forked worker has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
