"""What the Numba kernels of the CPU path share: how they are compiled, loops over channels, and the layouts they read and write.

A kernel works on a block of channels of the map, copied channels-last: the channels of a cell are neighbours, every inner loop runs over
them, and one machine code serves maps of any layout. It visits the RoIs in order. `ops/cpu/kernels.py` hands out the blocks of channels.
"""

import inspect
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from hashlib import sha256
from typing import Any

import numba
import numpy as np
from numba.core.caching import FunctionCache

log = logging.getLogger(__name__)


class KernelCache(FunctionCache):
    """Numba's cache of machine code on disk. A file that cannot be read or written costs a compilation and raises no error.

    Numba takes a change in the kernel's own file for a new kernel; here so is a change in this file, whose functions are compiled into it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = self._cache_file._source_stamp, _stamp_of_this_file()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # whatever unpickling a damaged file ends with
            return self._forget(error)

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            self._forget(error)

    def _forget(self, error: Exception) -> None:
        """Remove the index, which may name a file that was not written."""
        with suppress(OSError):
            os.unlink(self._cache_file._index_path)
        _warn_of_no_cache(f"{self.cache_path}: {type(error).__name__}: {error}")


def compile_kernel(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function when it is first called, and keep the machine code on disk where that is possible."""
    kernel: Any = numba.njit(nogil=True, error_model="numpy", **options)(function)
    if hasattr(kernel, "enable_caching"):  # with NUMBA_DISABLE_JIT it is the function
        try:
            kernel._cache = KernelCache(function)
        except Exception as error:  # no folder is writable, or no source is there to tell a change by
            _warn_of_no_cache(f"{type(error).__name__}: {error}")
    return kernel


@cache
def _stamp_of_this_file() -> str:
    return sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()


_warned = False


def _warn_of_no_cache(reason: str) -> None:
    global _warned
    if not _warned:
        log.warning(
            "machine code of the RoI operators cannot be kept on disk (%s), so each process compiles them anew, which takes seconds. "
            "Set NUMBA_CACHE_DIR to a folder that can be written",
            reason,
        )
    _warned = True


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
    """Add `weight * x`. What has no weight is not read: its product would be NaN where `x` is infinite or NaN."""
    weight = to.dtype.type(weight)
    if weight != 0:
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


# Loops in the place of assignments of transposed arrays, whose checks of shapes take seconds to compile.


@compile_kernel
def copy_channels_last(features, c0, c1):
    """Channels `c0` to `c1` of `[N, C, H, W]`, any strides, as a new `[N, H, W, c1 - c0]`."""
    images, _, height, width = features.shape
    cells = np.empty((images, height, width, c1 - c0), features.dtype)
    for n in range(images):
        for y in range(height):
            if features.strides[1] < features.strides[3]:
                for x in range(width):
                    for c in range(c1 - c0):
                        cells[n, y, x, c] = features[n, c0 + c, y, x]
            else:
                for c in range(c1 - c0):
                    for x in range(width):
                        cells[n, y, x, c] = features[n, c0 + c, y, x]
    return cells


@compile_kernel
def copy_channels_first(cells, features, c0):
    """Write `[N, H, W, channels]` to the channels from `c0` on of `[N, C, H, W]`, any strides."""
    images, height, width, channels = cells.shape
    for n in range(images):
        for y in range(height):
            if features.strides[1] < features.strides[3]:
                for x in range(width):
                    for c in range(channels):
                        features[n, c0 + c, y, x] = cells[n, y, x, c]
            else:
                for c in range(channels):
                    for x in range(width):
                        features[n, c0 + c, y, x] = cells[n, y, x, c]


@compile_kernel
def write_tile(tile, out, c0):
    """Write the bins of a RoI, `[bins, channels]`, to the channels from `c0` on of `[C, bins]`."""
    for c in range(tile.shape[1]):
        for p in range(tile.shape[0]):
            out[c0 + c, p] = tile[p, c]


@compile_kernel
def read_tile(grad, tile, c0):
    """The reverse of `write_tile`."""
    for c in range(tile.shape[1]):
        for p in range(tile.shape[0]):
            tile[p, c] = grad[c0 + c, p]
