"""Triton kernels of the exact integral (PrRoIPool): each cell under a bin, by its share of the bin's mean.

Programs and layout as in `ops/cuda/lattice.py`.
"""

import triton
import triton.language as tl

from roi_quantization.ops.cuda.lattice import bins_of_program, clamp, store_shares


@triton.jit
def tent(t):
    """Weight of a cell `t` cells away, in bilinear interpolation."""
    return tl.maximum(1 - tl.abs(t), 0.0)


@triton.jit
def integral_share(low, high, cell):
    """Share of a cell in the mean of the interpolated map from `low` to `high`: the integral of `tent`, by the extent."""
    a = tl.minimum(tl.maximum(low - cell, -1.0), 1.0)
    b = tl.minimum(tl.maximum(high - cell, -1.0), 1.0)
    # two forms of one integral: on one side of the cell's centre no digits may cancel, or a thin bin would have none left
    integral = tl.where(a * b >= 0, (b - a) * (1 - tl.abs(a + b) / 2), b - a - (a * a + b * b) / 2)
    return tl.where(high > low, integral / tl.where(high > low, high - low, 1.0), 0.0)


@triton.jit
def load_window(low, high, at, is_bin, size):
    """Edges of some bins along an axis, and first and number of the cells under each; none where there is no extent."""
    low, high = tl.load(low + at, is_bin, 0.0), tl.load(high + at, is_bin, 0.0)
    low, high = tl.where(low == low, low, 0.0), tl.where(high == high, high, 0.0)  # 0 for NaN, so that no load is out of bounds
    start = tl.floor(clamp(low, size)).to(tl.int32)
    end = tl.minimum(tl.floor(clamp(high, size)).to(tl.int32) + 2, size)
    return low, high, start, tl.where((high > low) & (high > -1) & (low < size), end - start, 0)


@triton.jit
def integral_forward(
    features, image, y_low, y_high, x_low, x_high, out,
    channels, height, width, stride_n, stride_y, stride_x, bins_y, bins_x,
    BINS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    k, b, is_bin, p, q = bins_of_program(bins_y, bins_x, BINS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    mask = is_bin[:, None] & (c < channels)[None, :]
    top, bottom, first_y, count_y = load_window(y_low, y_high, p, is_bin, height)
    left, right, first_x, count_x = load_window(x_low, x_high, q, is_bin, width)
    cells = features + tl.load(image + k) * stride_n + c[None, :]
    result = tl.zeros((BINS, CHANNELS), tl.float32)
    for i in range(tl.max(count_y)):
        of_row = integral_share(top, bottom, first_y + i)
        for j in range(tl.max(count_x)):
            visited = (i < count_y) & (j < count_x)
            share = tl.where(visited, of_row * integral_share(left, right, first_x + j), 0.0)
            at = (first_y + i).to(OFFSET) * stride_y + (first_x + j).to(OFFSET) * stride_x
            result += share[:, None] * tl.load(cells + at[:, None], mask & (share != 0)[:, None], 0.0).to(tl.float32)
    corner = tl.load(y_low + p, is_bin, 0.0) + tl.load(x_low + q, is_bin, 0.0)
    result = tl.where((corner == corner)[:, None], result, float("nan"))  # NaN of an invalid box
    bins = bins_y * bins_x
    tl.store(out + k * channels * bins + c.to(OFFSET)[None, :] * bins + b[:, None], result.to(out.dtype.element_ty), mask)


@triton.jit
def integral_slopes(
    features, grad, image, y_low, y_high, x_low, x_high, slopes,
    channels, height, width, stride_n, stride_y, stride_x, bins_y, bins_x,
    BINS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Each bin's share of the gradients of y's low and high and x's low and high, into `slopes [4, K, bins]`."""
    k, b, is_bin, p, q = bins_of_program(bins_y, bins_x, BINS)
    bins = bins_y * bins_x
    top, bottom, first_y, count_y = load_window(y_low, y_high, p, is_bin, height)
    left, right, first_x, count_x = load_window(x_low, x_high, q, is_bin, width)
    of_top, of_bottom = tl.zeros((BINS,), tl.float32), tl.zeros((BINS,), tl.float32)
    of_left, of_right = tl.zeros((BINS,), tl.float32), tl.zeros((BINS,), tl.float32)
    for c0 in range(0, channels, CHANNELS):
        c = c0 + tl.arange(0, CHANNELS)
        mask = is_bin[:, None] & (c < channels)[None, :]
        cells = features + tl.load(image + k) * stride_n + c[None, :]
        g = tl.load(grad + k * channels * bins + c.to(OFFSET)[None, :] * bins + b[:, None], mask, 0.0).to(tl.float32)
        for i in range(tl.max(count_y)):
            of_row = integral_share(top, bottom, first_y + i)
            for j in range(tl.max(count_x)):
                of_column = integral_share(left, right, first_x + j)
                visited = (i < count_y) & (j < count_x)
                at = (first_y + i).to(OFFSET) * stride_y + (first_x + j).to(OFFSET) * stride_x
                of_cell = tl.sum(g * tl.load(cells + at[:, None], mask & visited[:, None], 0.0).to(tl.float32), 1)
                height_of_bin, width_of_bin = tl.where(visited, bottom - top, 1.0), tl.where(visited, right - left, 1.0)
                of_bottom += of_cell * of_column * (tent(bottom - (first_y + i)) - of_row) / height_of_bin
                of_top -= of_cell * of_column * (tent(top - (first_y + i)) - of_row) / height_of_bin
                of_right += of_cell * of_row * (tent(right - (first_x + j)) - of_column) / width_of_bin
                of_left -= of_cell * of_row * (tent(left - (first_x + j)) - of_column) / width_of_bin
    store_shares(slopes, k * bins + b, is_bin, bins, of_top, of_bottom, of_left, of_right)
