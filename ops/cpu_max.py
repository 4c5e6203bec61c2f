"""Numba kernels of a bin's largest sample: every sample is visited, and each channel has a winner of its own."""

import numpy as np

from ops.cpu_loops import blend, cell_below, channels_last, clamp, compile_kernel, compile_sums, inline, read_tile, write_tile


@compile_kernel
def max_forward(features, image, yf, ys, yn, yt, xf, xs, xn, xt, out, arg, c0, c1):
    """The largest sample of each bin and which it is, `i * xn + j`; -1 where it is the 0 of a sample off the map or of an empty bin."""
    height, width, channels = features.shape[2], features.shape[3], c1 - c0
    bins_x = xf.shape[1]
    cells = channels_last(features, c0, c1)
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
                    blend(line, v, cells[at + width * channels : at + width * channels + length], row[:length])
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
        write_tile(best, out[k], c0)
        if arg.size > 0:
            write_tile(which, arg[k], c0)


@compile_kernel
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


@compile_sums
def max_lattice_gradient(features, grad, arg, image, yf, ys, yn, xf, xs, xn, grad_yf, grad_ys, grad_xf, grad_xs, c0, c1):
    """Gradients of `first` and `step`, summed over the channels of this block: the slope of the map at each winning sample."""
    height, width, channels = features.shape[2], features.shape[3], c1 - c0
    bins_x = xf.shape[1]
    cells = channels_last(features, c0, c1)
    tile = np.empty((yf.shape[1] * bins_x, channels), features.dtype)
    which = np.empty((yf.shape[1] * bins_x, channels), np.int32)
    for k in range(len(image)):
        read_tile(grad[k], tile, c0)
        read_tile(arg[k], which, c0)
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
def _most(count):
    most = 0
    for n in count.flat:
        most = max(most, n)
    return most


@compile_kernel
def _reach(first, step, count, k, size):
    """Cells `[left, right)` that the taps of RoI k touch along an axis."""
    left, right = size, 0
    for p in range(first.shape[1]):
        if count[k, p] > 0:
            a, b = first[k, p], first[k, p] + (count[k, p] - 1) * step[k, p]
            left = min(left, cell_below(min(a, b), size))
            right = max(right, min(cell_below(max(a, b), size) + 2, size))
    return min(left, right), right


@inline
def _larger(best, which, x, w):
    for c in range(len(best)):
        larger = x[c] > best[c] or x[c] != x[c]  # not-a-number wins, as in PyTorch's own max pooling
        best[c] = x[c] if larger else best[c]
        which[c] = w if larger else which[c]


@inline
def _larger_blend(best, which, x, weight, y, w):
    weight = best.dtype.type(weight)
    for c in range(len(best)):
        sample = x[c] + weight * (y[c] - x[c])
        larger = sample > best[c] or sample != sample
        best[c] = sample if larger else best[c]
        which[c] = w if larger else which[c]


@inline
def _slopes(top_left, top_right, bottom_left, bottom_right, v, h, grad, which, w):
    one, v, h = grad.dtype.type(1), grad.dtype.type(v), grad.dtype.type(h)
    slope_y, slope_x = grad.dtype.type(0), grad.dtype.type(0)
    for c in range(len(grad)):
        g = grad[c] if which[c] == w else grad.dtype.type(0)
        slope_y += g * ((one - h) * (bottom_left[c] - top_left[c]) + h * (bottom_right[c] - top_right[c]))
        slope_x += g * ((one - v) * (top_right[c] - top_left[c]) + v * (bottom_right[c] - bottom_left[c]))
    return slope_y, slope_x
