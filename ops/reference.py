"""The oracle: slow, obvious, float64. Every fast path is held against it, output and gradients.

One Python loop over RoIs and bins; autograd gives the gradients. It takes the same lattices as the kernels, so it checks how
samples are visited and reduced. The lattices are checked against torchvision and against numbers worked out by hand.
"""

import torch
from torch import Tensor

from roi_quantization.ops.geometry import Axis, Bounds


def lattice_pool(features: Tensor, image: Tensor, y: Axis, x: Axis, reduce: str) -> Tensor:
    """Reduce each bin's samples by their `mean` or `max`. `features [N, C, H, W]`, `image [K]` -> `[K, C, P, P]` float64."""
    features, (rois, bins_y), bins_x = features.double(), y.first.shape, x.first.shape[1]
    bins = []
    for k in range(rois):
        for p in range(bins_y):
            for q in range(bins_x):
                samples = _interpolate(features[image[k]], _positions(y, k, p), _positions(x, k, q))
                bins.append(_reduce(samples, float(y.total[k, p]) * float(x.total[k, q]), reduce))
    return _stack(bins, features, rois, bins_y, bins_x)


def _positions(axis: Axis, k: int, p: int) -> Tensor:
    return axis.first[k, p].double() + torch.arange(int(axis.visited[k, p])) * axis.step[k, p].double()


def _interpolate(feature: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The samples of one bin, `[C, H, W] -> [C, len(y), len(x)]`."""
    height, width = feature.shape[1:]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.floor().long(), x.floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    v, h = (y - top)[:, None], x - left
    return (
        (1 - v) * (1 - h) * feature[:, top][:, :, left]
        + (1 - v) * h * feature[:, top][:, :, right]
        + v * (1 - h) * feature[:, bottom][:, :, left]
        + v * h * feature[:, bottom][:, :, right]
    )


def _reduce(samples: Tensor, total: float, reduce: str) -> Tensor:
    """`[C]`, of the samples on the map, where all samples are `total`."""
    samples = samples.flatten(1)
    if reduce == "mean":
        return samples.sum(1) / max(total, 1.0)
    if samples.shape[1] == 0 or samples.shape[1] < total:  # a sample off the map has the value 0
        samples = torch.cat([samples.new_zeros(len(samples), 1), samples], 1)
    first = (samples == samples.amax(1, keepdim=True)).int().argmax(1, keepdim=True)  # of equal ones the first wins, and takes the gradient
    return samples.gather(1, first)[:, 0]


def integral_pool(features: Tensor, image: Tensor, y: Bounds, x: Bounds) -> Tensor:
    """The integral of the interpolated map (0 off the map) over each bin, by the bin's area. -> `[K, C, P, P]` float64."""
    features, (rois, bins_y), bins_x = features.double(), y.low.shape, x.low.shape[1]
    rows, columns = (torch.arange(size) for size in features.shape[2:])
    bins = []
    for k in range(rois):
        for p in range(bins_y):
            for q in range(bins_x):
                (top, bottom), (left, right) = (y.low[k, p], y.high[k, p]), (x.low[k, q], x.high[k, q])
                area = (bottom - top) * (right - left)
                value = features.new_zeros(features.shape[1])
                if area > 0:
                    of_rows, of_columns = _tent_integral(top - rows, bottom - rows), _tent_integral(left - columns, right - columns)
                    value = (features[image[k]] * of_rows[:, None] * of_columns).sum((1, 2)) / area
                bins.append(value)
    return _stack(bins, features, rois, bins_y, bins_x)


def _tent_integral(a: Tensor, b: Tensor) -> Tensor:
    """Integral of `max(0, 1 - |t|)` from a to b."""
    a, b = a.double().clamp(-1, 1), b.double().clamp(-1, 1)
    return (b - b * b.abs() / 2) - (a - a * a.abs() / 2)


def _stack(bins: list[Tensor], features: Tensor, rois: int, bins_y: int, bins_x: int) -> Tensor:
    if not bins:
        return features.new_zeros(rois, features.shape[1], bins_y, bins_x)
    return torch.stack(bins).unflatten(0, (rois, bins_y, bins_x)).permute(0, 3, 1, 2)
