"""Triton kernels of the gradient of the features for a maximum: each bin adds to the cells of its winner, in integers.

Additions of floating point numbers depend on their order, which atomics leave to chance. Those of integers do not: every run has the same
bits, and so has every order of the RoIs. The unit is a power of two, `2 ** -shift`, for which no sum can overflow 64 bits: a bin gives a
cell its gradient times a weight of 1 at most, so that `bins * max(|grad|) * 2 ** shift < 2 ** 62`, where `bins` are those of all RoIs.
A contribution is truncated to whole units, so that a cell with `n` contributions is wrong by `n` units at most, before it is rounded to the
dtype: less than `n * bins * max(|grad|) * 2 ** -60`. For 1024 RoIs of 7 x 7 bins that is `n * max(|grad|) * 2 ** -44`.
"""

import triton
import triton.language as tl

from roi_quantization.ops.cuda.lattice import tap


@triton.jit(do_not_specialize=["rois", "sums_size"])
def clear_and_find_largest(
    grad, y_first, x_first, largest, sums, rois, roi_size, sums_size, bins_y: tl.constexpr, bins_x: tl.constexpr, SIZE: tl.constexpr
):
    """Zeros to `sums`, and to `largest [programs]` the largest gradients of valid boxes; infinity where one is not finite.

    A program without a RoI, of a large map, has 0.
    """
    programs = tl.num_programs(0)
    for start in range(tl.program_id(0).to(tl.int64) * SIZE, sums_size, programs * SIZE):
        at = start + tl.arange(0, SIZE)
        tl.store(sums + at, tl.zeros((SIZE,), tl.int64), at < sums_size)
    found = tl.zeros((SIZE,), tl.float32)
    for r in range(tl.program_id(0), rois, programs):
        k = tl.cast(r, tl.int64)
        corner = tl.load(y_first + k * bins_y) + tl.load(x_first + k * bins_x)
        if corner == corner:
            for first in range(0, roi_size, SIZE):
                of_roi = first + tl.arange(0, SIZE)
                g = tl.abs(tl.load(grad + k * roi_size + of_roi, of_roi < roi_size, 0.0).to(tl.float32))
                found = tl.maximum(found, tl.where(g == g, g, float("inf")))
    tl.store(largest + tl.program_id(0), tl.max(found, 0))


@triton.jit
def power_of_two(exponent):
    """`2 ** exponent` in float32, for an exponent of a normal number."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def shift_of(largest, programs, log_bins, MOST_PROGRAMS: tl.constexpr):
    """The largest gradient, and the exponent of the unit's reciprocal in two parts: one alone may have no float32."""
    program = tl.arange(0, MOST_PROGRAMS)
    most = tl.max(tl.load(largest + program, program < programs, 0.0), 0)
    exponent = (most.to(tl.int32, bitcast=True) >> 23) - 127  # most < 2 ** (exponent + 1)
    shift = 61 - log_bins - exponent
    return most, shift // 2, shift - shift // 2


@triton.jit
def add(sums, value, scale, rest, mask):
    tl.atomic_add(sums, (value * scale * rest).to(tl.int64), mask & (value != 0), sem="relaxed")


@triton.jit(do_not_specialize=["programs", "c0", "channels_of_sums", "height", "width", "log_bins"])
def scatter_max(
    grad, winners, image, y_first, y_step, x_first, x_step, x_count, largest, sums,
    programs, c0, channels, channels_of_sums, height, width, log_bins, bins_y: tl.constexpr, bins_x: tl.constexpr,
    CELLS: tl.constexpr, MOST_PROGRAMS: tl.constexpr, BINS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Add each bin's gradient to the cells of its winner, into `sums [N, channels_of_sums, H, W]`, which begins with channel `c0`."""
    k = tl.program_id(0).to(tl.int64)
    bins: tl.constexpr = bins_y * bins_x
    b = tl.program_id(1) * BINS + tl.arange(0, BINS)
    p, q = k * bins_y + b // bins_x, k * bins_x + b % bins_x
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    mask = ((c < channels_of_sums) & (c0 + c < channels))[:, None] & (b < bins)[None, :]
    most, half, other_half = shift_of(largest, programs, log_bins, MOST_PROGRAMS)
    if (most > 0) & (most < float("inf")):
        scale, rest = power_of_two(half), power_of_two(other_half)
        of_bins = k * channels * bins + c0.to(tl.int64) * bins
        at = c.to(OFFSET)[:, None] * bins + b[None, :]
        winner = tl.load(winners + of_bins + at, mask, -1).to(tl.int32)
        has_winner = mask & (winner >= 0)
        g = tl.load(grad + of_bins + at, has_winner, 0.0).to(tl.float32)
        first_y, first_x = tl.load(y_first + p, b < bins, 0.0)[None, :], tl.load(x_first + q, b < bins, 0.0)[None, :]
        count = tl.load(x_count + q, b < bins, 1)[None, :]
        # a quotient of integers by way of float32: half a sample from the next whole number, it cannot be rounded across one
        i = ((winner.to(tl.float32) + 0.5) * (1.0 / tl.maximum(count, 1).to(tl.float32))).to(tl.int32)
        i = tl.where(winner < 2**20, i, winner // tl.maximum(count, 1))
        j = winner - i * count
        cells = sums + tl.load(image + k) * channels_of_sums * height * width
        of_channel = c.to(OFFSET)[:, None] * height * width
        if CELLS:
            cell = (first_y.to(tl.int32) + i).to(OFFSET) * width + (first_x.to(tl.int32) + j)
            add(cells + (of_channel + cell), g, scale, rest, has_winner)
        else:
            step_y, step_x = tl.load(y_step + p, b < bins, 0.0)[None, :], tl.load(x_step + q, b < bins, 0.0)[None, :]
            top, more_y, of_bottom = tap(first_y, step_y, i, height)
            left, more_x, of_right = tap(first_x, step_x, j, width)
            upper = cells + (of_channel + top.to(OFFSET) * width + left)
            lower = upper + more_y * width
            add(upper, g * ((1 - of_bottom) * (1 - of_right)), scale, rest, has_winner)
            add(upper + more_x, g * ((1 - of_bottom) * of_right), scale, rest, has_winner)
            add(lower, g * (of_bottom * (1 - of_right)), scale, rest, has_winner)
            add(lower + more_x, g * (of_bottom * of_right), scale, rest, has_winner)


@triton.jit(do_not_specialize=["programs", "c0", "channels_of_sums", "height", "width", "log_bins"])
def write_sums(
    largest, sums, out, programs, c0, channels, channels_of_sums, height, width, stride_n, stride_c, stride_y, stride_x, log_bins,
    MOST_PROGRAMS: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The sums in the dtype and layout of the gradient, NaN if a gradient was not finite. Leaves zeros in their place."""
    n = tl.program_id(2).to(tl.int64)
    cell = (tl.program_id(0) * CELLS + tl.arange(0, CELLS))[None, :]
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    mask = (cell < height * width) & (c < channels_of_sums) & (c0 + c < channels)
    most, half, other_half = shift_of(largest, programs, log_bins, MOST_PROGRAMS)
    at = sums + n * channels_of_sums * height * width + (c.to(OFFSET) * height * width + cell)
    value = tl.load(at, mask, 0).to(tl.float32) * power_of_two(-half) * power_of_two(-other_half)
    tl.store(at, tl.zeros_like(value).to(tl.int64), mask)
    value = tl.where(most < float("inf"), value, float("nan"))
    y, x = cell // width, cell % width
    target = n * stride_n + (c0 + c).to(OFFSET) * stride_c + (y.to(OFFSET) * stride_y + x.to(OFFSET) * stride_x)
    tl.store(out + target, value.to(out.dtype.element_ty), mask)
