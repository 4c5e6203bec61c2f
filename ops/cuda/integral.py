"""Triton kernels of the exact integral (PrRoIPool): each cell under a bin, by its share of the bin's mean.

Programs and layout as in `ops/cuda/lattice.py`.
"""

import triton
import triton.language as tl

from roi_quantization.ops.cuda.lattice import channels_of_program, clamp, load_cells, row_of_bins, store_row, store_shares, tent


@triton.jit
def integral_share(low, high, cell):
    """Share of a cell in the mean of the interpolated map from `low` to `high`: the integral of `tent`, by the extent."""
    a = tl.minimum(tl.maximum(low - cell, -1.0), 1.0)
    b = tl.minimum(tl.maximum(high - cell, -1.0), 1.0)
    # two forms of one integral: on one side of the cell's centre no digits may cancel, or a thin bin would have none left
    integral = tl.where(a * b >= 0, (b - a) * (1 - tl.abs(a + b) / 2), b - a - (a * a + b * b) / 2)
    return tl.where(high > low, integral / tl.where(high > low, high - low, 1.0), 0.0)


@triton.jit
def load_window(low, high, at, exists, size):
    """Edges of some bins along an axis, first and number of the cells under each (none where there is no extent), and their NaN."""
    low, high = tl.load(low + at, exists, 0.0), tl.load(high + at, exists, 0.0)
    nan_or_zero = tl.where(low == low, 0.0, low)
    low, high = tl.where(low == low, low, 0.0), tl.where(high == high, high, 0.0)  # 0 for NaN, so that no load is out of bounds
    start = tl.floor(clamp(low, size)).to(tl.int32)
    end = tl.minimum(tl.floor(clamp(high, size)).to(tl.int32) + 2, size)
    return low, high, start, tl.where((high > low) & (high > -1) & (low < size), end - start, 0), nan_or_zero


@triton.jit(do_not_specialize=["height", "width"])
def integral_forward(
    features, image, y_low, y_high, x_low, x_high, out,
    channels, height, width, bins_y: tl.constexpr, bins_x: tl.constexpr,
    WHOLE: tl.constexpr, PACKED: tl.constexpr, BINS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The mean of the interpolated map over each bin."""
    k, p, q = row_of_bins(bins_y, BINS)
    c, word, words = channels_of_program(channels, CHANNELS, PACKED)
    top, bottom, first_y, count_y, nan_y = load_window(y_low, y_high, k * bins_y + p, True, height)
    left, right, first_x, count_x, nan_x = load_window(x_low, x_high, k * bins_x + q, q < bins_x, width)
    cells = features + tl.load(image + k) * words * height * width
    result = tl.zeros((BINS, CHANNELS), tl.float32)
    for j in range(tl.max(count_x)):
        column = first_x + tl.maximum(tl.minimum(j, count_x - 1), 0)
        of_column = tl.where(j < count_x, integral_share(left, right, column), 0.0)
        at = column.to(OFFSET)[:, None] * words + word[None, :]
        for i in range(count_y):
            row = cells + (first_y + i).to(OFFSET) * (width.to(OFFSET) * words)
            share = integral_share(top, bottom, first_y + i) * of_column
            result += share[:, None] * load_cells(row, at, word < words, WHOLE, PACKED)
    result = tl.where((count_x > 0)[:, None], result, 0.0) + (nan_y + nan_x)[:, None]  # NaN of an invalid box
    store_row(out, result, k, p, q, c, channels, bins_y, bins_x, OFFSET)


@triton.jit(do_not_specialize=["rois", "height", "width"])
def integral_slopes(
    features, grad, image, y_low, y_high, x_low, x_high, slopes,
    rois, channels, height, width, bins_y: tl.constexpr, bins_x: tl.constexpr,
    BINS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Each bin's share of the gradients of y's low and high and x's low and high, into `slopes [4, K, bins]`."""
    k, p, q = row_of_bins(bins_y, BINS)
    is_bin = q < bins_x
    bins: tl.constexpr = bins_y * bins_x
    top, bottom, first_y, count_y, _ = load_window(y_low, y_high, k * bins_y + p, True, height)
    left, right, first_x, count_x, _ = load_window(x_low, x_high, k * bins_x + q, is_bin, width)
    cells = features + tl.load(image + k) * channels * height * width
    of_bins = k * channels * bins + p * bins_x
    of_top, of_bottom = tl.zeros((BINS,), tl.float32), tl.zeros((BINS,), tl.float32)
    of_left, of_right = tl.zeros((BINS,), tl.float32), tl.zeros((BINS,), tl.float32)
    for i in range(count_y):
        of_row = integral_share(top, bottom, first_y + i)
        row = cells + (first_y + i).to(OFFSET) * (width.to(OFFSET) * channels)
        for j in range(tl.max(count_x)):
            of_column = integral_share(left, right, first_x + j)
            visited = j < count_x
            column_at = ((first_x + j).to(OFFSET) * channels)[:, None]
            of_channels = tl.zeros((BINS, CHANNELS), tl.float32)
            for c0 in range(0, channels, CHANNELS):
                c = c0 + tl.arange(0, CHANNELS)[None, :]
                mask = (is_bin & visited)[:, None] & (c < channels)
                g = tl.load(grad + of_bins + c.to(OFFSET) * bins + q[:, None], mask, 0.0).to(tl.float32)
                of_channels += g * tl.load(row + column_at + c, mask, 0.0).to(tl.float32)
            of_cell = tl.sum(of_channels, 1)
            height_of_bin, width_of_bin = bottom - top, tl.where(visited, right - left, 1.0)
            of_bottom += of_cell * of_column * (tent(bottom - (first_y + i)) - of_row) / height_of_bin
            of_top -= of_cell * of_column * (tent(top - (first_y + i)) - of_row) / height_of_bin
            of_right += of_cell * of_row * (tent(right - (first_x + j)) - of_column) / width_of_bin
            of_left -= of_cell * of_row * (tent(left - (first_x + j)) - of_column) / width_of_bin
    store_shares(slopes, k * bins + p * bins_x + q, is_bin, rois.to(tl.int64) * bins, of_top, of_bottom, of_left, of_right)
