"""Numba kernels of a bin's largest sample: every sample is visited, and each channel has a winner of its own.

Which samples won is kept in the kernels' own order, which neither of them has to transpose: one block of channels after the other, each
`[K, bins, channels]`. A sample's number is `i * x_visited + j`; -1 is the 0 of a sample off the map or of an empty bin.
"""

import numpy as np

from roi_quantization.ops.cpu.loops import add, blend, cell_below, clamp, compile_kernel, compile_sums, inline, read_tile, write_tile


@compile_kernel
def lattice_samples(image, y_first, y_step, y_visited, y_total, x_first, x_step, x_visited, x_total, height, width):
    """What `max_forward` visits, found once for all blocks of channels.

    Returns:
        row, row_fraction: first of the two rows of cells that each sample lies between, `[K, P, most]`, and how far it is on the way to
            the second.
        column: the same along x.
        start: `[K * bins + 1]`, where each bin's samples start in the next three.
        cell, next_cell, fraction: the samples' neighbours along x, and how far they are on the way to the second. Where `interpolated`,
            the neighbours are on the rows of samples of a row of bins, row `i` from `i * width` on; else they are cells of the map.
        initial: `[K * bins]`, a bin's value before its samples are visited.
        interpolated: whether any sample lies between cells.
    """
    rois, bins_y, bins_x = len(image), y_first.shape[1], x_first.shape[1]
    row, row_fraction = _neighbours(y_first, y_step, y_visited, height)
    column, column_fraction = _neighbours(x_first, x_step, x_visited, width)
    interpolated = np.any(row_fraction != 0) or np.any(column_fraction != 0)
    start = np.zeros(rois * bins_y * bins_x + 1, np.int64)
    initial = np.zeros(rois * bins_y * bins_x, x_first.dtype)
    for k in range(rois):
        for p in range(bins_y):
            for q in range(bins_x):
                b = (k * bins_y + p) * bins_x + q
                start[b + 1] = start[b] + y_visited[k, p] * x_visited[k, q]
                initial[b] = initial_value(y_visited[k, p], y_total[k, p], x_visited[k, q], x_total[k, q])
    cell, next_cell, fraction = np.empty(start[-1], np.uint32), np.empty(start[-1], np.uint32), np.empty(start[-1], x_first.dtype)
    s = 0
    for k in range(rois):
        for p in range(bins_y):
            for q in range(bins_x):
                for i in range(y_visited[k, p]):
                    offset = (i if interpolated else image[k] * height + row[k, p, i]) * width
                    for j in range(x_visited[k, q]):
                        cell[s] = offset + column[k, q, j]
                        next_cell[s] = cell[s] + (column_fraction[k, q, j] != 0)
                        fraction[s] = column_fraction[k, q, j]
                        s += 1
    return row, row_fraction, column, start, cell, next_cell, fraction, initial, interpolated


@compile_kernel
def max_forward(
    cells, image, y_visited, x_visited,
    row, row_fraction, column, start, cell, next_cell, fraction, initial, interpolated,
    out, winners, k0, rois, c0,
):  # fmt: skip
    """The largest sample of each bin, and which sample it is, unless `winners` is empty.

    Reads `cells [N, H, W, channels]`, which are the channels from `c0` on, and writes those of `out [K, C, bins]`. The RoIs are those from
    `k0` on, of `rois` in all.
    """
    _, height, width, channels = cells.shape
    bins_y, bins_x = y_visited.shape[1], x_visited.shape[1]
    flat = cells.reshape(-1)
    cell_channels = flat.reshape((-1, channels))
    lines = np.empty((row.shape[2] * width, channels), cells.dtype)  # the map, interpolated at the rows of samples of a row of bins
    flat_lines = lines.reshape(-1)
    best = np.empty((bins_y * bins_x, channels), cells.dtype)
    remember = winners.size > 0
    of_block = _of_block(winners, c0, channels, rois if remember else 1, len(best))
    fraction = fraction.astype(cells.dtype)
    for k in range(len(image)):
        winner = of_block[k0 + k if remember else 0]
        winner[:] = -1
        left, length = _columns_read(column, x_visited, k, width, channels)
        for p in range(bins_y):
            for i in range(y_visited[k, p] if interpolated else 0):
                above, to = ((image[k] * height + row[k, p, i]) * width + left) * channels, (i * width + left) * channels
                below = above + width * channels if row_fraction[k, p, i] != 0 else above
                blend(flat[above : above + length], row_fraction[k, p, i], flat[below : below + length], flat_lines[to : to + length])
            for q in range(bins_x):
                b = p * bins_x + q
                bin = k * len(best) + b
                best[b] = initial[bin]
                if interpolated:
                    _largest_between(best[b], winner[b], lines, cell, next_cell, fraction, start[bin], start[bin + 1])
                else:
                    _largest(best[b], winner[b], cell_channels, cell, start[bin], start[bin + 1])
        write_tile(best, out[k], c0)


@compile_kernel
def max_backward(grad, winners, image, y_first, y_step, y_visited, x_first, x_step, x_visited, cells, c0):
    """Add to `cells [N, H, W, channels]` the gradient of the channels from `c0` on.

    A bin's gradient goes to the neighbours of its winner: every sample takes it from the channels where it won.
    """
    _, height, width, channels = cells.shape
    bins_x = x_first.shape[1]
    flat = cells.reshape(-1)
    row, row_fraction = _neighbours(y_first, y_step, y_visited, height)
    column, column_fraction = _neighbours(x_first, x_step, x_visited, width)
    interpolated = np.any(row_fraction != 0) or np.any(column_fraction != 0)
    line = np.empty((width + 1) * channels, cells.dtype)  # a neighbour beyond the edge has weight 0
    tile = np.empty((y_first.shape[1] * bins_x, channels), cells.dtype)
    of_block = _of_block(winners, c0, channels, len(image), len(tile))
    for k in range(len(image)):
        read_tile(grad[k], tile, c0)
        winner = of_block[k]
        left, length = _columns_read(column, x_visited, k, width, channels)
        for p in range(y_first.shape[1]):
            for i in range(y_visited[k, p]):
                to = ((image[k] * height + row[k, p, i]) * width + left) * channels
                if interpolated:
                    line[: length + channels] = 0
                    for q in range(bins_x):
                        b = p * bins_x + q
                        for j in range(x_visited[k, q]):
                            at = (column[k, q, j] - left) * channels
                            beside = at + channels
                            _add_won_between(
                                line[at:beside],
                                line[beside : beside + channels],
                                column_fraction[k, q, j],
                                tile[b],
                                winner[b],
                                i * x_visited[k, q] + j,
                            )
                    add(flat[to : to + length], 1 - row_fraction[k, p, i], line[:length])
                    if row_fraction[k, p, i] != 0:
                        add(flat[to + width * channels : to + width * channels + length], row_fraction[k, p, i], line[:length])
                else:
                    for q in range(bins_x):
                        b = p * bins_x + q
                        for j in range(x_visited[k, q]):
                            at = to + (column[k, q, j] - left) * channels
                            _add_won(flat[at : at + channels], tile[b], winner[b], i * x_visited[k, q] + j)


@compile_sums
def max_lattice_gradient(
    cells, grad, winners, image, y_first, y_step, y_visited, x_first, x_step, x_visited,
    grad_y_first, grad_y_step, grad_x_first, grad_x_step, c0,
):  # fmt: skip
    """Gradients of `first` and `step`: the slope of the map at each winning sample.

    Summed over the channels of `cells [N, H, W, channels]`, which are those from `c0` on.
    """
    _, height, width, channels = cells.shape
    bins_x = x_first.shape[1]
    flat = cells.reshape(-1)
    tile = np.empty((y_first.shape[1] * bins_x, channels), cells.dtype)
    of_block = _of_block(winners, c0, channels, len(image), len(tile))
    for k in range(len(image)):
        read_tile(grad[k], tile, c0)
        winner = of_block[k]
        for p in range(y_first.shape[1]):
            for i in range(y_visited[k, p]):
                row, row_fraction = _neighbour(y_first[k, p], y_step[k, p], i, height)
                free_y = 0 <= y_first[k, p] + i * y_step[k, p] < height - 1  # clamped elsewhere
                for q in range(bins_x):
                    for j in range(x_visited[k, q]):
                        column, column_fraction = _neighbour(x_first[k, q], x_step[k, q], j, width)
                        free_x = 0 <= x_first[k, q] + j * x_step[k, q] < width - 1
                        at = ((image[k] * height + row) * width + column) * channels
                        below = at + (width * channels if row + 1 < height else 0)
                        beside = channels if column + 1 < width else 0
                        slope_y, slope_x = _slopes(
                            flat[at : at + channels],
                            flat[at + beside : at + beside + channels],
                            flat[below : below + channels],
                            flat[below + beside : below + beside + channels],
                            row_fraction,
                            column_fraction,
                            tile[p * bins_x + q],
                            winner[p * bins_x + q],
                            i * x_visited[k, q] + j,
                        )
                        if free_y:
                            grad_y_first[k, p] += slope_y
                            grad_y_step[k, p] += i * slope_y
                        if free_x:
                            grad_x_first[k, q] += slope_x
                            grad_x_step[k, q] += j * slope_x


@inline
def initial_value(y_visited, y_total, x_visited, x_total):
    """A bin's value before its samples are visited: 0 where a sample is off the map or there is none, else less than all of them.

    Axis by axis, because a product of totals in float32 is rounded, and a bin of more than 2**24 samples would seem to have lost one.
    """
    return 0.0 if y_visited == 0 or x_visited == 0 or y_visited < y_total or x_visited < x_total else -np.inf


@inline
def _neighbour(first, step, i, size):
    """First of the two cells that sample `i` lies between, and how far it is on the way to the second."""
    position = clamp(first + i * step, size)
    cell = cell_below(position, size)
    return cell, position - cell


@compile_kernel
def _neighbours(first, step, count, size):
    """`_neighbour` of every sample, each `[K, P, most]`."""
    most = 0
    for n in count.flat:
        most = max(most, n)
    cell, fraction = np.zeros((*first.shape, most), np.int32), np.zeros((*first.shape, most), first.dtype)
    for k in range(first.shape[0]):
        for p in range(first.shape[1]):
            for i in range(count[k, p]):
                cell[k, p, i], fraction[k, p, i] = _neighbour(first[k, p], step[k, p], i, size)
    return cell, fraction


@compile_kernel
def _columns_read(column, count, k, width, channels):
    """First column that the samples of RoI k read, and how many elements of a channels-last row all of them span."""
    left, right = width, 0
    for p in range(count.shape[1]):
        if count[k, p] > 0:
            a, b = column[k, p, 0], column[k, p, count[k, p] - 1]
            left, right = min(left, a, b), max(right, a + 2, b + 2)
    return min(left, right), max(min(right, width) - left, 0) * channels


@inline
def _of_block(winners, c0, channels, rois, bins):
    """The winners of a block of channels; where none are remembered, a scratch to write to."""
    if winners.size == 0:
        return np.empty((rois, bins, channels), winners.dtype)
    return winners[c0 * rois * bins : (c0 + channels) * rois * bins].reshape((rois, bins, channels))


@inline
def _larger(best, winner, x, number):
    larger = x > best or x != x  # NaN wins, as in PyTorch's own max pooling
    return x if larger else best, number if larger else winner


# Four samples in one pass: a winner that goes to memory after each and comes back for the next costs more than the comparison. The last
# sample is visited again where a bin has no multiple of four: it is not larger than itself.


@inline
def _largest(best, winner, cells, cell, start, end):
    for s0 in range(start, end, 4):
        s1, s2, s3 = min(s0 + 1, end - 1), min(s0 + 2, end - 1), min(s0 + 3, end - 1)
        n0, n1, n2, n3 = np.int32(s0 - start), np.int32(s1 - start), np.int32(s2 - start), np.int32(s3 - start)
        x0, x1, x2, x3 = cells[cell[s0]], cells[cell[s1]], cells[cell[s2]], cells[cell[s3]]
        for c in range(len(best)):
            x, n = _larger(best[c], winner[c], x0[c], n0)
            x, n = _larger(x, n, x1[c], n1)
            x, n = _larger(x, n, x2[c], n2)
            best[c], winner[c] = _larger(x, n, x3[c], n3)


@inline
def _largest_between(best, winner, lines, cell, next_cell, fraction, start, end):
    for s0 in range(start, end, 4):
        s1, s2, s3 = min(s0 + 1, end - 1), min(s0 + 2, end - 1), min(s0 + 3, end - 1)
        n0, n1, n2, n3 = np.int32(s0 - start), np.int32(s1 - start), np.int32(s2 - start), np.int32(s3 - start)
        x0, y0, h0 = lines[cell[s0]], lines[next_cell[s0]], fraction[s0]
        x1, y1, h1 = lines[cell[s1]], lines[next_cell[s1]], fraction[s1]
        x2, y2, h2 = lines[cell[s2]], lines[next_cell[s2]], fraction[s2]
        x3, y3, h3 = lines[cell[s3]], lines[next_cell[s3]], fraction[s3]
        for c in range(len(best)):
            x, n = _larger(best[c], winner[c], x0[c] + h0 * (y0[c] - x0[c]), n0)
            x, n = _larger(x, n, x1[c] + h1 * (y1[c] - x1[c]), n1)
            x, n = _larger(x, n, x2[c] + h2 * (y2[c] - x2[c]), n2)
            best[c], winner[c] = _larger(x, n, x3[c] + h3 * (y3[c] - x3[c]), n3)


@inline
def _add_won(to, grad, winner, number):
    for c in range(len(to)):
        to[c] += grad[c] if winner[c] == number else to.dtype.type(0)


@inline
def _add_won_between(to, beside, fraction, grad, winner, number):
    fraction = to.dtype.type(fraction)
    for c in range(len(to)):
        won = grad[c] if winner[c] == number else to.dtype.type(0)
        to[c] += won - fraction * won
        beside[c] += fraction * won


@inline
def _slopes(top_left, top_right, bottom_left, bottom_right, row_fraction, column_fraction, grad, winner, number):
    one, v, h = grad.dtype.type(1), grad.dtype.type(row_fraction), grad.dtype.type(column_fraction)
    slope_y, slope_x = grad.dtype.type(0), grad.dtype.type(0)
    for c in range(len(grad)):
        g = grad[c] if winner[c] == number else grad.dtype.type(0)
        slope_y += g * ((one - h) * (bottom_left[c] - top_left[c]) + h * (bottom_right[c] - top_right[c]))
        slope_x += g * ((one - v) * (top_right[c] - top_left[c]) + v * (bottom_right[c] - bottom_left[c]))
    return slope_y, slope_x
