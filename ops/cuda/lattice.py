"""Triton kernels that visit lattices of samples: the forward pass, and the slopes that the gradient of a lattice is made of.

A program has one RoI, a block of its bins and a block of channels. The map is channels-last, so that the channels of a cell are neighbours
and a load is whole; sums are float32. No kernel rounds anything but the position of a sample, down to the cell that interpolation starts
from.
"""

import triton
import triton.language as tl


@triton.jit
def clamp(position, size):
    """To `[0, size - 1]`; what is not a number stays so."""
    return tl.where(position < 0, 0.0, tl.where(position > size - 1, size - 1.0, position))


@triton.jit
def tap(first, step, i, size):
    """Cell below sample i, the cell after it, and how far the sample is on the way there."""
    position = clamp(first + i * step, size)
    low = tl.floor(tl.where(position == position, position, 0.0))
    cell = low.to(tl.int32)
    return cell, tl.minimum(cell + 1, size - 1), position - low


@triton.jit
def bins_of_program(bins_y, bins_x, BINS: tl.constexpr):
    """RoI, bins, which of these exist, and where their lattices are kept along y and x."""
    k = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BINS + tl.arange(0, BINS)
    return k, b, b < bins_y * bins_x, k * bins_y + b // bins_x, k * bins_x + b % bins_x


@triton.jit
def load_axis(first, step, count, at, is_bin):
    """The lattice of some bins along one axis; those that do not exist have no samples."""
    return tl.load(first + at, is_bin, 0.0), tl.load(step + at, is_bin, 0.0), tl.load(count + at, is_bin, 0)


@triton.jit
def load_four(cells, top, bottom, left, right, stride_y, stride_x, needs_bottom, needs_right, mask):
    """The cells around a sample. One that has no weight is not read: infinity beside a sample does no harm."""
    top_left = tl.load(cells + (top * stride_y + left * stride_x)[:, None], mask, 0.0).to(tl.float32)
    top_right = tl.load(cells + (top * stride_y + right * stride_x)[:, None], mask & needs_right[:, None], 0.0).to(tl.float32)
    bottom_left = tl.load(cells + (bottom * stride_y + left * stride_x)[:, None], mask & needs_bottom[:, None], 0.0).to(tl.float32)
    both = (needs_bottom & needs_right)[:, None]
    bottom_right = tl.load(cells + (bottom * stride_y + right * stride_x)[:, None], mask & both, 0.0).to(tl.float32)
    return top_left, top_right, bottom_left, bottom_right


@triton.jit
def lattice_forward(
    features, image, y_first, y_step, y_count, y_total, x_first, x_step, x_count, x_total, out, winners,
    channels, height, width, stride_n, stride_y, stride_x, bins_y, bins_x,
    MAX: tl.constexpr, REMEMBER: tl.constexpr, BINS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The mean or the largest of each bin's samples, and which sample won, `i * x_count + j`; -1 where it is the 0 of one off the map."""
    k, b, is_bin, p, q = bins_of_program(bins_y, bins_x, BINS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    mask = is_bin[:, None] & (c < channels)[None, :]
    yf, ys, yn = load_axis(y_first, y_step, y_count, p, is_bin)
    xf, xs, xn = load_axis(x_first, x_step, x_count, q, is_bin)
    total = tl.load(y_total + p, is_bin, 0.0) * tl.load(x_total + q, is_bin, 0.0)

    cells = features + tl.load(image + k) * stride_n + c[None, :]
    result = tl.zeros((BINS, CHANNELS), tl.float32)
    winner = tl.full((BINS, CHANNELS), -1, tl.int32)
    if MAX:  # a sample off the map has the value 0, and so has a bin without samples
        all_on_the_map = (yn * xn > 0) & ((yn * xn).to(tl.float32) >= total)
        result += tl.where(all_on_the_map, float("-inf"), 0.0)[:, None]
    for i in range(tl.max(yn)):
        top, bottom, v = tap(yf, ys, i, height)
        for j in range(tl.max(xn)):
            left, right, h = tap(xf, xs, j, width)
            visited = mask & ((i < yn) & (j < xn))[:, None]
            top_left, top_right, bottom_left, bottom_right = load_four(
                cells, top.to(OFFSET), bottom.to(OFFSET), left.to(OFFSET), right.to(OFFSET), stride_y, stride_x, v != 0, h != 0, visited
            )
            up, near = (1 - v)[:, None], (1 - h)[:, None]
            sample = up * (near * top_left + h[:, None] * top_right) + v[:, None] * (near * bottom_left + h[:, None] * bottom_right)
            if MAX:
                larger = visited & ((sample > result) | (sample != sample))  # the first of equals wins, and what is not a number
                result = tl.where(larger, sample, result)
                winner = tl.where(larger, (i * xn + j)[:, None], winner)
            else:
                result += tl.where(visited, sample, 0.0)
    if not MAX:
        result = result / tl.maximum(total, 1.0)[:, None]
    bins = bins_y * bins_x
    at = k * channels * bins + c.to(OFFSET)[None, :] * bins + b[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask)
    if REMEMBER:
        tl.store(winners + at, winner.to(winners.dtype.element_ty), mask)


@triton.jit
def store_shares(slopes, at, is_bin, bins, first, second, third, fourth):
    """Into `[4, K, bins]`."""
    size = tl.num_programs(0).to(tl.int64) * bins
    tl.store(slopes + at, first, is_bin)
    tl.store(slopes + size + at, second, is_bin)
    tl.store(slopes + 2 * size + at, third, is_bin)
    tl.store(slopes + 3 * size + at, fourth, is_bin)


@triton.jit
def lattice_slopes(
    features, grad, winners, image, y_first, y_step, y_count, y_total, x_first, x_step, x_count, x_total, slopes,
    channels, height, width, stride_n, stride_y, stride_x, bins_y, bins_x,
    MAX: tl.constexpr, BINS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Each bin's share of the gradients of y's first and step and x's first and step, into `slopes [4, K, bins]`.

    A program walks all channels of its bins, so that nobody else adds to them and the order is always the same.
    """
    k, b, is_bin, p, q = bins_of_program(bins_y, bins_x, BINS)
    bins = bins_y * bins_x
    yf, ys, yn = load_axis(y_first, y_step, y_count, p, is_bin)
    xf, xs, xn = load_axis(x_first, x_step, x_count, q, is_bin)
    total = tl.load(y_total + p, is_bin, 0.0) * tl.load(x_total + q, is_bin, 0.0)
    of_yf, of_ys = tl.zeros((BINS,), tl.float32), tl.zeros((BINS,), tl.float32)
    of_xf, of_xs = tl.zeros((BINS,), tl.float32), tl.zeros((BINS,), tl.float32)
    for c0 in range(0, channels, CHANNELS):
        c = c0 + tl.arange(0, CHANNELS)
        mask = is_bin[:, None] & (c < channels)[None, :]
        cells = features + tl.load(image + k) * stride_n + c[None, :]
        at = k * channels * bins + c.to(OFFSET)[None, :] * bins + b[:, None]
        g = tl.load(grad + at, mask, 0.0).to(tl.float32)
        if MAX:
            winner = tl.load(winners + at, mask, -1).to(tl.int32)
        for i in range(tl.max(yn)):
            top, bottom, v = tap(yf, ys, i, height)
            free_y = (yf + i * ys >= 0) & (yf + i * ys < height - 1)  # clamped elsewhere
            for j in range(tl.max(xn)):
                left, right, h = tap(xf, xs, j, width)
                free_x = (xf + j * xs >= 0) & (xf + j * xs < width - 1)
                visited = (i < yn) & (j < xn)
                top_left, top_right, bottom_left, bottom_right = load_four(
                    cells, top.to(OFFSET), bottom.to(OFFSET), left.to(OFFSET), right.to(OFFSET), stride_y, stride_x,
                    visited, visited, mask & visited[:, None],
                )  # fmt: skip
                share = g
                if MAX:
                    share = tl.where(winner == (i * xn + j)[:, None], g, 0.0)
                up, near, v2, h2 = (1 - v)[:, None], (1 - h)[:, None], v[:, None], h[:, None]
                slope_y = tl.sum(share * (near * (bottom_left - top_left) + h2 * (bottom_right - top_right)), 1)
                slope_x = tl.sum(share * (up * (top_right - top_left) + v2 * (bottom_right - bottom_left)), 1)
                slope_y, slope_x = tl.where(visited & free_y, slope_y, 0.0), tl.where(visited & free_x, slope_x, 0.0)
                of_yf += slope_y
                of_ys += i * slope_y
                of_xf += slope_x
                of_xs += j * slope_x
    share_of_one = 1.0
    if not MAX:
        share_of_one = 1 / tl.maximum(total, 1.0)
    store_shares(slopes, k * bins + b, is_bin, bins, of_yf * share_of_one, of_ys * share_of_one, of_xf * share_of_one, of_xs * share_of_one)
