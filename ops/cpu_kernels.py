"""Numba kernels of the CPU path; compiled at first use and kept on disk. `ops/cpu.py` calls them and hands out the blocks of channels.

A kernel works on channels `c0` to `c1`. It copies its slice of the map channels-last, where the channels of a cell are neighbours and every
inner loop runs over them, and visits the RoIs in order.

Two kernels: a bin's `mean` (of samples, or the exact integral) is the outer product of a window of weights in y and one in x, which costs
far fewer reads than the samples one by one; its `max` visits the samples. Each has its transpose, and one more for the gradient of the
lattice.
"""

import numba
import numpy as np

_compile = numba.njit(nogil=True, cache=True, error_model="numpy")
# Sums over channels may be reassociated, so that they vectorise: settled when the kernel is compiled, so a run repeats bit for bit. Nothing
# else may: positions must come out the same wherever they are computed, or a kernel would read beyond what it reached for.
_compile_sums = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
_inline = numba.njit(inline="always")


# --------------------------------------------------------------------------------------------------------------- windows: mean and integral


@_compile
def lattice_windows(first, step, count, total, size):
    """The mean over `count` interpolated samples as weights of neighbouring cells: start and number of cells, and their weights."""
    rois, bins = first.shape
    start, cells = np.zeros((rois, bins), np.int32), np.zeros((rois, bins), np.int32)
    longest = 1
    for k in range(rois):
        for p in range(bins):
            if count[k, p] > 0:
                a, b = first[k, p], first[k, p] + (count[k, p] - 1) * step[k, p]
                low, high = _cell(min(a, b), size), _cell(max(a, b), size)
                start[k, p], cells[k, p] = low, min(high + 2, size) - low
                longest = max(longest, cells[k, p])
    weights = np.zeros((rois, bins, longest), first.dtype)
    for k in range(rois):
        for p in range(bins):
            for i in range(count[k, p]):
                position = _clamp(first[k, p] + i * step[k, p], size)
                low = _cell(position, size)
                share = 1 / total[k, p]
                weights[k, p, low - start[k, p]] += (1 - (position - low)) * share
                if low + 1 < size:
                    weights[k, p, low + 1 - start[k, p]] += (position - low) * share
    return start, cells, weights


@_compile
def lattice_gradient(first, step, count, total, size, start, grad_weights):
    """Transpose of the derivative of `_lattice_windows`: gradients of `first` and `step`."""
    grad_first, grad_step = np.zeros_like(first), np.zeros_like(step)
    for k in range(first.shape[0]):
        for p in range(first.shape[1]):
            for i in range(count[k, p]):
                position = first[k, p] + i * step[k, p]
                if 0 <= position < size - 1:  # clamped elsewhere
                    low = _cell(position, size) - start[k, p]
                    slope = (grad_weights[k, p, low + 1] - grad_weights[k, p, low]) / total[k, p]
                    grad_first[k, p] += slope
                    grad_step[k, p] += i * slope
    return grad_first, grad_step


@_compile
def integral_windows(low, high, size):
    """The mean of the interpolated map between `low` and `high` as weights of neighbouring cells; 0 off the map."""
    rois, bins = low.shape
    start, cells = np.zeros((rois, bins), np.int32), np.zeros((rois, bins), np.int32)
    longest = 1
    for k in range(rois):
        for p in range(bins):
            if high[k, p] > low[k, p] and high[k, p] > -1 and low[k, p] < size:
                start[k, p] = _cell(low[k, p], size)
                cells[k, p] = min(_cell(high[k, p], size) + 2, size) - start[k, p]
                longest = max(longest, cells[k, p])
    weights = np.zeros((rois, bins, longest), low.dtype)
    for k in range(rois):
        for p in range(bins):
            for i in range(cells[k, p]):
                cell = start[k, p] + i
                integral = _hat_integral(high[k, p] - cell) - _hat_integral(low[k, p] - cell)
                weights[k, p, i] = integral / (high[k, p] - low[k, p])
    return start, cells, weights


@_compile
def integral_gradient(low, high, start, cells, weights, grad_weights):
    """Transpose of the derivative of `_integral_windows`: gradients of `low` and `high`."""
    grad_low, grad_high = np.zeros_like(low), np.zeros_like(high)
    for k in range(low.shape[0]):
        for p in range(low.shape[1]):
            for i in range(cells[k, p]):
                cell, extent = start[k, p] + i, high[k, p] - low[k, p]
                grad_high[k, p] += grad_weights[k, p, i] * (max(0, 1 - abs(high[k, p] - cell)) - weights[k, p, i]) / extent
                grad_low[k, p] -= grad_weights[k, p, i] * (max(0, 1 - abs(low[k, p] - cell)) - weights[k, p, i]) / extent
    return grad_low, grad_high


@_inline
def _clamp(position, size):
    return min(max(position, 0), size - 1)


@_inline
def _cell(position, size):
    return np.int32(np.floor(_clamp(position, size)))


@_compile
def _hat_integral(t):
    """Integral of `max(0, 1 - |t|)` from 0 to t."""
    t = min(max(t, -1), 1)
    return t - t * abs(t) / 2


@_compile
def window_forward(features, image, ys, yn, yw, xs, xn, xw, out, c0, c1):
    width, channels = features.shape[3], c1 - c0
    cells = _channels_last(features, c0, c1)
    row = np.empty(width * channels, features.dtype)  # one bin's mean over y, for every x that the RoI touches
    tile = np.zeros((ys.shape[1] * xs.shape[1], channels), features.dtype)
    for k in range(len(image)):
        left, length = _touched(xs, xn, k, channels)
        for p in range(ys.shape[1]):
            _pool_rows(cells, image[k] * features.shape[2] + ys[k, p], yn[k, p], yw[k, p], width, left, channels, row[:length])
            for q in range(xs.shape[1]):
                pooled = tile[p * xs.shape[1] + q]
                pooled[:] = 0
                for i in range(xn[k, q]):
                    at = (xs[k, q] - left + i) * channels
                    _add(pooled, xw[k, q, i], row[at : at + channels])
        _write_tile(tile, out[k], c0)


@_compile
def window_backward(grad, image, ys, yn, yw, xs, xn, xw, grad_features, c0, c1):
    height, width, channels = grad_features.shape[2], grad_features.shape[3], c1 - c0
    cells = np.zeros(grad_features.shape[0] * height * width * channels, grad_features.dtype)
    row = np.empty(width * channels, grad_features.dtype)
    tile = np.empty((ys.shape[1] * xs.shape[1], channels), grad_features.dtype)
    for k in range(len(image)):
        _read_tile(grad[k], tile, c0)
        left, length = _touched(xs, xn, k, channels)
        for p in range(ys.shape[1]):
            _spread_bins(tile, p, xs[k], xn[k], xw[k], left, channels, row[:length])
            for i in range(yn[k, p]):
                at = ((image[k] * height + ys[k, p] + i) * width + left) * channels
                _add(cells[at : at + length], yw[k, p, i], row[:length])
    _channels_first(cells, grad_features, c0, c1)


@_compile_sums
def window_weight_gradient(features, grad, image, ys, yn, yw, xs, xn, xw, grad_yw, grad_xw, c0, c1):
    """Gradients of the weights, summed over the channels of this block."""
    height, width, channels = features.shape[2], features.shape[3], c1 - c0
    cells = _channels_last(features, c0, c1)
    row = np.empty(width * channels, features.dtype)
    tile = np.empty((ys.shape[1] * xs.shape[1], channels), features.dtype)
    for k in range(len(image)):
        _read_tile(grad[k], tile, c0)
        left, length = _touched(xs, xn, k, channels)
        for p in range(ys.shape[1]):
            _pool_rows(cells, image[k] * height + ys[k, p], yn[k, p], yw[k, p], width, left, channels, row[:length])
            for q in range(xs.shape[1]):
                for i in range(xn[k, q]):
                    at = (xs[k, q] - left + i) * channels
                    grad_xw[k, q, i] += _dot(tile[p * xs.shape[1] + q], row[at : at + channels])
            _spread_bins(tile, p, xs[k], xn[k], xw[k], left, channels, row[:length])
            for i in range(yn[k, p]):
                at = ((image[k] * height + ys[k, p] + i) * width + left) * channels
                grad_yw[k, p, i] += _dot(cells[at : at + length], row[:length])


@_inline
def _pool_rows(cells, y, rows, weights, width, left, channels, row):
    row[:] = 0
    for i in range(rows):
        at = ((y + i) * width + left) * channels
        _add(row, weights[i], cells[at : at + len(row)])


@_inline
def _spread_bins(tile, p, start, count, weights, left, channels, row):
    row[:] = 0
    for q in range(len(start)):
        for i in range(count[q]):
            at = (start[q] - left + i) * channels
            _add(row[at : at + channels], weights[q, i], tile[p * len(start) + q])


# ------------------------------------------------------------------------------------------------------------------------- lattices: max


@_compile
def max_forward(features, image, yf, ys, yn, yt, xf, xs, xn, xt, out, arg, c0, c1):
    """The largest sample of each bin and which it is, `i * xn + j`; -1 where it is the 0 of a sample off the map or of an empty bin."""
    height, width, channels = features.shape[2], features.shape[3], c1 - c0
    bins_x = xf.shape[1]
    cells = _channels_last(features, c0, c1)
    row = np.empty(width * channels, features.dtype)
    best = np.empty((yf.shape[1] * bins_x, channels), features.dtype)
    which = np.empty((yf.shape[1] * bins_x, channels), np.int32)
    for k in range(len(image)):
        left, right = _reach(xf, xs, xn, k, width)
        length = (right - left) * channels
        for p in range(yf.shape[1]):
            for q in range(bins_x):
                count = yn[k, p] * xn[k, q]
                best[p * bins_x + q] = 0 if count == 0 or count < yt[k, p] * xt[k, q] else -np.inf
            which[p * bins_x : (p + 1) * bins_x] = -1
            for i in range(yn[k, p]):
                top, v = _tap(yf[k, p], ys[k, p], i, height)
                at = ((image[k] * height + top) * width + left) * channels
                line = cells[at : at + length]
                if v != 0:
                    _blend(line, v, cells[at + width * channels : at + width * channels + length], row[:length])
                    line = row[:length]
                for q in range(bins_x):
                    for j in range(xn[k, q]):
                        near, h = _tap(xf[k, q], xs[k, q], j, width)
                        at = (near - left) * channels
                        b, w, sample = p * bins_x + q, i * xn[k, q] + j, line[at : at + channels]
                        if h != 0:
                            _larger_blend(best[b], which[b], sample, h, line[at + channels : at + 2 * channels], w)
                        else:
                            _larger(best[b], which[b], sample, w)
        _write_tile(best, out[k], c0)
        if arg.size > 0:
            _write_tile(which, arg[k], c0)


@_compile
def max_backward(grad, arg, image, yf, ys, yn, xf, xs, xn, grad_features, c0, c1):
    """Each bin's gradient to the taps of its winner. They differ from channel to channel, so here the map is walked channel by channel."""
    images, _, height, width = grad_features.shape
    bins_y, bins_x = yf.shape[1], xf.shape[1]
    planes = np.zeros((images, c1 - c0, height * width + width + 1), grad_features.dtype)  # a tap beyond the edge has weight 0
    at = np.empty((bins_y * bins_x, _most(yn) * _most(xn)), np.uint32)  # cell below each sample
    way = np.empty((bins_y * bins_x, _most(yn) * _most(xn), 2), grad_features.dtype)  # and how far it is on the way to the next
    one, right, down, diagonal = grad_features.dtype.type(1), np.uint32(1), np.uint32(width), np.uint32(width + 1)
    for k in range(len(image)):
        between = False
        for p in range(bins_y):
            for q in range(bins_x):
                for i in range(yn[k, p]):
                    for j in range(xn[k, q]):
                        b, w = p * bins_x + q, i * xn[k, q] + j
                        y, way[b, w, 0] = _tap(yf[k, p], ys[k, p], i, height)
                        x, way[b, w, 1] = _tap(xf[k, q], xs[k, q], j, width)
                        at[b, w] = y * width + x
                        between = between or way[b, w, 0] != 0 or way[b, w, 1] != 0
        for c in range(c0, c1):
            plane = planes[image[k], c - c0]
            for b in range(bins_y * bins_x):
                if arg[k, c, b] >= 0:
                    w, g = np.uint32(arg[k, c, b]), grad[k, c, b]
                    cell = at[b, w]
                    if between:
                        v, h = way[b, w, 0], way[b, w, 1]
                        plane[cell] += g * (one - v) * (one - h)
                        plane[cell + right] += g * (one - v) * h
                        plane[cell + down] += g * v * (one - h)
                        plane[cell + diagonal] += g * v * h
                    else:
                        plane[cell] += g
    for n in range(images):
        for c in range(c0, c1):
            for y in range(height):
                for x in range(width):
                    grad_features[n, c, y, x] = planes[n, c - c0, y * width + x]


@_compile_sums
def max_lattice_gradient(features, grad, arg, image, yf, ys, yn, xf, xs, xn, grad_yf, grad_ys, grad_xf, grad_xs, c0, c1):
    """Gradients of `first` and `step`, summed over the channels of this block: the slope of the map at each winning sample."""
    height, width, channels = features.shape[2], features.shape[3], c1 - c0
    bins_x = xf.shape[1]
    cells = _channels_last(features, c0, c1)
    tile = np.empty((yf.shape[1] * bins_x, channels), features.dtype)
    which = np.empty((yf.shape[1] * bins_x, channels), np.int32)
    for k in range(len(image)):
        _read_tile(grad[k], tile, c0)
        _read_tile(arg[k], which, c0)
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


@_inline
def _tap(first, step, i, size):
    """Cell below sample i, and how far the sample is on the way to the next."""
    position = _clamp(first + i * step, size)
    low = _cell(position, size)
    return low, position - low


@_compile
def _most(count):
    most = 0
    for n in count.flat:
        most = max(most, n)
    return most


@_compile
def _reach(first, step, count, k, size):
    """Cells `[left, right)` that the taps of RoI k touch along an axis."""
    left, right = size, 0
    for p in range(first.shape[1]):
        if count[k, p] > 0:
            a, b = first[k, p], first[k, p] + (count[k, p] - 1) * step[k, p]
            left = min(left, _cell(min(a, b), size))
            right = max(right, min(_cell(max(a, b), size) + 2, size))
    return min(left, right), right


# ------------------------------------------------------------------------------------------------------- inner loops, over channels


@_inline
def _add(to, weight, x):
    weight = to.dtype.type(weight)
    for c in range(len(to)):
        to[c] += weight * x[c]


@_inline
def _blend(x, weight, y, to):
    weight = to.dtype.type(weight)
    for c in range(len(to)):
        to[c] = x[c] + weight * (y[c] - x[c])


@_inline
def _larger(best, which, x, w):
    for c in range(len(best)):
        larger = x[c] > best[c] or x[c] != x[c]  # not-a-number wins, as in PyTorch's own max pooling
        best[c] = x[c] if larger else best[c]
        which[c] = w if larger else which[c]


@_inline
def _larger_blend(best, which, x, weight, y, w):
    weight = best.dtype.type(weight)
    for c in range(len(best)):
        sample = x[c] + weight * (y[c] - x[c])
        larger = sample > best[c] or sample != sample
        best[c] = sample if larger else best[c]
        which[c] = w if larger else which[c]


@_inline
def _dot(x, y):
    total = x.dtype.type(0)
    for c in range(len(x)):
        total += x[c] * y[c]
    return total


@_inline
def _slopes(top_left, top_right, bottom_left, bottom_right, v, h, grad, which, w):
    one, v, h = grad.dtype.type(1), grad.dtype.type(v), grad.dtype.type(h)
    slope_y, slope_x = grad.dtype.type(0), grad.dtype.type(0)
    for c in range(len(grad)):
        g = grad[c] if which[c] == w else grad.dtype.type(0)
        slope_y += g * ((one - h) * (bottom_left[c] - top_left[c]) + h * (bottom_right[c] - top_right[c]))
        slope_x += g * ((one - v) * (top_right[c] - top_left[c]) + v * (bottom_right[c] - bottom_left[c]))
    return slope_y, slope_x


@_compile
def _touched(start, count, k, channels):
    """First cell that the windows of RoI k touch, and how many elements of a channels-last row they span."""
    left, right = 1 << 30, 0
    for p in range(start.shape[1]):
        if count[k, p] > 0:
            left, right = min(left, start[k, p]), max(right, start[k, p] + count[k, p])
    return min(left, right), max(right - left, 0) * channels


@_compile
def _channels_last(features, c0, c1):
    """Channels `c0` to `c1` of `[N, C, H, W]`, any strides, as one flat `[N, H, W, c1 - c0]`."""
    images, _, height, width = features.shape
    channels = c1 - c0
    cells = np.empty((images, height, width, channels), features.dtype)
    if features.strides[1] < features.strides[3]:
        cells[:] = features[:, c0:c1].transpose(0, 2, 3, 1)
    else:
        for n in range(images):
            for y in range(height):
                for c in range(channels):
                    for x in range(width):
                        cells[n, y, x, c] = features[n, c0 + c, y, x]
    return cells.reshape(-1)


@_compile
def _channels_first(cells, features, c0, c1):
    images, _, height, width = features.shape
    view = cells.reshape((images, height, width, c1 - c0))
    if features.strides[1] < features.strides[3]:
        features[:, c0:c1] = view.transpose(0, 3, 1, 2)
    else:
        for n in range(images):
            for y in range(height):
                for c in range(c1 - c0):
                    for x in range(width):
                        features[n, c0 + c, y, x] = view[n, y, x, c]


@_compile
def _write_tile(tile, out, c0):
    for c in range(tile.shape[1]):
        for p in range(tile.shape[0]):
            out[c0 + c, p] = tile[p, c]


@_compile
def _read_tile(out, tile, c0):
    for c in range(tile.shape[1]):
        for p in range(tile.shape[0]):
            tile[p, c] = out[c0 + c, p]
