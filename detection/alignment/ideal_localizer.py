"""The best box that a head can regress from what a RoI operator samples.

A head regresses an object's box relative to the RoI, but it sees the region that the operator sampled and not the RoI.
RoIs that have the same sampled region form a class that no training can tell apart. The ideal localizer knows the region
and, exactly, where the object lies relative to it. Its best regression target is the mean over the class. The difference
between its box and the object is the error that quantization makes unavoidable. RoIAlign has none: every class has one
RoI. A constant shift of the region has none either, as the head learns it. docs/predicted_cost.md derives the formulas.
"""

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d

from roi_quantization.detection.alignment.misalignment import Operator, sampled_bins

STEPS = 32  # of a RoI's position and size per cell
SMOOTHING = 0.1  # of the RoIs' sizes: the standard deviation of their logarithm. The head cannot tell sizes 10 % apart
_MARGIN = 8.0  # cells that classes reach beyond the largest RoI, at least: floored bins have classes of up to 7
_OFFSET = 64  # cells from the border of an unlimited map, so that nothing is clamped


class IdealLocalizer:
    """The ideal localizer of one operator, on feature maps so large that RoIs do not reach the border.

    The axes are independent. Along each the classes are found on a lattice of positions within a cell and sizes.

    Args:
        operator: see `misalignment.lattice_rule`.
        sizes: widths and heights of the RoIs in cells, `[N]`. Their smoothed distribution weights the RoIs of a class.
        output_size: bins per side.

    Raises:
        TypeError: an operator that is not of this project.
    """

    def __init__(self, operator: Operator, sizes: np.ndarray, output_size: int = 7):
        fraction = (np.arange(STEPS) + 0.5) / STEPS
        size = (np.arange(int((max(sizes) + _MARGIN) * STEPS)) + 0.5) / STEPS
        start, size = (grid.ravel() for grid in np.meshgrid(fraction, size, indexing="ij"))
        low = torch.from_numpy(start + _OFFSET)
        bins = sampled_bins(operator, low, low + torch.from_numpy(size), output_size)
        edges = torch.cat([bins.low, bins.high], dim=1).numpy() - _OFFSET
        first, end = np.nan_to_num(edges, nan=np.inf).min(axis=1), np.nan_to_num(edges, nan=-np.inf).max(axis=1)
        is_empty = end - first < 1e-3  # no samples, or all at one point: nothing shows where the object is
        origin = np.floor(first + 1e-3, where=~is_empty, out=np.zeros(len(edges)))  # float32 may be a little below a whole cell
        classes = _classes(edges - origin[:, None])  # the head does not see by how many whole cells a region is moved
        weight = _density(sizes, size)
        total = np.bincount(classes, weight)
        # a target is linear in 1 / size, centre / size and log(size) of the RoI, so these three means determine its mean
        terms = (1 / size, (start - origin) / size + 0.5, np.log(size))
        deviations = [(np.bincount(classes, weight * term) / total)[classes] - term for term in terms]
        self._deviations = np.stack([*deviations, origin]).reshape(4, STEPS, -1)
        self._is_empty = is_empty.reshape(STEPS, -1)

    @property
    def is_exact(self) -> bool:
        """Whether no two RoIs have the same sampled region, so that the ideal localizer makes no error."""
        return not self._is_empty.any() and float(np.abs(self._deviations[:3]).max()) < 1e-6

    def localize(self, rois: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes that the ideal localizer regresses for objects.

        Args:
            rois: `[N, 4]`, `(x1, y1, x2, y2)` in cells, with positive sides.
            objects: `[N, 4]`, the box to regress from each.

        Returns:
            `[N, 4]` boxes in cells, and a mask `[N]` of RoIs whose region has no extent, whose boxes mean nothing.
        """
        boxes, is_empty = np.empty_like(objects, dtype=np.float64), np.zeros(len(rois), dtype=bool)
        for axis in (0, 1):
            start, size = rois[:, axis], rois[:, axis + 2] - rois[:, axis]
            cell = np.floor(start)
            place = ((start - cell) * STEPS).astype(int).clip(0, STEPS - 1), (size * STEPS).astype(int).clip(0, self._is_empty.shape[1] - 1)
            reciprocal, centre, logarithm, origin = self._deviations[:, *place]
            origin = cell + origin  # of the sampled region
            roi_centre = start + size / 2 - origin
            object_centre = (objects[:, axis] + objects[:, axis + 2]) / 2 - origin
            target = object_centre * (1 / size + reciprocal) - (roi_centre / size + centre)  # mean of (object - RoI) / size
            regressed = origin + roi_centre + size * target
            half = (objects[:, axis + 2] - objects[:, axis]) / 2 * np.exp(-logarithm)
            boxes[:, axis], boxes[:, axis + 2] = regressed - half, regressed + half
            is_empty |= self._is_empty[place]
        return boxes, is_empty


def _classes(edges: np.ndarray) -> np.ndarray:
    """Number the rows `[N, 2P]` so that equal rows, to a thousandth of a cell, have equal numbers."""
    rows = np.nan_to_num(edges * 1000, nan=1e9).round().astype(np.int64)
    factors = np.random.default_rng(0).integers(-(2**62), 2**62, rows.shape[1], dtype=np.int64) | 1
    return np.unique((rows * factors).sum(axis=1), return_inverse=True)[1]  # a hash: sorting whole rows takes ten times as long


def _density(sizes: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the smoothed density of the sizes, per cell, at the sizes `at`."""
    step = SMOOTHING / 16
    logs = np.log(sizes)
    grid = np.arange(min(logs.min(), np.log(at.min())) - step, max(logs.max(), np.log(at.max())) + 2 * step, step)
    counts = np.histogram(logs, bins=grid)[0].astype(float)
    smooth = gaussian_filter1d(counts, SMOOTHING / step, mode="constant", truncate=8)
    return np.interp(np.log(at), (grid[:-1] + grid[1:]) / 2, smooth) / at + 1e-12
