"""Triton kernels that visit lattices of samples: the forward pass, and the slopes that the gradient of a lattice is made of.

A program has one RoI, a block of its bins and a block of channels. The map is channels-last, so that the channels of a cell are neighbours
and a load is whole; sums are float32. No kernel rounds anything but the position of a sample, down to the cell that interpolation starts
from. Indices: RoI `k`, bin `b` in row `p` and column `q` of bins, sample `i` along y and `j` along x, channel `c`.
"""

import triton
import triton.language as tl


@triton.jit
def clamp(position, size):
    """To `[0, size - 1]`; NaN stays NaN."""
    return tl.where(position < 0, 0.0, tl.where(position > size - 1, size - 1.0, position))


@triton.jit
def tap(first, step, i, size):
    """The two cells that sample `i` lies between along an axis, and the weight of the second."""
    position = clamp(first + i * step, size)
    low = tl.floor(tl.where(position == position, position, 0.0))  # 0 for NaN, so that no load is out of bounds
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
    """The four cells around a sample. A cell without weight is not read, so that an infinite one does not make NaN."""
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
    first_y, step_y, visited_y = load_axis(y_first, y_step, y_count, p, is_bin)
    first_x, step_x, visited_x = load_axis(x_first, x_step, x_count, q, is_bin)
    total = tl.load(y_total + p, is_bin, 0.0) * tl.load(x_total + q, is_bin, 0.0)

    cells = features + tl.load(image + k) * stride_n + c[None, :]
    result = tl.zeros((BINS, CHANNELS), tl.float32)
    winner = tl.full((BINS, CHANNELS), -1, tl.int32)
    if MAX:  # a sample off the map has the value 0, and so has a bin without samples
        all_on_the_map = (visited_y * visited_x > 0) & ((visited_y * visited_x).to(tl.float32) >= total)
        result += tl.where(all_on_the_map, float("-inf"), 0.0)[:, None]
    for i in range(tl.max(visited_y)):
        top, bottom, bottom_weight = tap(first_y, step_y, i, height)
        for j in range(tl.max(visited_x)):
            left, right, right_weight = tap(first_x, step_x, j, width)
            visited = mask & ((i < visited_y) & (j < visited_x))[:, None]
            top_left, top_right, bottom_left, bottom_right = load_four(
                cells, top.to(OFFSET), bottom.to(OFFSET), left.to(OFFSET), right.to(OFFSET), stride_y, stride_x,
                bottom_weight != 0, right_weight != 0, visited,
            )  # fmt: skip
            of_bottom, of_right = bottom_weight[:, None], right_weight[:, None]
            of_top, of_left = 1 - of_bottom, 1 - of_right
            sample = of_top * (of_left * top_left + of_right * top_right) + of_bottom * (of_left * bottom_left + of_right * bottom_right)
            if MAX:
                larger = visited & ((sample > result) | (sample != sample))  # the first of equals wins, and so does NaN
                result = tl.where(larger, sample, result)
                winner = tl.where(larger, (i * visited_x + j)[:, None], winner)
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

    A program visits all channels of its bins, so that no other program adds to them and the order is fixed.
    """
    k, b, is_bin, p, q = bins_of_program(bins_y, bins_x, BINS)
    bins = bins_y * bins_x
    first_y, step_y, visited_y = load_axis(y_first, y_step, y_count, p, is_bin)
    first_x, step_x, visited_x = load_axis(x_first, x_step, x_count, q, is_bin)
    total = tl.load(y_total + p, is_bin, 0.0) * tl.load(x_total + q, is_bin, 0.0)
    of_first_y, of_step_y = tl.zeros((BINS,), tl.float32), tl.zeros((BINS,), tl.float32)
    of_first_x, of_step_x = tl.zeros((BINS,), tl.float32), tl.zeros((BINS,), tl.float32)
    for c0 in range(0, channels, CHANNELS):
        c = c0 + tl.arange(0, CHANNELS)
        mask = is_bin[:, None] & (c < channels)[None, :]
        cells = features + tl.load(image + k) * stride_n + c[None, :]
        at = k * channels * bins + c.to(OFFSET)[None, :] * bins + b[:, None]
        g = tl.load(grad + at, mask, 0.0).to(tl.float32)
        if MAX:
            winner = tl.load(winners + at, mask, -1).to(tl.int32)
        for i in range(tl.max(visited_y)):
            top, bottom, bottom_weight = tap(first_y, step_y, i, height)
            moves_y = (first_y + i * step_y >= 0) & (first_y + i * step_y < height - 1)  # clamped elsewhere
            for j in range(tl.max(visited_x)):
                left, right, right_weight = tap(first_x, step_x, j, width)
                moves_x = (first_x + j * step_x >= 0) & (first_x + j * step_x < width - 1)
                visited = (i < visited_y) & (j < visited_x)
                top_left, top_right, bottom_left, bottom_right = load_four(
                    cells, top.to(OFFSET), bottom.to(OFFSET), left.to(OFFSET), right.to(OFFSET), stride_y, stride_x,
                    visited, visited, mask & visited[:, None],
                )  # fmt: skip
                share = g
                if MAX:
                    share = tl.where(winner == (i * visited_x + j)[:, None], g, 0.0)
                of_bottom, of_right = bottom_weight[:, None], right_weight[:, None]
                of_top, of_left = 1 - of_bottom, 1 - of_right
                slope_y = tl.sum(share * (of_left * (bottom_left - top_left) + of_right * (bottom_right - top_right)), 1)
                slope_x = tl.sum(share * (of_top * (top_right - top_left) + of_bottom * (bottom_right - bottom_left)), 1)
                slope_y, slope_x = tl.where(visited & moves_y, slope_y, 0.0), tl.where(visited & moves_x, slope_x, 0.0)
                of_first_y += slope_y
                of_step_y += i * slope_y
                of_first_x += slope_x
                of_step_x += j * slope_x
    share_of_one = 1.0
    if not MAX:
        share_of_one = 1 / tl.maximum(total, 1.0)
    store_shares(
        slopes, k * bins + b, is_bin, bins,
        of_first_y * share_of_one, of_step_y * share_of_one, of_first_x * share_of_one, of_step_x * share_of_one,
    )  # fmt: skip
