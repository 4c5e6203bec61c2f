"""Triton kernels that visit lattices of samples: the forward pass, and the slopes that the gradient of a lattice is made of.

A program of the forward has one row of bins of one RoI and a block of channels, so that all that happens along y is a number, the same for
the whole program. The map is channels-last: the channels of a cell are neighbours and a load is whole. Sums are float32. Nothing is masked
within a loop: a bin that is through with its samples reads its last one again, with a weight of 0. No kernel rounds anything but the
position of a sample, down to the cell that interpolation starts from. Indices: RoI `k`, row `p` and column `q` of bins, sample `i` along y
and `j` along x, channel `c`.
"""

import triton
import triton.language as tl


@triton.jit
def clamp(position, size):
    """To `[0, size - 1]`; NaN becomes 0, so that no load is out of bounds."""
    return tl.minimum(tl.maximum(position, 0.0), size - 1.0)


@triton.jit
def tent(t):
    """Weight of a cell `t` cells away, in bilinear interpolation."""
    return tl.maximum(1 - tl.abs(t), 0.0)


@triton.jit
def tap(first, step, i, size):
    """The cell before sample `i` along an axis, the cells from there to the next with weight (0 or 1), and the weight of that one."""
    position = clamp(first + i * step, size)
    low = tl.floor(position)
    weight = position - low
    return low.to(tl.int32), (weight > 0).to(tl.int32), weight


@triton.jit
def load_axis(first, step, count, total, at, exists):
    """The lattice of some bins along one axis; those that do not exist have no samples."""
    first, step = tl.load(first + at, exists, 0.0), tl.load(step + at, exists, 0.0)
    return first, step, tl.load(count + at, exists, 0), tl.load(total + at, exists, 0.0)


@triton.jit
def row_of_bins(bins_y: tl.constexpr, BINS: tl.constexpr):
    """RoI, row and columns of a program of the forward."""
    return tl.program_id(0).to(tl.int64) // bins_y, tl.program_id(0) % bins_y, tl.program_id(1) * BINS + tl.arange(0, BINS)


@triton.jit
def channels_of_program(channels, CHANNELS: tl.constexpr, PACKED: tl.constexpr):
    """Channels of a program, the words that hold them, and the words of a cell: with PACKED a word is two bfloat16."""
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    if PACKED:
        return c, tl.program_id(2) * (CHANNELS // 2) + tl.arange(0, CHANNELS // 2), channels // 2
    else:
        return c, c, channels


@triton.jit
def load_cells(cells, at, exists, WHOLE: tl.constexpr, PACKED: tl.constexpr):
    """Some channels of some cells in float32; with WHOLE all of them exist."""
    word = tl.load(cells + at) if WHOLE else tl.load(cells + at, exists[None, :], 0)
    if PACKED:  # a bfloat16 is the upper half of a float32: one instruction each
        pair = tl.join(word << 16, word & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(pair, (word.shape[0], 2 * word.shape[1]))
    else:
        return word.to(tl.float32)


@triton.jit
def store_row(out, value, k, p, q, c, channels, bins_y: tl.constexpr, bins_x: tl.constexpr, OFFSET: tl.constexpr):
    """Into `[K, C, bins_y, bins_x]`, values `[BINS, CHANNELS]`."""
    row = out + k * channels * (bins_y * bins_x) + p * bins_x
    at = c.to(OFFSET)[None, :] * (bins_y * bins_x) + q[:, None]
    tl.store(row + at, value.to(out.dtype.element_ty), (q < bins_x)[:, None] & (c < channels)[None, :])


@triton.jit
def rows_of_bin(first, step, count, size):
    """First row that a bin reads; whether it visits each row from there once instead of two for each sample; and its number of visits."""
    last = first + (count - 1) * step
    low = tl.floor(clamp(tl.minimum(first, last), size)).to(tl.int32)
    high = tl.minimum(tl.floor(clamp(tl.maximum(first, last), size)).to(tl.int32) + 1, size - 1)
    is_dense = (count <= 4) & (high - low < 2 * count)
    return low, is_dense, tl.where(count > 0, tl.where(is_dense, high - low + 1, 2 * count), 0)


@triton.jit
def row_visit(first, step, count, low, is_dense, visit, size):
    """Row of a visit, and its weight in the sum of the bin's samples."""
    row = low + visit
    weight = 0.0
    if is_dense:
        for i in range(count):
            weight += tent(clamp(first + i * step, size) - row)
    else:
        position = clamp(first + (visit // 2) * step, size)
        row = tl.floor(position).to(tl.int32) + visit % 2
        weight = tent(position - row)
    return tl.minimum(row, size - 1), weight


@triton.jit(do_not_specialize=["height", "width"])
def mean_forward(
    features, image, y_first, y_step, y_count, y_total, x_first, x_step, x_count, x_total, out,
    channels, height, width, bins_y: tl.constexpr, bins_x: tl.constexpr,
    CELLS: tl.constexpr, WHOLE: tl.constexpr, PACKED: tl.constexpr, BINS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The mean of each bin's samples; with CELLS each of them is a cell.

    A weight is a product of one in y and one in x, so that a row between two samples is read once, with the sum of its weights.
    """
    k, p, q = row_of_bins(bins_y, BINS)
    c, word, words = channels_of_program(channels, CHANNELS, PACKED)
    first_y, step_y, visited_y, total_y = load_axis(y_first, y_step, y_count, y_total, k * bins_y + p, True)
    first_x, step_x, visited_x, total_x = load_axis(x_first, x_step, x_count, x_total, k * bins_x + q, q < bins_x)
    is_valid = (first_y + first_x) == (first_y + first_x)
    scale = 1 / tl.maximum(total_y * total_x, 1.0)
    cells = features + tl.load(image + k) * words * height * width
    low, is_dense, visits = rows_of_bin(first_y, step_y, visited_y, height)
    if CELLS:
        visits = visited_y
    result = tl.zeros((BINS, CHANNELS), tl.float32)
    for j in range(tl.max(visited_x)):
        left, more, of_right = tap(first_x, step_x, tl.maximum(tl.minimum(j, visited_x - 1), 0), width)
        share = tl.where(j < visited_x, scale, 0.0)
        of_right = of_right * share
        of_left = share - of_right
        left_at = left.to(OFFSET)[:, None] * words + word[None, :]
        right_at = (left + more).to(OFFSET)[:, None] * words + word[None, :]
        for visit in range(visits):
            if CELLS:
                row = cells + (low + visit).to(OFFSET) * (width.to(OFFSET) * words)
                result += of_left[:, None] * load_cells(row, left_at, word < words, WHOLE, PACKED)
            else:
                i, of_row = row_visit(first_y, step_y, visited_y, low, is_dense, visit, height)
                if of_row != 0:
                    row = cells + i.to(OFFSET) * (width.to(OFFSET) * words)
                    result += (of_row * of_left)[:, None] * load_cells(row, left_at, word < words, WHOLE, PACKED)
                    result += (of_row * of_right)[:, None] * load_cells(row, right_at, word < words, WHOLE, PACKED)
    without = tl.where(is_valid, 0.0, float("nan"))  # of a bin without samples, and of an invalid box
    result = tl.where((is_valid & (visited_x > 0))[:, None], result, without[:, None])
    store_row(out, result, k, p, q, c, channels, bins_y, bins_x, OFFSET)


@triton.jit(do_not_specialize=["height", "width"])
def max_forward(
    features, image, y_first, y_step, y_count, y_total, x_first, x_step, x_count, x_total, out, winners,
    channels, height, width, bins_y: tl.constexpr, bins_x: tl.constexpr,
    REMEMBER: tl.constexpr, CELLS: tl.constexpr, WHOLE: tl.constexpr, PACKED: tl.constexpr,
    BINS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The largest of each bin's samples, and its number, `i * x_count + j`; -1 for the 0 of one off the map, and for an invalid box."""
    k, p, q = row_of_bins(bins_y, BINS)
    c, word, words = channels_of_program(channels, CHANNELS, PACKED)
    first_y, step_y, visited_y, total_y = load_axis(y_first, y_step, y_count, y_total, k * bins_y + p, True)
    first_x, step_x, visited_x, total_x = load_axis(x_first, x_step, x_count, x_total, k * bins_x + q, q < bins_x)
    is_valid = (first_y + first_x) == (first_y + first_x)
    cells = features + tl.load(image + k) * words * height * width
    has_samples = (visited_y > 0) & (visited_x > 0)
    all_on_the_map = has_samples & ((visited_y * visited_x).to(tl.float32) >= total_y * total_x)
    # a sample off the map has the value 0, and so has a bin without samples
    result = tl.zeros((BINS, CHANNELS), tl.float32) + tl.where(all_on_the_map, float("-inf"), 0.0)[:, None]
    winner = tl.full((BINS, CHANNELS), -1, tl.int32)
    first_cell = tl.where(first_x == first_x, first_x, 0.0).to(tl.int32)
    for i in range(visited_y):  # rows first: the first of equals in this order wins
        top, more_y, of_bottom = tap(first_y, step_y, i, height)
        upper = cells + top.to(OFFSET) * (width.to(OFFSET) * words)
        lower = cells + (top + more_y).to(OFFSET) * (width.to(OFFSET) * words)
        for j in range(tl.max(visited_x)):
            at = tl.maximum(tl.minimum(j, visited_x - 1), 0)
            if CELLS:
                left = tl.minimum(first_cell + at, width - 1)
            else:
                left, more_x, of_right = tap(first_x, step_x, at, width)
            left_at = left.to(OFFSET)[:, None] * words + word[None, :]
            sample = load_cells(upper, left_at, word < words, WHOLE, PACKED)
            if not CELLS:
                right_at = (left + more_x).to(OFFSET)[:, None] * words + word[None, :]
                sample *= ((1 - of_bottom) * (1 - of_right))[:, None]
                sample += ((1 - of_bottom) * of_right)[:, None] * load_cells(upper, right_at, word < words, WHOLE, PACKED)
                sample += (of_bottom * (1 - of_right))[:, None] * load_cells(lower, left_at, word < words, WHOLE, PACKED)
                sample += (of_bottom * of_right)[:, None] * load_cells(lower, right_at, word < words, WHOLE, PACKED)
            larger = (sample > result) | (sample != sample)  # NaN is the largest
            result = tl.where(larger, sample, result)
            if REMEMBER:
                winner = tl.where(larger, (i * visited_x + at)[:, None], winner)
    without = tl.where(is_valid, 0.0, float("nan"))
    has_winner = (is_valid & has_samples)[:, None]
    result = tl.where(has_winner, result, without[:, None])
    store_row(out, result, k, p, q, c, channels, bins_y, bins_x, OFFSET)
    if REMEMBER:
        winner = tl.where(has_winner, winner, -1)
        store_row(winners, winner, k, p, q, c, channels, bins_y, bins_x, OFFSET)


@triton.jit
def store_shares(slopes, at, is_bin, bins, first, second, third, fourth):
    """Into `[4, bins]`, bins of all RoIs."""
    tl.store(slopes + at, first, is_bin)
    tl.store(slopes + bins + at, second, is_bin)
    tl.store(slopes + 2 * bins + at, third, is_bin)
    tl.store(slopes + 3 * bins + at, fourth, is_bin)


@triton.jit(do_not_specialize=["rois", "height", "width"])
def lattice_slopes(
    features, grad, winners, image, y_first, y_step, y_count, y_total, x_first, x_step, x_count, x_total, slopes,
    rois, channels, height, width, bins_y: tl.constexpr, bins_x: tl.constexpr,
    MAX: tl.constexpr, BINS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Each bin's share of the gradients of y's first and step and x's first and step, into `slopes [4, K, bins]`.

    A program visits all channels of its bins, so that no other program adds to them and the order is fixed.
    """
    k, p, q = row_of_bins(bins_y, BINS)
    is_bin = q < bins_x
    bins: tl.constexpr = bins_y * bins_x
    first_y, step_y, visited_y, total_y = load_axis(y_first, y_step, y_count, y_total, k * bins_y + p, True)
    first_x, step_x, visited_x, total_x = load_axis(x_first, x_step, x_count, x_total, k * bins_x + q, is_bin)
    cells = features + tl.load(image + k) * channels * height * width
    of_bins = k * channels * bins + p * bins_x
    of_first_y, of_step_y = tl.zeros((BINS,), tl.float32), tl.zeros((BINS,), tl.float32)
    of_first_x, of_step_x = tl.zeros((BINS,), tl.float32), tl.zeros((BINS,), tl.float32)
    for i in range(visited_y):
        top, _more_y, of_bottom = tap(first_y, step_y, i, height)
        moves_y = (first_y + i * step_y >= 0) & (first_y + i * step_y < height - 1)  # clamped elsewhere
        upper = cells + top.to(OFFSET) * (width.to(OFFSET) * channels)
        lower = cells + tl.minimum(top + 1, height - 1).to(OFFSET) * (width.to(OFFSET) * channels)
        for j in range(tl.max(visited_x)):
            visited = j < visited_x
            left, _more_x, of_right = tap(first_x, step_x, j, width)
            moves_x = (first_x + j * step_x >= 0) & (first_x + j * step_x < width - 1)
            left_at = (left.to(OFFSET) * channels)[:, None]
            right_at = (tl.minimum(left + 1, width - 1).to(OFFSET) * channels)[:, None]
            of_sample_y, of_sample_x = tl.zeros((BINS, CHANNELS), tl.float32), tl.zeros((BINS, CHANNELS), tl.float32)
            for c0 in range(0, channels, CHANNELS):
                c = c0 + tl.arange(0, CHANNELS)[None, :]
                mask = (is_bin & visited)[:, None] & (c < channels)
                at = of_bins + c.to(OFFSET) * bins + q[:, None]
                g = tl.load(grad + at, mask, 0.0).to(tl.float32)
                if MAX:
                    winner = tl.load(winners + at, mask, -1).to(tl.int32)
                    g = tl.where(winner == (i * visited_x + j)[:, None], g, 0.0)
                top_left = tl.load(upper + left_at + c, mask, 0.0).to(tl.float32)
                top_right = tl.load(upper + right_at + c, mask, 0.0).to(tl.float32)
                bottom_left = tl.load(lower + left_at + c, mask, 0.0).to(tl.float32)
                bottom_right = tl.load(lower + right_at + c, mask, 0.0).to(tl.float32)
                above, below = top_right - top_left, bottom_right - bottom_left
                of_sample_x += g * (above + of_bottom * (below - above))
                before, behind = bottom_left - top_left, bottom_right - top_right
                of_sample_y += g * (before + of_right[:, None] * (behind - before))
            slope_y = tl.where(visited, tl.where(moves_y, tl.sum(of_sample_y, 1), 0.0), 0.0)
            slope_x = tl.where(visited & moves_x, tl.sum(of_sample_x, 1), 0.0)
            of_first_y += slope_y
            of_step_y += i * slope_y
            of_first_x += slope_x
            of_step_x += j * slope_x
    share = 1.0
    if not MAX:
        share = 1 / tl.maximum(total_y * total_x, 1.0)
    at = k * bins + p * bins_x + q
    store_shares(slopes, at, is_bin, rois.to(tl.int64) * bins, of_first_y * share, of_step_y * share, of_first_x * share, of_step_x * share)
