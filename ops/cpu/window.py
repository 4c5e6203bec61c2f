"""Numba kernels of a bin's mean, of its samples or as the exact integral.

The weights of the cells are the outer product of a window of weights in y and one in x, which takes far fewer reads than visiting the
samples. The transpose gives the gradient of the features. One more kernel gives the gradient of the weights, from which that of the lattice
follows.
"""

import numpy as np

from roi_quantization.ops.cpu.loops import (
    add,
    cell_below,
    clamp,
    compile_kernel,
    compile_sums,
    dot,
    inline,
    read_tile,
    write_tile,
)


@compile_kernel
def lattice_windows(first, step, count, total, size):
    """The mean over `count` interpolated samples as weights of neighbouring cells: first cell, number of cells, weights."""
    rois, bins = first.shape
    start, cells = np.zeros((rois, bins), np.int32), np.zeros((rois, bins), np.int32)
    longest = 1
    for k in range(rois):
        for p in range(bins):
            if count[k, p] > 0:
                a, b = first[k, p], first[k, p] + (count[k, p] - 1) * step[k, p]
                low, high = cell_below(min(a, b), size), cell_below(max(a, b), size)
                start[k, p], cells[k, p] = low, min(high + 2, size) - low
                longest = max(longest, cells[k, p])
    weights = np.zeros((rois, bins, longest), first.dtype)
    for k in range(rois):
        for p in range(bins):
            for i in range(count[k, p]):
                position = clamp(first[k, p] + i * step[k, p], size)
                low = cell_below(position, size)
                share = 1 / total[k, p]
                weights[k, p, low - start[k, p]] += (1 - (position - low)) * share
                if low + 1 < size:
                    weights[k, p, low + 1 - start[k, p]] += (position - low) * share
    return start, cells, weights


@compile_kernel
def lattice_gradient(first, step, count, total, size, start, grad_weights):
    """Transpose of the derivative of `lattice_windows`: gradients of `first` and `step`."""
    grad_first, grad_step = np.zeros_like(first), np.zeros_like(step)
    for k in range(first.shape[0]):
        for p in range(first.shape[1]):
            for i in range(count[k, p]):
                position = first[k, p] + i * step[k, p]
                if 0 <= position < size - 1:  # clamped elsewhere
                    low = cell_below(position, size) - start[k, p]
                    slope = (grad_weights[k, p, low + 1] - grad_weights[k, p, low]) / total[k, p]
                    grad_first[k, p] += slope
                    grad_step[k, p] += i * slope
    return grad_first, grad_step


@compile_kernel
def integral_windows(low, high, size):
    """The mean of the interpolated map between `low` and `high` as weights of neighbouring cells; 0 off the map."""
    rois, bins = low.shape
    start, cells = np.zeros((rois, bins), np.int32), np.zeros((rois, bins), np.int32)
    longest = 1
    for k in range(rois):
        for p in range(bins):
            if high[k, p] > low[k, p] and high[k, p] > -1 and low[k, p] < size:
                start[k, p] = cell_below(low[k, p], size)
                cells[k, p] = min(cell_below(high[k, p], size) + 2, size) - start[k, p]
                longest = max(longest, cells[k, p])
    weights = np.zeros((rois, bins, longest), low.dtype)
    for k in range(rois):
        for p in range(bins):
            for i in range(cells[k, p]):
                cell = start[k, p] + i
                weights[k, p, i] = _tent_integral(low[k, p] - cell, high[k, p] - cell) / (high[k, p] - low[k, p])
    return start, cells, weights


@compile_kernel
def integral_gradient(low, high, start, cells, weights, grad_weights):
    """Transpose of the derivative of `integral_windows`: gradients of `low` and `high`."""
    grad_low, grad_high = np.zeros_like(low), np.zeros_like(high)
    for k in range(low.shape[0]):
        for p in range(low.shape[1]):
            for i in range(cells[k, p]):
                cell, extent = start[k, p] + i, high[k, p] - low[k, p]
                grad_high[k, p] += grad_weights[k, p, i] * (max(0, 1 - abs(high[k, p] - cell)) - weights[k, p, i]) / extent
                grad_low[k, p] -= grad_weights[k, p, i] * (max(0, 1 - abs(low[k, p] - cell)) - weights[k, p, i]) / extent
    return grad_low, grad_high


@compile_kernel
def _tent_integral(a, b):
    """Integral of `max(0, 1 - |t|)` from a to b. On one side of 0 no digits may cancel, or a thin bin would have none left."""
    a, b = min(max(a, -1), 1), min(max(b, -1), 1)
    return (b - a) * (1 - abs(a + b) / 2) if a * b >= 0 else b - a - (a * a + b * b) / 2


@compile_kernel
def window_forward(cells, image, y_start, y_cells, y_weights, x_start, x_cells, x_weights, out, c0):
    """The weighted sum of each bin's cells, from `cells [N, H, W, channels]` to the channels from `c0` on of `out [K, C, bins]`."""
    _, height, width, channels = cells.shape
    bins_y, bins_x = y_start.shape[1], x_start.shape[1]
    flat = cells.reshape(-1)
    row = np.empty(width * channels, cells.dtype)  # one bin's mean over y, for every column that the RoI reads
    tile = np.zeros((bins_y * bins_x, channels), cells.dtype)
    for k in range(len(image)):
        left, length = _columns_read(x_start, x_cells, k, channels)
        for p in range(bins_y):
            _pool_rows(flat, image[k] * height + y_start[k, p], y_cells[k, p], y_weights[k, p], width, left, channels, row[:length])
            for q in range(bins_x):
                pooled = tile[p * bins_x + q]
                pooled[:] = 0
                for i in range(x_cells[k, q]):
                    at = (x_start[k, q] - left + i) * channels
                    add(pooled, x_weights[k, q, i], row[at : at + channels])
        write_tile(tile, out[k], c0)


@compile_kernel
def window_backward(grad, image, y_start, y_cells, y_weights, x_start, x_cells, x_weights, cells, c0):
    """Add to `cells [N, H, W, channels]` the gradient of the channels from `c0` on."""
    _, height, width, channels = cells.shape
    bins_y, bins_x = y_start.shape[1], x_start.shape[1]
    flat = cells.reshape(-1)
    row = np.empty(width * channels, cells.dtype)
    tile = np.empty((bins_y * bins_x, channels), cells.dtype)
    for k in range(len(image)):
        read_tile(grad[k], tile, c0)
        left, length = _columns_read(x_start, x_cells, k, channels)
        for p in range(bins_y):
            _spread_bins(tile, p, x_start[k], x_cells[k], x_weights[k], left, channels, row[:length])
            for i in range(y_cells[k, p]):
                at = ((image[k] * height + y_start[k, p] + i) * width + left) * channels
                add(flat[at : at + length], y_weights[k, p, i], row[:length])


@compile_sums
def window_weight_gradient(
    cells, grad, image, y_start, y_cells, y_weights, x_start, x_cells, x_weights, grad_y_weights, grad_x_weights, c0
):
    """Gradients of the weights, summed over the channels of `cells [N, H, W, channels]`, which are those from `c0` on."""
    _, height, width, channels = cells.shape
    bins_y, bins_x = y_start.shape[1], x_start.shape[1]
    flat = cells.reshape(-1)
    row = np.empty(width * channels, cells.dtype)
    tile = np.empty((bins_y * bins_x, channels), cells.dtype)
    for k in range(len(image)):
        read_tile(grad[k], tile, c0)
        left, length = _columns_read(x_start, x_cells, k, channels)
        for p in range(bins_y):
            _pool_rows(flat, image[k] * height + y_start[k, p], y_cells[k, p], y_weights[k, p], width, left, channels, row[:length])
            for q in range(bins_x):
                for i in range(x_cells[k, q]):
                    at = (x_start[k, q] - left + i) * channels
                    grad_x_weights[k, q, i] += dot(tile[p * bins_x + q], row[at : at + channels])
            _spread_bins(tile, p, x_start[k], x_cells[k], x_weights[k], left, channels, row[:length])
            for i in range(y_cells[k, p]):
                at = ((image[k] * height + y_start[k, p] + i) * width + left) * channels
                grad_y_weights[k, p, i] += dot(flat[at : at + length], row[:length])


@inline
def _pool_rows(flat, y, rows, weights, width, left, channels, row):
    """Sum the columns from `left` on of the rows from `y` on."""
    row[:] = 0
    for i in range(rows):
        at = ((y + i) * width + left) * channels
        add(row, weights[i], flat[at : at + len(row)])


@inline
def _spread_bins(tile, p, start, count, weights, left, channels, row):
    """The transpose over x: each bin of row `p` of bins to the columns that it read."""
    row[:] = 0
    for q in range(len(start)):
        for i in range(count[q]):
            at = (start[q] - left + i) * channels
            add(row[at : at + channels], weights[q, i], tile[p * len(start) + q])


@compile_kernel
def _columns_read(start, count, k, channels):
    """First column that the windows of RoI k read, and how many elements of a channels-last row all of them span."""
    left, right = 1 << 30, 0
    for p in range(start.shape[1]):
        if count[k, p] > 0:
            left, right = min(left, start[k, p]), max(right, start[k, p] + count[k, p])
    return min(left, right), max(right - left, 0) * channels
