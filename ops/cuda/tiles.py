"""Triton kernels of the gradient of the features, without atomics: a program owns a tile of cells and gathers what RoIs give to it.

Scattering, where each RoI adds to the cells that it read, leaves the order of the additions to chance. Here each cell is written once, by a
program that visits the RoIs touching its tile in their order, so that every run gives the same bits. `list_rois_by_tile` lists those RoIs
first.
"""

import triton
import triton.language as tl

from roi_quantization.ops.cuda.integral import integral_share, tent
from roi_quantization.ops.cuda.lattice import clamp


@triton.jit
def tile_origin(tile, tiles, tiles_x, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Image of a tile, and its first row and column."""
    return tile // tiles, tile % tiles // tiles_x * TILE_Y, tile % tiles % tiles_x * TILE_X


@triton.jit
def cell_range(first, step, count, at, exists, size, INTEGRAL: tl.constexpr):
    """First and last cell that bins read along an axis; `size` and -1 where there are none. Of an integral, `first, step` are the edges."""
    start, end = tl.load(first + at, exists, 0.0), tl.load(step + at, exists, 0.0)
    if INTEGRAL:
        reads = exists & (end > start) & (end > -1) & (start < size)
    else:
        n = tl.load(count + at, exists, 0)
        end = start + (n - 1) * end  # the last sample
        reads = exists & (n > 0)
    low, high = tl.floor(clamp(tl.minimum(start, end), size)), tl.floor(clamp(tl.maximum(start, end), size))
    return tl.where(reads, low, size).to(tl.int32), tl.where(reads, tl.minimum(high + 1, size - 1.0), -1).to(tl.int32)


@triton.jit
def list_rois_by_tile(
    image, y_first, y_step, y_count, x_first, x_step, x_count, lists, lengths,
    rois, height, width, bins_y, bins_x, tiles_x, tiles,
    INTEGRAL: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, ROIS: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr,
):  # fmt: skip
    """The RoIs that read cells of each tile, in order, into `lists [images * tiles, rois]`, and how many they are."""
    tile = tl.program_id(0)
    n, y0, x0 = tile_origin(tile, tiles, tiles_x, TILE_Y, TILE_X)
    p, q = tl.arange(0, BINS_Y)[None, :], tl.arange(0, BINS_X)[None, :]
    length = 0
    for k0 in range(0, rois, ROIS):
        k = k0 + tl.arange(0, ROIS)
        exists = (k < rois)[:, None]
        top, bottom = cell_range(y_first, y_step, y_count, k[:, None] * bins_y + p, exists & (p < bins_y), height, INTEGRAL)
        left, right = cell_range(x_first, x_step, x_count, k[:, None] * bins_x + q, exists & (q < bins_x), width, INTEGRAL)
        touches = (k < rois) & (tl.load(image + k, k < rois, -1) == n)
        touches &= (tl.min(top, 1) < y0 + TILE_Y) & (tl.max(bottom, 1) >= y0)
        touches &= (tl.min(left, 1) < x0 + TILE_X) & (tl.max(right, 1) >= x0)
        before = tl.cumsum(touches.to(tl.int32), 0) - touches.to(tl.int32)
        tl.store(lists + tile.to(tl.int64) * rois + length + before, k, touches)
        length += tl.sum(touches.to(tl.int32), 0)
    tl.store(lengths + tile, length)


@triton.jit
def lattice_share(first, step, count, total, at, is_bin, cell, size):
    """Share of each of `cell [CELLS, 1]` in the mean of each bin's samples along an axis, bins `at [1, BINS]`."""
    start, distance, n = tl.load(first + at, is_bin, 0.0), tl.load(step + at, is_bin, 0.0), tl.load(count + at, is_bin, 0)
    share = tl.zeros_like(start + cell)
    for i in range(tl.max(n)):
        share += tl.where(i < n, tent(clamp(start + i * distance, size) - cell), 0.0)
    return share / tl.maximum(tl.load(total + at, is_bin, 1.0), 1.0)


@triton.jit
def edges_share(low, high, at, is_bin, cell):
    """Share of each of `cell [CELLS, 1]` in the integral over each bin, bins `at [1, BINS]`."""
    return integral_share(tl.load(low + at, is_bin, 0.0), tl.load(high + at, is_bin, 0.0), cell)


@triton.jit
def mean_backward(
    grad, y_first, y_step, y_count, y_total, x_first, x_step, x_count, x_total, lists, lengths, out,
    rois, channels, height, width, stride_n, stride_c, stride_y, stride_x, bins_y, bins_x, tiles_x, tiles,
    INTEGRAL: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr, CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """What a RoI gives to a tile is a product of matrices: (share of each cell in each bin) @ (gradient of each bin and channel).

    The shares are themselves an outer product, of those along y and those along x.
    """
    tile = tl.program_id(0)
    n, y0, x0 = tile_origin(tile, tiles, tiles_x, TILE_Y, TILE_X)
    y, x = (y0 + tl.arange(0, TILE_Y))[:, None], (x0 + tl.arange(0, TILE_X))[:, None]
    q = tl.arange(0, BINS_X)[None, :]
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    bins = bins_y * bins_x
    result = tl.zeros((TILE_Y * TILE_X, CHANNELS), tl.float32)
    for r in range(tl.load(lengths + tile)):
        k = tl.load(lists + tile.to(tl.int64) * rois + r).to(tl.int64)
        if INTEGRAL:  # first and step are the edges of the bins
            of_x = edges_share(x_first, x_step, k * bins_x + q, q < bins_x, x)
        else:
            of_x = lattice_share(x_first, x_step, x_count, x_total, k * bins_x + q, q < bins_x, x, width)
        for p0 in range(0, bins_y, BINS_Y):
            p = p0 + tl.arange(0, BINS_Y)[None, :]
            if INTEGRAL:
                of_y = edges_share(y_first, y_step, k * bins_y + p, p < bins_y, y)
            else:
                of_y = lattice_share(y_first, y_step, y_count, y_total, k * bins_y + p, p < bins_y, y, height)
            shares = tl.reshape(of_y[:, None, :, None] * of_x[None, :, None, :], (TILE_Y * TILE_X, BINS_Y * BINS_X))
            b = p0 * bins_x + tl.reshape(tl.arange(0, BINS_Y)[:, None] * bins_x + q, (BINS_Y * BINS_X,))[:, None]
            is_bin = tl.reshape((tl.arange(0, BINS_Y)[:, None] < bins_y - p0) & (q < bins_x), (BINS_Y * BINS_X,))[:, None]
            g = tl.load(grad + k * channels * bins + c.to(OFFSET) * bins + b, is_bin & (c < channels), 0.0).to(tl.float32)
            result = tl.dot(shares, g, result, input_precision="tf32x3")  # float32 in three products of tensor cores
    cell = tl.arange(0, TILE_Y * TILE_X)[:, None]
    y, x = y0 + cell // TILE_X, x0 + cell % TILE_X
    at = n.to(tl.int64) * stride_n + c.to(OFFSET) * stride_c + (y.to(OFFSET) * stride_y + x.to(OFFSET) * stride_x)
    tl.store(out + at, result.to(out.dtype.element_ty), (y < height) & (x < width) & (c < channels))


@triton.jit
def bins_of_cells(first, step, count, k, cell, size, bins, BINS: tl.constexpr):
    """First and last bin of RoI k that read each of `cell [CELLS]`; `bins` and -1 where none does."""
    p = tl.arange(0, BINS)
    low, high = cell_range(first, step, count, k * bins + p, p < bins, size, False)
    reads = (low[None, :] <= cell[:, None]) & (cell[:, None] <= high[None, :])
    return tl.min(tl.where(reads, p[None, :], bins), 1), tl.max(tl.where(reads, p[None, :], -1), 1)


@triton.jit
def max_backward(
    grad, winners, y_first, y_step, y_count, x_first, x_step, x_count, lists, lengths, out,
    rois, channels, height, width, stride_n, stride_c, stride_y, stride_x, bins_y, bins_x, tiles_x, tiles,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Each cell looks up, in the few bins that read it, whether the winning sample reads it: each channel has a winner of its own."""
    tile = tl.program_id(0)
    n, y0, x0 = tile_origin(tile, tiles, tiles_x, TILE_Y, TILE_X)
    cell = tl.arange(0, TILE_Y * TILE_X)
    y, x = y0 + cell // TILE_X, x0 + cell % TILE_X
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    bins = bins_y * bins_x
    result = tl.zeros((CHANNELS, TILE_Y * TILE_X), tl.float32)
    for r in range(tl.load(lengths + tile)):
        k = tl.load(lists + tile.to(tl.int64) * rois + r).to(tl.int64)
        p0, p1 = bins_of_cells(y_first, y_step, y_count, k, y, height, bins_y, BINS_Y)
        q0, q1 = bins_of_cells(x_first, x_step, x_count, k, x, width, bins_x, BINS_X)
        for a in range(tl.max(p1 - p0) + 1):
            p = p0 + a
            first_y, step_y = tl.load(y_first + k * bins_y + p, p <= p1, 0.0), tl.load(y_step + k * bins_y + p, p <= p1, 0.0)
            for b in range(tl.max(q1 - q0) + 1):
                q = q0 + b
                exists = (p <= p1) & (q <= q1)
                first_x, step_x = tl.load(x_first + k * bins_x + q, exists, 0.0), tl.load(x_step + k * bins_x + q, exists, 0.0)
                visited_x = tl.load(x_count + k * bins_x + q, exists, 1)[None, :]
                mask = (c < channels)[:, None] & exists[None, :]
                at = k * channels * bins + c.to(OFFSET)[:, None] * bins + (p * bins_x + q)[None, :]
                g = tl.load(grad + at, mask, 0.0).to(tl.float32)
                winner = tl.load(winners + at, mask, -1).to(tl.int32)
                i = winner // visited_x
                j = winner - i * visited_x
                of_y = tent(clamp(first_y[None, :] + i * step_y[None, :], height) - y[None, :])
                of_x = tent(clamp(first_x[None, :] + j * step_x[None, :], width) - x[None, :])
                result += tl.where(winner >= 0, of_y * of_x * g, 0.0)
    at = n.to(tl.int64) * stride_n + c.to(OFFSET)[:, None] * stride_c + (y.to(OFFSET) * stride_y + x.to(OFFSET) * stride_x)[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), (c < channels)[:, None] & ((y < height) & (x < width))[None, :])
