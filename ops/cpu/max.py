"""Numba kernels of a bin's largest sample: every sample is visited, and each channel has a winner of its own.

Which samples won is kept in the kernels' own order, which neither of them has to transpose: one block of channels after the other, each
`[K, bins, channels]`; a sample's number is `i * xn + j`, and -1 is the 0 of a sample off the map or of an empty bin.
"""

import numpy as np

from roi_quantization.ops.cpu.loops import (
    add,
    blend,
    cell_below,
    channels_first,
    channels_last,
    clamp,
    compile_kernel,
    compile_sums,
    inline,
    read_tile,
    write_tile,
)


@compile_kernel
def lattice_samples(image, yf, ys, yn, yt, xf, xs, xn, xt, height, width):
    """What `max_forward` visits, found once for all blocks of channels.

    Where every sample is a cell, `at` is that cell. Else the map is interpolated at the rows of samples of a row of bins first; `at` and
    `beside` are then a sample's neighbours on these lines, line `i` from `i * width` on, and `way` is how far it is from one to the other.
    """
    rois, bins_y, bins_x = len(image), yf.shape[1], xf.shape[1]
    top, v = _taps(yf, ys, yn, height)
    near, h = _taps(xf, xs, xn, width)
    between = np.any(v != 0) or np.any(h != 0)
    start = np.zeros(rois * bins_y * bins_x + 1, np.int64)  # of each bin's samples
    worth = np.zeros(rois * bins_y * bins_x, xf.dtype)  # of a bin before its samples are visited
    for k in range(rois):
        for p in range(bins_y):
            for q in range(bins_x):
                b, count = (k * bins_y + p) * bins_x + q, yn[k, p] * xn[k, q]
                start[b + 1] = start[b] + count
                worth[b] = 0 if count == 0 or count < yt[k, p] * xt[k, q] else -np.inf
    at, beside, way = np.empty(start[-1], np.uint32), np.empty(start[-1], np.uint32), np.empty(start[-1], xf.dtype)
    s = 0
    for k in range(rois):
        for p in range(bins_y):
            for q in range(bins_x):
                for i in range(yn[k, p]):
                    line = (i if between else image[k] * height + top[k, p, i]) * width
                    for j in range(xn[k, q]):
                        at[s], beside[s], way[s] = line + near[k, q, j], line + near[k, q, j] + (h[k, q, j] != 0), h[k, q, j]
                        s += 1
    return top, v, near, start, worth, at, beside, way, between


@compile_kernel
def max_forward(features, image, yn, xn, top, v, near, start, worth, at, beside, way, between, out, winners, k0, rois, c0, c1):
    """The largest sample of each bin of RoIs `k0` and after, of `rois` in all, and which sample it is, unless `winners` is empty."""
    height, width, channels = features.shape[2], features.shape[3], c1 - c0
    bins_y, bins_x = yn.shape[1], xn.shape[1]
    flat = channels_last(features, c0, c1)
    cells = flat.reshape((-1, channels))
    lines = np.empty((top.shape[2] * width, channels), features.dtype)
    flat_lines = lines.reshape(-1)
    best = np.empty((bins_y * bins_x, channels), features.dtype)
    remember = winners.size > 0
    of_block = _of_block(winners, c0, c1, rois if remember else 1, len(best))
    way = way.astype(features.dtype)
    for k in range(len(image)):
        which = of_block[k0 + k if remember else 0]
        which[:] = -1
        left, length = _touched(near, xn, k, width, channels)
        for p in range(bins_y):
            for i in range(yn[k, p] if between else 0):
                x, to = ((image[k] * height + top[k, p, i]) * width + left) * channels, (i * width + left) * channels
                y = x + width * channels if v[k, p, i] != 0 else x
                blend(flat[x : x + length], v[k, p, i], flat[y : y + length], flat_lines[to : to + length])
            for q in range(bins_x):
                b = p * bins_x + q
                bin = k * len(best) + b
                best[b] = worth[bin]
                if between:
                    _largest_between(best[b], which[b], lines, at, beside, way, start[bin], start[bin + 1])
                else:
                    _largest(best[b], which[b], cells, at, start[bin], start[bin + 1])
        write_tile(best, out[k], c0)


@compile_kernel
def max_backward(grad, winners, image, yf, ys, yn, xf, xs, xn, grad_features, c0, c1):
    """Each bin's gradient to the taps of its winner: every sample takes it from the channels where it won."""
    height, width, channels = grad_features.shape[2], grad_features.shape[3], c1 - c0
    bins_x = xf.shape[1]
    cells = np.zeros(grad_features.shape[0] * height * width * channels, grad_features.dtype)
    top, v = _taps(yf, ys, yn, height)
    near, h = _taps(xf, xs, xn, width)
    between = np.any(v != 0) or np.any(h != 0)
    row = np.empty((width + 1) * channels, grad_features.dtype)  # a tap beyond the edge has weight 0
    tile = np.empty((yf.shape[1] * bins_x, channels), grad_features.dtype)
    of_block = _of_block(winners, c0, c1, len(image), len(tile))
    for k in range(len(image)):
        read_tile(grad[k], tile, c0)
        which = of_block[k]
        left, length = _touched(near, xn, k, width, channels)
        for p in range(yf.shape[1]):
            for i in range(yn[k, p]):
                to = ((image[k] * height + top[k, p, i]) * width + left) * channels
                if between:
                    row[: length + channels] = 0
                    for q in range(bins_x):
                        b = p * bins_x + q
                        for j in range(xn[k, q]):
                            at = (near[k, q, j] - left) * channels
                            beside = at + channels
                            _add_won_between(
                                row[at:beside], row[beside : beside + channels], h[k, q, j], tile[b], which[b], i * xn[k, q] + j
                            )
                    add(cells[to : to + length], 1 - v[k, p, i], row[:length])
                    if v[k, p, i] != 0:
                        add(cells[to + width * channels : to + width * channels + length], v[k, p, i], row[:length])
                else:
                    for q in range(bins_x):
                        b = p * bins_x + q
                        for j in range(xn[k, q]):
                            at = to + (near[k, q, j] - left) * channels
                            _add_won(cells[at : at + channels], tile[b], which[b], i * xn[k, q] + j)
    channels_first(cells, grad_features, c0, c1)


@compile_sums
def max_lattice_gradient(features, grad, winners, image, yf, ys, yn, xf, xs, xn, grad_yf, grad_ys, grad_xf, grad_xs, c0, c1):
    """Gradients of `first` and `step`, summed over the channels of this block: the slope of the map at each winning sample."""
    height, width, channels = features.shape[2], features.shape[3], c1 - c0
    bins_x = xf.shape[1]
    cells = channels_last(features, c0, c1)
    tile = np.empty((yf.shape[1] * bins_x, channels), features.dtype)
    of_block = _of_block(winners, c0, c1, len(image), len(tile))
    for k in range(len(image)):
        read_tile(grad[k], tile, c0)
        which = of_block[k]
        for p in range(yf.shape[1]):
            for i in range(yn[k, p]):
                top, v = _tap(yf[k, p], ys[k, p], i, height)
                free_y = 0 <= yf[k, p] + i * ys[k, p] < height - 1
                for q in range(bins_x):
                    for j in range(xn[k, q]):
                        near, h = _tap(xf[k, q], xs[k, q], j, width)
                        free_x = 0 <= xf[k, q] + j * xs[k, q] < width - 1
                        at = ((image[k] * height + top) * width + near) * channels
                        below = at + (width * channels if top + 1 < height else 0)
                        beside = channels if near + 1 < width else 0
                        slope_y, slope_x = _slopes(
                            cells[at : at + channels],
                            cells[at + beside : at + beside + channels],
                            cells[below : below + channels],
                            cells[below + beside : below + beside + channels],
                            v,
                            h,
                            tile[p * bins_x + q],
                            which[p * bins_x + q],
                            i * xn[k, q] + j,
                        )
                        if free_y:
                            grad_yf[k, p] += slope_y
                            grad_ys[k, p] += i * slope_y
                        if free_x:
                            grad_xf[k, q] += slope_x
                            grad_xs[k, q] += j * slope_x


@inline
def _tap(first, step, i, size):
    """Cell below sample i, and how far the sample is on the way to the next."""
    position = clamp(first + i * step, size)
    low = cell_below(position, size)
    return low, position - low


@compile_kernel
def _taps(first, step, count, size):
    """`_tap` of every sample, each `[K, P, most]`."""
    most = 0
    for n in count.flat:
        most = max(most, n)
    low, way = np.zeros((*first.shape, most), np.int32), np.zeros((*first.shape, most), first.dtype)
    for k in range(first.shape[0]):
        for p in range(first.shape[1]):
            for i in range(count[k, p]):
                low[k, p, i], way[k, p, i] = _tap(first[k, p], step[k, p], i, size)
    return low, way


@compile_kernel
def _touched(low, count, k, size, channels):
    """First cell that the taps of RoI k touch along an axis, and how many elements of a channels-last row they span."""
    left, right = size, 0
    for p in range(count.shape[1]):
        if count[k, p] > 0:
            a, b = low[k, p, 0], low[k, p, count[k, p] - 1]
            left, right = min(left, a, b), max(right, a + 2, b + 2)
    return min(left, right), max(min(right, size) - left, 0) * channels


@inline
def _of_block(winners, c0, c1, rois, bins):
    """The winners of a block of channels; where none are remembered, a scratch to write to."""
    if winners.size == 0:
        return np.empty((rois, bins, c1 - c0), winners.dtype)
    return winners[c0 * rois * bins : c1 * rois * bins].reshape((rois, bins, c1 - c0))


@inline
def _larger(best, which, x, w):
    larger = x > best or x != x  # not-a-number wins, as in PyTorch's own max pooling
    return x if larger else best, w if larger else which


# Four samples in one pass: a winner that goes to memory after each and comes back for the next costs more than the comparison. The last
# sample is visited again where a bin has no multiple of four: it is not larger than itself.


@inline
def _largest(best, which, cells, at, start, end):
    for s0 in range(start, end, 4):
        s1, s2, s3 = min(s0 + 1, end - 1), min(s0 + 2, end - 1), min(s0 + 3, end - 1)
        w0, w1, w2, w3 = np.int32(s0 - start), np.int32(s1 - start), np.int32(s2 - start), np.int32(s3 - start)
        x0, x1, x2, x3 = cells[at[s0]], cells[at[s1]], cells[at[s2]], cells[at[s3]]
        for c in range(len(best)):
            x, w = _larger(best[c], which[c], x0[c], w0)
            x, w = _larger(x, w, x1[c], w1)
            x, w = _larger(x, w, x2[c], w2)
            best[c], which[c] = _larger(x, w, x3[c], w3)


@inline
def _largest_between(best, which, lines, at, beside, way, start, end):
    for s0 in range(start, end, 4):
        s1, s2, s3 = min(s0 + 1, end - 1), min(s0 + 2, end - 1), min(s0 + 3, end - 1)
        w0, w1, w2, w3 = np.int32(s0 - start), np.int32(s1 - start), np.int32(s2 - start), np.int32(s3 - start)
        x0, y0, h0 = lines[at[s0]], lines[beside[s0]], way[s0]
        x1, y1, h1 = lines[at[s1]], lines[beside[s1]], way[s1]
        x2, y2, h2 = lines[at[s2]], lines[beside[s2]], way[s2]
        x3, y3, h3 = lines[at[s3]], lines[beside[s3]], way[s3]
        for c in range(len(best)):
            x, w = _larger(best[c], which[c], x0[c] + h0 * (y0[c] - x0[c]), w0)
            x, w = _larger(x, w, x1[c] + h1 * (y1[c] - x1[c]), w1)
            x, w = _larger(x, w, x2[c] + h2 * (y2[c] - x2[c]), w2)
            best[c], which[c] = _larger(x, w, x3[c] + h3 * (y3[c] - x3[c]), w3)


@inline
def _add_won(to, x, which, w):
    for c in range(len(to)):
        to[c] += x[c] if which[c] == w else to.dtype.type(0)


@inline
def _add_won_between(near, beside, h, x, which, w):
    h = near.dtype.type(h)
    for c in range(len(near)):
        won = x[c] if which[c] == w else near.dtype.type(0)
        near[c] += won - h * won
        beside[c] += h * won


@inline
def _slopes(top_left, top_right, bottom_left, bottom_right, v, h, grad, which, w):
    one, v, h = grad.dtype.type(1), grad.dtype.type(v), grad.dtype.type(h)
    slope_y, slope_x = grad.dtype.type(0), grad.dtype.type(0)
    for c in range(len(grad)):
        g = grad[c] if which[c] == w else grad.dtype.type(0)
        slope_y += g * ((one - h) * (bottom_left[c] - top_left[c]) + h * (bottom_right[c] - top_right[c]))
        slope_x += g * ((one - v) * (top_right[c] - top_left[c]) + v * (bottom_right[c] - bottom_left[c]))
    return slope_y, slope_x
