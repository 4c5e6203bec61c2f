"""What the Numba kernels of the CPU path share: how they are compiled, loops over channels, and the layouts they read and write.

A kernel works on channels `c0` to `c1`. It copies its slice of the map channels-last, where the channels of a cell are neighbours and every
inner loop runs over them, and visits the RoIs in order. `ops/cpu/kernels.py` calls the kernels and hands out the blocks of channels.
"""

import os
from collections.abc import Callable
from functools import partial

import numba
import numpy as np


def compile_kernel(function: Callable, **options) -> Callable:
    """Compiled when first called, and kept on disk until the function's file changes, or this one, which is compiled into it."""
    kernel = numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
    kept = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
    if kept is not None:  # None where NUMBA_DISABLE_JIT is set
        kept._source_stamp = kept._source_stamp, os.stat(__file__).st_mtime, os.stat(__file__).st_size  # Numba looks at the first alone
    return kernel


# Sums over channels may be reassociated, so that they vectorise: settled when the kernel is compiled, so a run repeats bit for bit. Nothing
# else may: positions must come out the same wherever they are computed, or a kernel would read beyond what it reached for.
compile_sums = partial(compile_kernel, fastmath={"reassoc"})
inline = numba.njit(inline="always")


@inline
def clamp(position, size):
    return min(max(position, 0), size - 1)


@inline
def cell_below(position, size):
    return np.int32(np.floor(clamp(position, size)))


@inline
def add(to, weight, x):
    weight = to.dtype.type(weight)
    for c in range(len(to)):
        to[c] += weight * x[c]


@inline
def blend(x, weight, y, to):
    weight = to.dtype.type(weight)
    for c in range(len(to)):
        to[c] = x[c] + weight * (y[c] - x[c])


@inline
def dot(x, y):
    total = x.dtype.type(0)
    for c in range(len(x)):
        total += x[c] * y[c]
    return total


@compile_kernel
def channels_last(features, c0, c1):
    """Channels `c0` to `c1` of `[N, C, H, W]`, any strides, as one flat `[N, H, W, c1 - c0]`."""
    images, _, height, width = features.shape
    channels = c1 - c0
    cells = np.empty((images, height, width, channels), features.dtype)
    if features.strides[1] < features.strides[3]:
        cells[:] = features[:, c0:c1].transpose(0, 2, 3, 1)
    else:
        for n in range(images):
            for y in range(height):
                for c in range(channels):
                    for x in range(width):
                        cells[n, y, x, c] = features[n, c0 + c, y, x]
    return cells.reshape(-1)


@compile_kernel
def channels_first(cells, features, c0, c1):
    images, _, height, width = features.shape
    view = cells.reshape((images, height, width, c1 - c0))
    if features.strides[1] < features.strides[3]:
        features[:, c0:c1] = view.transpose(0, 3, 1, 2)
    else:
        for n in range(images):
            for y in range(height):
                for c in range(c1 - c0):
                    for x in range(width):
                        features[n, c0 + c, y, x] = view[n, y, x, c]


@compile_kernel
def write_tile(tile, out, c0):
    for c in range(tile.shape[1]):
        for p in range(tile.shape[0]):
            out[c0 + c, p] = tile[p, c]


@compile_kernel
def read_tile(out, tile, c0):
    for c in range(tile.shape[1]):
        for p in range(tile.shape[0]):
            tile[p, c] = out[c0 + c, p]
