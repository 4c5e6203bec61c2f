"""The oracle: slow, obvious, float64. Every fast path is held against it, output and gradients.

One Python loop for each RoI, bin and sample; autograd gives the gradients. It takes the same lattices as the kernels, so what it settles
is the visiting and the reducing; the lattices themselves are held against torchvision and numbers worked out by hand.
"""

import torch
from torch import Tensor

from roi_quantization.ops.geometry import Axis, Bounds


def lattice_pool(features: Tensor, image: Tensor, y: Axis, x: Axis, reduce: str) -> Tensor:
    """Reduce each bin's samples by their `mean` or `max`. `features [N, C, H, W]`, `image [K]` -> `[K, C, P, P]` float64."""
    features = features.double()
    rows = [
        torch.stack([_bin(features[image[k]], y, x, k, p, q, reduce) for p in range(y.first.shape[1]) for q in range(x.first.shape[1])])
        for k in range(len(image))
    ]
    return _stack(rows, features, y.first.shape[1], x.first.shape[1])


def _bin(feature: Tensor, y: Axis, x: Axis, k: int, p: int, q: int, reduce: str) -> Tensor:
    samples = [
        _interpolate(feature, y.first[k, p].double() + i * y.step[k, p].double(), x.first[k, q].double() + j * x.step[k, q].double())
        for i in range(int(y.visited[k, p]))
        for j in range(int(x.visited[k, q]))
    ]
    zero = feature.new_zeros(feature.shape[0])
    total = float(y.total[k, p]) * float(x.total[k, q])
    if reduce == "mean":
        return sum(samples, zero) / max(total, 1.0)
    largest = zero if len(samples) < total or not samples else samples.pop(0)  # a sample off the map has the value 0
    for sample in samples:
        largest = torch.where(sample > largest, sample, largest)  # the first of equal ones wins, and takes the gradient
    return largest


def _interpolate(feature: Tensor, y: Tensor, x: Tensor) -> Tensor:
    height, width = feature.shape[1:]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = int(y.floor()), int(x.floor())
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, h = y - top, x - left
    return (
        (1 - v) * (1 - h) * feature[:, top, left]
        + (1 - v) * h * feature[:, top, right]
        + v * (1 - h) * feature[:, bottom, left]
        + v * h * feature[:, bottom, right]
    )


def integral_pool(features: Tensor, image: Tensor, y: Bounds, x: Bounds) -> Tensor:
    """The integral of the interpolated map (0 off the map) over each bin, by the bin's area. -> `[K, C, P, P]` float64."""
    features = features.double()
    height, width = features.shape[2:]
    rows = []
    for k in range(len(image)):
        bins = []
        for p in range(y.low.shape[1]):
            for q in range(x.low.shape[1]):
                (top, bottom), (left, right) = (y.low[k, p], y.high[k, p]), (x.low[k, q], x.high[k, q])
                area = (bottom - top) * (right - left)
                value = features.new_zeros(features.shape[1])
                if area > 0:
                    of_rows = torch.stack([_hat_integral(top - i, bottom - i) for i in range(height)])
                    of_columns = torch.stack([_hat_integral(left - j, right - j) for j in range(width)])
                    value = (features[image[k]] * of_rows[:, None] * of_columns).sum((1, 2)) / area
                bins.append(value)
        rows.append(torch.stack(bins))
    return _stack(rows, features, y.low.shape[1], x.low.shape[1])


def _hat_integral(a: Tensor, b: Tensor) -> Tensor:
    """Integral of `max(0, 1 - |t|)` from a to b."""
    a, b = a.double().clamp(-1, 1), b.double().clamp(-1, 1)
    return (b - b * b.abs() / 2) - (a - a * a.abs() / 2)


def _stack(rows: list[Tensor], features: Tensor, height: int, width: int) -> Tensor:
    if not rows:
        return features.new_zeros(0, features.shape[1], height, width)
    return torch.stack(rows).unflatten(1, (height, width)).permute(0, 3, 1, 2)
