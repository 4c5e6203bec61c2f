"""Triton kernels of the gradient of the features for a mean, without atomics: a program owns a tile of cells and gathers what RoIs give.

Scattering, where each RoI adds to the cells that it read, leaves the order of the additions to chance. Here each cell is written once, by a
program that visits the RoIs touching its tile in their order, so that every run gives the same bits. `mark_rois_by_tile` marks those RoIs
first, one bit for each tile and RoI.
"""

import triton
import triton.language as tl

from roi_quantization.ops.cuda.integral import integral_share
from roi_quantization.ops.cuda.lattice import clamp, tent


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
        reads = exists & (n > 0) & (start == start)  # the sample of an invalid box is NaN, and no cell has to do with it
        end = start + (n - 1) * end  # the last sample
    start, end = tl.where(reads, start, 0.0), tl.where(reads, end, 0.0)
    low, high = tl.floor(clamp(tl.minimum(start, end), size)), tl.floor(clamp(tl.maximum(start, end), size))
    return tl.where(reads, low, size).to(tl.int32), tl.where(reads, tl.minimum(high + 1, size - 1.0), -1).to(tl.int32)


@triton.jit
def roi_range(first, step, count, k, exists, size, bins: tl.constexpr, BINS: tl.constexpr, INTEGRAL: tl.constexpr):
    """First and last cell that RoIs read along an axis, `k [ROIS]`."""
    low, high = k * 0 + size, k * 0 - 1
    for b in range(0, bins, BINS):
        p = b + tl.arange(0, BINS)[None, :]
        start, end = cell_range(first, step, count, k.to(tl.int64)[:, None] * bins + p, exists[:, None] & (p < bins), size, INTEGRAL)
        low, high = tl.minimum(low, tl.min(start, 1)), tl.maximum(high, tl.max(end, 1))
    return low, high


@triton.jit(do_not_specialize=["rois", "words", "height", "width", "tiles_x", "tiles", "all_tiles"])
def mark_rois_by_tile(
    image, y_first, y_step, y_count, x_first, x_step, x_count, marks,
    rois, words, height, width, tiles_x, tiles, all_tiles, bins_y: tl.constexpr, bins_x: tl.constexpr,
    INTEGRAL: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, TILES: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr,
):  # fmt: skip
    """Into `marks [images * tiles, words]`: bit `b` of word `w` says whether RoI `32 * w + b` reads cells of the tile."""
    bit = tl.arange(0, 32)
    word = tl.program_id(0)
    k = word * 32 + bit
    exists = k < rois
    n = tl.load(image + k, exists, -1)
    top, bottom = roi_range(y_first, y_step, y_count, k, exists, height, bins_y, BINS_Y, INTEGRAL)
    left, right = roi_range(x_first, x_step, x_count, k, exists, width, bins_x, BINS_X, INTEGRAL)
    for t in range(tl.program_id(1) * TILES, all_tiles, tl.num_programs(1) * TILES):
        tile = (t + tl.arange(0, TILES))[:, None]
        of_image, y0, x0 = tile_origin(tile, tiles, tiles_x, TILE_Y, TILE_X)
        touches = (n[None, :] == of_image) & (top[None, :] < y0 + TILE_Y) & (bottom[None, :] >= y0)
        touches &= (left[None, :] < x0 + TILE_X) & (right[None, :] >= x0)
        value = tl.sum(touches.to(tl.int32) << bit[None, :], 1)
        tile = t + tl.arange(0, TILES)
        tl.store(marks + tile.to(tl.int64) * words + word, value, tile < all_tiles)


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
def bins_touch(first, step, count, at, last, origin, size, TILE: tl.constexpr, INTEGRAL: tl.constexpr):
    """Whether any of a RoI's bins from `at` to `last` may read cells of a tile along an axis: they lie in order."""
    a, b = tl.load(first + at), tl.load(first + last)
    if INTEGRAL:
        start, end = a, tl.load(step + last)
    else:
        end_a = a + tl.maximum(tl.load(count + at) - 1, 0) * tl.load(step + at)
        end_b = b + tl.maximum(tl.load(count + last) - 1, 0) * tl.load(step + last)
        start, end = tl.minimum(tl.minimum(a, end_a), tl.minimum(b, end_b)), tl.maximum(tl.maximum(a, end_a), tl.maximum(b, end_b))
    return (clamp(start, size) < origin + TILE) & (clamp(end, size) > origin - 1)


@triton.jit
def upper_part(x):
    """The nearest tf32 to a float32. Cut off instead, the lower parts would all have the sign of the whole, and what is lost of them too.

    Infinity stays. What lies within 2 ** -12 of the largest float32 becomes infinite, and a NaN may become 0. The lower part, `x` less
    this, is then infinite or NaN, so that the sum of products is not finite, as it is not for an infinite `x`.
    """
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["words", "height", "width", "tiles_x", "tiles"])
def mean_backward(
    grad, y_first, y_step, y_count, y_total, x_first, x_step, x_count, x_total, marks, out,
    words, channels, height, width, stride_n, stride_c, stride_y, stride_x, tiles_x, tiles,
    bins_y: tl.constexpr, bins_x: tl.constexpr,
    INTEGRAL: tl.constexpr, EXACT: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr,
    CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """What a RoI gives to a tile is a product of matrices: (share of each cell in each bin) @ (gradient of each bin and channel).

    The shares are themselves an outer product, of those along y and those along x. Tensor cores multiply tf32: a float32 is a sum of two,
    and of the four products of the parts all but the smallest are computed. EXACT: gradients of 16 bits are one tf32, and two products do.
    A product is wrong by less than 2 ** -21 of itself, and on average by nothing.
    """
    tile = tl.program_id(0)
    n, y0, x0 = tile_origin(tile, tiles, tiles_x, TILE_Y, TILE_X)
    y, x = (y0 + tl.arange(0, TILE_Y))[:, None], (x0 + tl.arange(0, TILE_X))[:, None]
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    bins: tl.constexpr = bins_y * bins_x
    row = tl.reshape(tl.broadcast_to(tl.arange(0, BINS_Y)[:, None], BINS_Y, BINS_X), (BINS_Y * BINS_X,))[:, None]
    column = tl.reshape(tl.broadcast_to(tl.arange(0, BINS_X)[None, :], BINS_Y, BINS_X), (BINS_Y * BINS_X,))[:, None]
    result = tl.zeros((TILE_Y * TILE_X, CHANNELS), tl.float32)
    for w in range(words):
        rest = tl.load(marks + tile.to(tl.int64) * words + w)
        while rest != 0:
            lowest = rest & -rest
            place = (lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # the exponent
            k = (w * 32 + place).to(tl.int64)
            rest = rest ^ lowest
            for q0 in range(0, bins_x, BINS_X):
                q = q0 + tl.arange(0, BINS_X)[None, :]
                if INTEGRAL:  # first and step are the edges of the bins
                    of_x = edges_share(x_first, x_step, k * bins_x + q, q < bins_x, x)
                else:
                    of_x = lattice_share(x_first, x_step, x_count, x_total, k * bins_x + q, q < bins_x, x, width)
                for p0 in range(0, bins_y, BINS_Y):
                    last = k * bins_y + tl.minimum(p0 + BINS_Y, bins_y) - 1
                    if bins_touch(y_first, y_step, y_count, k * bins_y + p0, last, y0, height, TILE_Y, INTEGRAL):
                        p = p0 + tl.arange(0, BINS_Y)[None, :]
                        if INTEGRAL:
                            of_y = edges_share(y_first, y_step, k * bins_y + p, p < bins_y, y)
                        else:
                            of_y = lattice_share(y_first, y_step, y_count, y_total, k * bins_y + p, p < bins_y, y, height)
                        shares = tl.reshape(of_y[:, None, :, None] * of_x[None, :, None, :], (TILE_Y * TILE_X, BINS_Y * BINS_X))
                        is_bin = (p0 + row < bins_y) & (q0 + column < bins_x)
                        of_bins = grad + k * channels * bins + p0 * bins_x + q0
                        g = tl.load(of_bins + (c.to(OFFSET) * bins + row * bins_x + column), is_bin & (c < channels), 0.0).to(tl.float32)
                        upper, of_upper = upper_part(shares), g if EXACT else upper_part(g)
                        if not EXACT:
                            result = tl.dot(upper, g - of_upper, result, input_precision="tf32")
                        result = tl.dot(shares - upper, of_upper, result, input_precision="tf32")
                        result = tl.dot(upper, of_upper, result, input_precision="tf32")
    cell = tl.arange(0, TILE_Y * TILE_X)[:, None]
    y, x = y0 + cell // TILE_X, x0 + cell % TILE_X
    at = n.to(tl.int64) * stride_n + c.to(OFFSET) * stride_c + (y.to(OFFSET) * stride_y + x.to(OFFSET) * stride_x)
    tl.store(out + at, result.to(out.dtype.element_ty), (y < height) & (x < width) & (c < channels))
