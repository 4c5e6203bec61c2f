"""The operators in plain PyTorch: any device, any floating dtype, any order of differentiation. What runs where no kernel is written.

The i-th sample of every bin is visited at once: memory holds a few tensors of the size of the output, and time grows with the largest bin.
"""

import torch
from torch import Tensor

from roi_quantization.ops.geometry import Axis, Bounds


def lattice_pool(features: Tensor, image: Tensor, y: Axis, x: Axis, reduce: str) -> Tensor:
    """Reduce each bin's samples by their `mean` or `max`. `features [N, C, H, W]`, `image [K]` -> `[K, C, P, P]` in float32 or float64."""
    accumulate = torch.promote_types(features.dtype, torch.float32)
    bins = (len(image), features.shape[1], y.first.shape[1], x.first.shape[1])
    invalid = _either(y.first.isnan(), x.first.isnan())
    out = torch.zeros(bins, dtype=accumulate, device=features.device)
    if out.numel() == 0:
        return out + features.sum() * 0  # a gradient of zeros, not none
    rows = features.permute(0, 2, 3, 1)
    total = y.total[:, :, None] * x.total[:, None, :]
    count = (y.visited[:, :, None] * x.visited[:, None, :])[:, None]
    if reduce == "max":  # a sample off the map has the value 0, and so has a bin without samples
        out = out.masked_fill((count >= total[:, None]) & (count > 0), -torch.inf)
    for i in range(int(y.visited.max())):
        top, bottom, v = _taps(y, i, features.shape[2])
        for j in range(int(x.visited.max())):
            left, right, h = _taps(x, j, features.shape[3])
            sample = _interpolate(rows, image, top, bottom, v, left, right, h)
            visited = ((i < y.visited)[:, :, None] & (j < x.visited)[:, None, :])[:, None]
            if reduce == "mean":
                out = out + torch.where(visited, sample, 0)
            else:
                out = torch.where(visited & ((sample > out) | sample.isnan()), sample, out)
    if reduce == "mean":
        out = out / total.clamp(min=1)[:, None].to(accumulate)
    return torch.where(invalid, torch.nan, out)


def _either(of_y: Tensor, of_x: Tensor) -> Tensor:
    """Whether it holds of a bin along one of the axes, `[K, 1, P, P]`."""
    return (of_y[:, :, None] | of_x[:, None, :])[:, None]


def _taps(axis: Axis, i: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    position = (axis.first + i * axis.step).clamp(0, size - 1)
    # A gradient of 0 times a weight that is NaN would be NaN, for other boxes too: what has no position reads cell 0, and counts nowhere.
    position = torch.where(position.isnan(), 0, position)
    at = position.detach()
    low = at.floor()
    # A sample on a cell's centre is that cell alone (infinity beside it does no harm), unless its slope towards the next is asked for.
    high = low + 1 if position.requires_grad else at.ceil()
    return low.long(), high.clamp(max=size - 1).long(), position - low


def _interpolate(rows: Tensor, image: Tensor, top: Tensor, bottom: Tensor, v: Tensor, left: Tensor, right: Tensor, h: Tensor) -> Tensor:
    n = image[:, None, None]
    top, bottom, v = (t[:, :, None] for t in (top, bottom, v))
    left, right, h = (t[:, None, :] for t in (left, right, h))
    v, h = v[..., None], h[..., None]
    upper = rows[n, top, left] * (1 - h) + rows[n, top, right] * h
    lower = rows[n, bottom, left] * (1 - h) + rows[n, bottom, right] * h
    return (upper * (1 - v) + lower * v).permute(0, 3, 1, 2)


def integral_pool(features: Tensor, image: Tensor, y: Bounds, x: Bounds) -> Tensor:
    """The integral of the interpolated map (0 off the map) over each bin, by the bin's area. -> `[K, C, P, P]` in float32 or float64."""
    accumulate = torch.promote_types(features.dtype, torch.float32)
    invalid = _either(*((b.high - b.low).isnan() for b in (y, x)))
    wy, wx = (_integral_weights(b, size).to(accumulate) for b, size in zip((y, x), features.shape[2:], strict=True))
    out = torch.zeros(len(image), features.shape[1], wy.shape[1], wx.shape[1], dtype=accumulate, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        for n, feature in enumerate(features.to(accumulate)):  # by image, so that no RoI gets a map of its own
            mine = (image == n).nonzero()[:, 0]
            out = out.index_copy(0, mine, torch.einsum("kpi,kqj,cij->kcpq", wy[mine], wx[mine], feature))
    return torch.where(invalid, torch.nan, out)


def _integral_weights(bounds: Bounds, size: int) -> Tensor:
    """Share of each cell in the mean over each bin, `[K, P, size]`."""
    cells = torch.arange(size, dtype=bounds.low.dtype, device=bounds.low.device)
    is_valid = ~(bounds.high - bounds.low).isnan()  # else a weight of 0, as of NaN positions in `_taps`
    bounds = Bounds(*(torch.where(is_valid, edge, 0) for edge in bounds))
    low, high = ((edge[..., None] - cells).clamp(-1, 1) for edge in bounds)
    # two forms of one integral: on one side of the cell's centre no digits may cancel, or a thin bin would have none left
    one_side, across = (high - low) * (1 - (low + high).abs() / 2), high - low - (low * low + high * high) / 2
    integral = torch.where(low * high >= 0, one_side, across)
    extent = (bounds.high - bounds.low)[..., None]
    return torch.where(extent > 0, integral / torch.where(extent > 0, extent, 1), 0)
