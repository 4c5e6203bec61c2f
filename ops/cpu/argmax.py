"""Torchvision's form of which cell a RoIPool bin took: its index in the map, where `max.py` keeps the number of a sample in its bin."""

from roi_quantization.ops.cpu.loops import compile_kernel


@compile_kernel
def cells_of_winners(winners, y_first, x_first, x_count, width, cells, c0, c1):
    """`winners` as `max_forward` leaves them -> `cells [K, C, bins]`: `row * width + column`, and -1 where a bin is empty."""
    rois, bins_y, bins_x, channels = cells.shape[0], y_first.shape[1], x_first.shape[1], c1 - c0
    bins = bins_y * bins_x
    block = winners[c0 * rois * bins : c1 * rois * bins].reshape((rois, bins, channels))
    for k in range(rois):
        for c in range(channels):
            for p in range(bins_y):
                for q in range(bins_x):
                    winner = block[k, p * bins_x + q, c]
                    if winner < 0:
                        cell = -1
                    else:
                        row, column = y_first[k, p] + winner // x_count[k, q], x_first[k, q] + winner % x_count[k, q]
                        cell = row * width + column
                    cells[k, c0 + c, p * bins_x + q] = cell


@compile_kernel
def scatter_to_cells(grad, cells, image, grad_features, c0, c1):
    """Add each bin's gradient `[K, C, bins]` to its cell of `grad_features [N, C, H * W]`, RoI after RoI."""
    for n in range(grad_features.shape[0]):
        for c in range(c0, c1):
            grad_features[n, c, :] = 0
    for k in range(len(image)):
        n = image[k]
        for c in range(c0, c1):
            for b in range(cells.shape[2]):
                if cells[k, c, b] >= 0:
                    grad_features[n, c, cells[k, c, b]] += grad[k, c, b]
