"""`ops/geometry.py` as one Triton kernel, the rule a compile-time argument: what some seventy operations of PyTorch would compute.

Not a second definition: `tests/ops/test_cuda_geometry.py` holds every number to the bits of `ops/geometry.py`, and a change is made there
first. Quotients are rounded correctly, and multiply and add are never fused.
"""

import triton
import triton.language as tl


@triton.jit
def at_least(x, low):
    """The larger of both; NaN stays NaN."""
    return tl.where(x < low, low, x)


@triton.jit
def project(x, scale, offset, QUANTIZE_ROI: tl.constexpr):
    """`LatticeRule._project`."""
    edge = x * scale
    if QUANTIZE_ROI == "floor":
        edge = tl.floor(edge) + (edge - edge)
    elif QUANTIZE_ROI == "round":
        size = tl.abs(edge)
        whole = tl.floor(size)
        rounded = tl.where(size - whole >= 0.5, whole + 1, whole)
        edge = tl.where(edge < 0, -rounded, rounded) + (edge - edge)
    return edge - offset


@triton.jit
def position(start, size, ratio, i, sample_offset):
    """`LatticeRule._position`."""
    return start + tl.div_rn((i + sample_offset) * size, at_least(ratio, 1.0))


@triton.jit
def sample(start, size, ratio, low, high, sample_offset, most, RATIO: tl.constexpr, TESTED: tl.constexpr):
    """`LatticeRule._visited`: samples before the first on the map, and how many are on it."""
    if TESTED:
        visited = tl.zeros_like(start).to(tl.int32)
        skipped = tl.zeros_like(start)
        for i in tl.static_range(RATIO):
            at = position(start, size, ratio, i * 1.0, sample_offset)
            on_map = (at >= low) & (at <= high)
            skipped = tl.where(on_map & (visited == 0), i * 1.0, skipped)
            visited += on_map.to(tl.int32)
        return skipped, visited
    else:
        infinity = float("inf")
        near, far = tl.where(size < 0, high, low), tl.where(size < 0, low, high)
        skipped = tl.div_rn((near - start) * ratio, size) - sample_offset
        skipped = at_least(tl.ceil(tl.where(skipped == skipped, skipped, -infinity)), 0.0)
        skipped = tl.where(skipped > ratio, ratio, skipped)
        last = tl.div_rn((far - start) * ratio, size) - sample_offset
        last = at_least(tl.floor(tl.where(last == last, last, infinity)), -1.0)
        last = tl.where(last > ratio - 1, ratio - 1, last)
        at = position(start, size, ratio, skipped - 1, sample_offset)
        before = (at >= low) & (at <= high) & (skipped > 0)
        at = position(start, size, ratio, skipped, sample_offset)
        first = (at >= low) & (at <= high)
        at = position(start, size, ratio, last, sample_offset)
        end = (at >= low) & (at <= high)
        at = position(start, size, ratio, last + 1, sample_offset)
        after = (at >= low) & (at <= high) & (last + 1 < ratio)
        late = tl.where(first, 0.0, tl.where(skipped < ratio, 1.0, 0.0))
        skipped = at_least(skipped - tl.where(before, 1.0, 0.0) + late, 0.0)
        last = last - tl.where(end, 0.0, tl.where(last >= 0, 1.0, 0.0)) + tl.where(after, 1.0, 0.0)
        count = at_least(last - skipped + 1, 0.0)
        count = tl.where(count == count, count, 0.0)
        return skipped, tl.where(count > most, most * 1.0, count).to(tl.int32)


@triton.jit
def on_map(cell, size):
    """To `[0, size]`; NaN stays NaN."""
    return tl.where(cell < 0, 0.0, tl.where(cell > size, size * 1.0, cell))


@triton.jit(do_not_specialize=["rois", "images", "size_y", "size_x", "most_y", "most_x"])
def place(
    image, box, image_out, y, y_count, x, x_count,
    rois, image_stride, box_stride, edge_stride, images, size_y, size_x, most_y, most_x,
    scale, min_extent, sample_offset, low, high_y, high_x, bins_y: tl.constexpr, bins_x: tl.constexpr,
    INTEGRAL: tl.constexpr, QUANTIZE_ROI: tl.constexpr, INCLUSIVE_END: tl.constexpr, HALF_PIXEL: tl.constexpr,
    HAS_MIN_EXTENT: tl.constexpr, QUANTIZE_BINS: tl.constexpr, RATIO: tl.constexpr, TESTED: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """`mask_invalid_boxes` and `rule.axis`: into `y [3, K, bins_y]` first, step and total (of an integral `[2, ...]` edges)."""
    is_x = tl.program_id(1)
    if is_x == 0:
        out, counts, size, most, high = y, y_count, size_y, most_y, high_y
        bins = bins_y * 1
    else:
        out, counts, size, most, high = x, x_count, size_x, most_x, high_x
        bins = bins_x * 1
    at = tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS)
    exists = at < rois.to(tl.int64) * bins
    k, p = at // bins, (at % bins).to(tl.float32)
    n = tl.load(image + k * image_stride, exists, 0)
    edges = box + k * box_stride
    x1, y1 = tl.load(edges, exists, 0.0), tl.load(edges + edge_stride, exists, 0.0)
    x2, y2 = tl.load(edges + 2 * edge_stride, exists, 0.0), tl.load(edges + 3 * edge_stride, exists, 0.0)
    infinity = float("inf")
    is_valid = (tl.abs(x1) < infinity) & (tl.abs(y1) < infinity) & (tl.abs(x2) < infinity) & (tl.abs(y2) < infinity)
    is_valid = is_valid & (n > -1) & (n < images)
    tl.store(image_out + k, tl.where(is_valid, n, 0).to(tl.int64), exists & (p == 0) & (is_x == 0))
    start = tl.where(is_valid, tl.where(is_x == 0, y1, x1), float("nan"))
    end = tl.where(is_valid, tl.where(is_x == 0, y2, x2), float("nan"))
    plane = rois.to(tl.int64) * 4 * bins  # as `empty_planes` has them
    if INTEGRAL:
        bin_size = tl.div_rn(at_least((end - start) * scale, 0.0), bins.to(tl.float32))
        first = (start * scale - (0.5 if HALF_PIXEL else 0.0)) + p * bin_size
        tl.store(out + at, first, exists)
        tl.store(out + plane + at, first + bin_size, exists)
    else:
        offset: tl.constexpr = 0.5 if HALF_PIXEL and QUANTIZE_BINS == "none" else 0.0
        start, end = project(start, scale, offset, QUANTIZE_ROI), project(end, scale, offset, QUANTIZE_ROI)
        extent = (end - start) + (1.0 if INCLUSIVE_END else 0.0)
        if HAS_MIN_EXTENT:
            extent = at_least(extent, min_extent)
        bin_size = tl.div_rn(extent, bins.to(tl.float32))
        if QUANTIZE_BINS == "none":
            ratio = at_least(tl.ceil(bin_size), 0.0) if RATIO <= 0 else tl.full((BINS,), RATIO, tl.float32)
            bin_start = start + p * bin_size
            skipped, count = sample(bin_start, bin_size, ratio, low, high, sample_offset, most, RATIO, TESTED)
            first = position(bin_start, bin_size, ratio, skipped, sample_offset)
            step, total = tl.div_rn(bin_size, at_least(ratio, 1.0)), ratio
        else:
            whole = tl.floor(start)
            rest = start - whole
            if QUANTIZE_BINS == "cover":
                begin, stop = tl.floor(rest + p * bin_size), tl.ceil(rest + (p + 1) * bin_size)
            else:
                cells = at_least(tl.floor(bin_size), 1.0)
                begin, stop = p * cells, (p + 1) * cells
            first, stop = on_map(begin + whole, size), on_map(stop + whole, size)
            step, total = tl.full((BINS,), 1.0, tl.float32), at_least(stop - first, 0.0)
            count = tl.where(total == total, total, 0.0).to(tl.int32)
        is_good = (first == first) & (step == step)
        tl.store(out + at, tl.where(is_good, first, float("nan")), exists)
        tl.store(out + plane + at, tl.where(is_good, step, 0.0), exists)
        tl.store(out + 2 * plane + at, tl.where(is_good, total, 1.0), exists)
        tl.store(counts + at, tl.where(is_good, count, 1), exists)
