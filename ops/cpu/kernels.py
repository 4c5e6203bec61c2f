"""The operators on a CPU: lattices in, Numba kernels over blocks of channels, tensors out. The same functions as `ops/cuda/kernels.py`.

Blocks share nothing and do not depend on the number of threads, so neither do the results: the same bits on one thread or sixteen.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.thread import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from roi_quantization.ops.cpu import argmax as argmax_kernels
from roi_quantization.ops.cpu import max as max_kernels
from roi_quantization.ops.cpu import window as window_kernels
from roi_quantization.ops.cpu.loops import copy_channels_first, copy_channels_last
from roi_quantization.ops.cpu.pages import ask_for_large_pages
from roi_quantization.ops.geometry import Axis, Bounds, smallest_winners_dtype

MOST_SAMPLES = 2**20  # looked up together


class Windows(NamedTuple):
    """Weights of neighbouring cells for each bin along y and along x: the form that a mean has for the kernels."""

    y_start: np.ndarray  # [K, P] first cell
    y_cells: np.ndarray  # [K, P] number of cells
    y_weights: np.ndarray  # [K, P, longest]
    x_start: np.ndarray
    x_cells: np.ndarray
    x_weights: np.ndarray


def lattice_forward(
    features: Tensor, image: Tensor, y: Axis, x: Axis, reduce: str, winners_dtype: torch.dtype | None, whole_cells: bool = False
) -> tuple[Tensor, Tensor]:
    """The mean or the largest sample of each bin, `[K, C, P, P]`; and which won, `[K * C * P * P]` (without a dtype: empty)."""
    _check_finite(y.first, x.first)
    source = _accumulable(features)
    if reduce == "max":
        out, winners = _max_forward(source, image, y, x, winners_dtype)
    else:
        out = _window_forward(source, image, _lattice_windows(y, x, *features.shape[2:]))
        winners = torch.empty(0, dtype=torch.int8)
    return out.to(features.dtype), winners


def lattice_backward(
    grad: Tensor,
    features: Tensor | None,
    winners: Tensor,
    image: Tensor,
    y: Axis,
    x: Axis,
    reduce: str,
    of_features: Tensor | None,
    of_lattice: bool,
    whole_cells: bool = False,
) -> list[Tensor] | None:
    """Write the gradient of the features to `of_features`, unless it is None.

    Args:
        grad: of the output, `[K, C, P, P]`.
        features: `[N, C, H, W]`, read for `of_lattice` alone and None without it.
        winners: for `max`, `[K * C * P * P]` as `lattice_forward` gave them; else unused.
        image, y, x, reduce: as of `lattice_forward`.
        of_features: `[N, C, H, W]`, any strides; every element is written.
        of_lattice: whether the gradients of the lattices are wanted.
        whole_cells: unused here.

    Returns:
        With `of_lattice` the gradients of `first` and `step`, of y and then of x, each `[K, P]`; else None.
    """
    grad = _accumulable(grad).contiguous()
    if reduce == "max":
        if of_features is not None:
            _write(of_features, lambda out: _max_backward(grad, winners, image, y, x, out))
        return _max_lattice_gradient(_map(features), grad, winners, image, y, x) if of_lattice else None
    sizes = (_map(of_features) if features is None else features).shape[2:]
    windows = _lattice_windows(y, x, *sizes)
    if of_features is not None:
        _write(of_features, lambda out: _window_backward(grad, image, windows, out))
    if not of_lattice:
        return None
    of_weights = _window_weight_gradient(_map(features), grad, image, windows)
    of_y = window_kernels.lattice_gradient(*_numpy(y), sizes[0], windows.y_start, of_weights[0].numpy())
    of_x = window_kernels.lattice_gradient(*_numpy(x), sizes[1], windows.x_start, of_weights[1].numpy())
    return [torch.from_numpy(g) for g in (*of_y, *of_x)]


def max_of_cells(features: Tensor, image: Tensor, y: Axis, x: Axis) -> tuple[Tensor, Tensor]:
    """The largest cell of each bin, `[K, C, P, P]`, and its index `row * W + column` as int32, -1 for an empty bin: torchvision's form."""
    out, winners = lattice_forward(features, image, y, x, "max", smallest_winners_dtype(features.shape[2] * features.shape[3]))
    cells = torch.empty(out.flatten(2).shape, dtype=torch.int32)
    arrays = [*_numpy((winners, y.first.int(), x.first.int(), x.visited)), features.shape[3], *_numpy((cells,))]
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
    grad: Tensor, features: Tensor | None, image: Tensor, y: Bounds, x: Bounds, of_features: Tensor | None, of_bounds: bool
) -> list[Tensor] | None:
    """Write the gradient of the features to `of_features`, unless it is None.

    Args:
        grad: of the output, `[K, C, P, P]`.
        features: `[N, C, H, W]`, read for `of_bounds` alone and None without it.
        image, y, x: as of `integral_forward`.
        of_features: `[N, C, H, W]`, any strides; every element is written.
        of_bounds: whether the gradients of the edges are wanted.

    Returns:
        With `of_bounds` the gradients of `low` and `high`, of y and then of x, each `[K, P]`; else None.
    """
    grad = _accumulable(grad).contiguous()
    windows = _integral_windows(y, x, *(_map(of_features) if features is None else features).shape[2:])
    if of_features is not None:
        _write(of_features, lambda out: _window_backward(grad, image, windows, out))
    if not of_bounds:
        return None
    of_weights = _window_weight_gradient(_map(features), grad, image, windows)
    of_y = window_kernels.integral_gradient(*_numpy(y), *windows[:3], of_weights[0].numpy())
    of_x = window_kernels.integral_gradient(*_numpy(x), *windows[3:], of_weights[1].numpy())
    return [torch.from_numpy(g) for g in (*of_y, *of_x)]


def _lattice_windows(y: Axis, x: Axis, height: int, width: int) -> Windows:
    return Windows(*window_kernels.lattice_windows(*_numpy(y), height), *window_kernels.lattice_windows(*_numpy(x), width))


def _integral_windows(y: Bounds, x: Bounds, height: int, width: int) -> Windows:
    return Windows(*window_kernels.integral_windows(*_numpy(y), height), *window_kernels.integral_windows(*_numpy(x), width))


def _window_forward(features: Tensor, image: Tensor, windows: Windows) -> Tensor:
    """Weighted sums of cells. `features [N, C, H, W]` in float32 or float64, any strides -> `[K, C, P, P]`."""
    out = ask_for_large_pages(features.new_empty(len(image), features.shape[1], windows.y_start.shape[1], windows.x_start.shape[1]))
    arrays = [*_numpy((image,)), *windows, *_numpy((out.flatten(2),))]
    _each_block_of_map(features, lambda _, cells, c0: window_kernels.window_forward(cells, *arrays, c0))
    return out


def _window_backward(grad: Tensor, image: Tensor, windows: Windows, out: Tensor) -> None:
    """Write the gradient of the features."""
    arrays = [*_numpy((grad.flatten(2), image)), *windows]
    _each_block_of_gradient(out, lambda cells, c0: window_kernels.window_backward(*arrays, cells, c0))


def _window_weight_gradient(features: Tensor, grad: Tensor, image: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Gradients of `y_weights` and `x_weights`: each block of channels into a slice of its own, the slices added up in order."""
    blocks = len(_blocks(features.shape[1]))
    of_y, of_x = (features.new_zeros(blocks, *w.shape) for w in (windows.y_weights, windows.x_weights))
    arrays, slices = [*_numpy((grad.flatten(2), image)), *windows], _numpy((of_y, of_x))
    _each_block_of_map(features, lambda b, cells, c0: window_kernels.window_weight_gradient(cells, *arrays, *(s[b] for s in slices), c0))
    return of_y.sum(0), of_x.sum(0)


def _max_forward(features: Tensor, image: Tensor, y: Axis, x: Axis, winners_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The largest samples, `[K, C, P, P]`; and which they are, `[K * C * P * P]` in the kernels' order (without a dtype: empty)."""
    out = ask_for_large_pages(features.new_empty(len(image), features.shape[1], y.first.shape[1], x.first.shape[1]))
    winners = torch.empty(out.numel() if winners_dtype else 0, dtype=winners_dtype or torch.int8)
    to, which = _numpy((out.flatten(2), winners))
    for k0, k1 in _chunks(y, x, features):
        rois = [a[k0:k1] for a in _numpy((image, *y, *x))]
        samples = max_kernels.lattice_samples(*rois, *features.shape[2:])
        arrays = [rois[0], rois[3], rois[7], *samples, to[k0:k1], which, k0, len(image)]

        def task(_: int, cells: np.ndarray, c0: int, arrays: list[Any] = arrays) -> None:
            max_kernels.max_forward(cells, *arrays, c0)

        _each_block_of_map(features, task)
    return out, winners


def _chunks(y: Axis, x: Axis, features: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of RoIs whose samples are looked up together: a dozen bytes a sample, which large boxes on a large map make many of.

    Each chunk copies the map, which sixteen samples a cell make cheap beside the visits.
    """
    images, _, height, width = features.shape
    limit = max(MOST_SAMPLES, 16 * images * height * width)
    ends = (y.visited.sum(1) * x.visited.sum(1)).cumsum(0).numpy()
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        end = max(int(np.searchsorted(ends, before + limit, side="right")), start + 1)
        yield start, end
        start = end


def _max_backward(grad: Tensor, winners: Tensor, image: Tensor, y: Axis, x: Axis, out: Tensor) -> None:
    """Write the gradient of the features."""
    arrays = _numpy((grad.flatten(2), winners, image, *y[:3], *x[:3]))
    _each_block_of_gradient(out, lambda cells, c0: max_kernels.max_backward(*arrays, cells, c0))


def _max_lattice_gradient(features: Tensor, grad: Tensor, winners: Tensor, image: Tensor, y: Axis, x: Axis) -> list[Tensor]:
    """Gradients of `first` and `step`, of y and then of x; slices as in `_window_weight_gradient`."""
    blocks = len(_blocks(features.shape[1]))
    out = [features.new_zeros(blocks, *t.shape) for t in (y.first, y.step, x.first, x.step)]
    arrays, slices = _numpy((grad.flatten(2), winners, image, *y[:3], *x[:3])), _numpy(out)
    _each_block_of_map(features, lambda b, cells, c0: max_kernels.max_lattice_gradient(cells, *arrays, *(s[b] for s in slices), c0))
    return [t.sum(0) for t in out]


def _map(features: Tensor | None) -> Tensor:
    assert features is not None, "the map is kept for a gradient that reads it"
    return _accumulable(features)


def _accumulable(tensor: Tensor) -> Tensor:
    """Sums are kept in float32 at least, whatever the features are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _write(out: Tensor, compute: Callable[[Tensor], None]) -> None:
    """Let `compute` write to `out`, through a tensor in which sums can be kept."""
    wide = torch.empty_like(out, dtype=torch.promote_types(out.dtype, torch.float32)) if out.itemsize < 4 else out
    compute(wide)
    if wide is not out:
        out.copy_(wide)


def _check_finite(y: Tensor, x: Tensor) -> None:
    """Raise ValueError for a RoI whose bins, `[K, P]` along each axis, start at a position that is not finite."""
    is_finite = y.isfinite().all(1) & x.isfinite().all(1)
    if not is_finite.all():
        k = int((~is_finite).nonzero()[0])
        raise ValueError(
            f"boxes: the bins of box {k} lie at positions that are infinite or NaN in {y.dtype}. Boxes must be finite, and no larger than "
            "1e18 cells, from where on positions can overflow: clip them to their image."
        )


def _numpy(tensors: Iterable[Tensor]) -> list[np.ndarray]:
    return [t.detach().numpy() for t in tensors]


def _blocks(channels: int) -> list[tuple[int, int]]:
    """Blocks of channels: large enough to vectorise, enough of them to share out."""
    size = min(max(channels // 8, 16), 64)
    return [(c, min(c + size, channels)) for c in range(0, channels, size)]


def _each_block(channels: int, task: Callable[..., None]) -> None:
    """Call `task(number, first channel, last channel + 1)` for each block, in as many threads as PyTorch has."""
    waiting = deque(enumerate(_blocks(channels)))

    def work() -> None:
        while True:
            try:
                number, block = waiting.popleft()
            except IndexError:
                return
            task(number, *block)

    helpers = [helper for helper in (_start(work) for _ in range(min(torch.get_num_threads(), len(waiting)) - 1)) if helper]
    work()
    for helper in helpers:
        if not helper.cancel():  # one that has not started yet has nothing left to do
            helper.result()


def _each_block_of_map(features: Tensor, task: Callable[[int, np.ndarray, int], None]) -> None:
    """Call `task(number, cells [N, H, W, channels], first channel)` for each block."""
    (source,) = _numpy((features,))
    _each_block(features.shape[1], lambda number, c0, c1: task(number, copy_channels_last(source, c0, c1), c0))


def _each_block_of_gradient(out: Tensor, add: Callable[[np.ndarray, int], None]) -> None:
    """Let `add(cells, first channel)` add the gradient of each block to zeros `[N, H, W, channels]`, and write them to `out`."""
    (to,) = _numpy((out,))
    images, channels, height, width = to.shape

    def task(_: int, c0: int, c1: int) -> None:
        cells = np.zeros((images, height, width, c1 - c0), to.dtype)
        add(cells, c0)
        copy_channels_first(cells, to, c0)

    _each_block(channels, task)


def _start(work: Callable[[], None]) -> Future[None] | None:
    try:
        return _helpers().submit(work)
    except RuntimeError:  # Python shuts down and starts no threads any more: the caller does it all
        return None


@cache
def _helpers() -> ThreadPoolExecutor:
    """The threads that help a caller, one pool for all: it starts them when they are first wanted."""
    return ThreadPoolExecutor(max((os.cpu_count() or 1) - 1, 1), thread_name_prefix="roi")


if hasattr(os, "register_at_fork"):  # a forked worker has none of its parent's threads
    os.register_at_fork(after_in_child=_helpers.cache_clear)
