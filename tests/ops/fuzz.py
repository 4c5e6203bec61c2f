"""Random calls of the operators against the oracle: python -m tests.ops.fuzz [calls] [first seed]

Every knob, tiny maps of every shape, boxes of every kind: ordinary, without area, reversed, huge, beyond each edge, not a number. A call
must equal the oracle, output and gradients by name, or refuse a box that is no box. A call that does neither is told with its seed, which
makes it again: python -m tests.ops.fuzz 1 SEED
"""

import random
import sys
from functools import partial

import torch
from torch import Tensor
from tqdm import trange

from roi_quantization import ops

from .test_against_reference import assert_same, oracle, results


def random_operator(draw: random.Random) -> partial:
    if draw.random() < 0.15:
        return partial(ops.prroi_pool, half_pixel=draw.random() < 0.5)
    return partial(
        ops.lattice_pool,
        quantize_roi=draw.choice(["none", "none", "round", "floor"]),
        inclusive_end=draw.random() < 0.3,
        half_pixel=draw.random() < 0.5,
        min_extent=draw.choice([None, None, 0.0, 1.0, 2.5]),
        quantize_bins=draw.choice(["none", "none", "cover", "truncate"]),
        sampling_ratio=draw.choice([-1, 0, 1, 2, 3]),
        sample_offset=draw.choice([0.5, 0.5, 0.0, 0.3]),
        border=draw.choice([1.0, 1.0, 0.5, 0.0]),
        reduce=draw.choice(["mean", "max"]),
    )


def random_box(draw: random.Random, width: float, height: float) -> list[float]:
    x1, x2 = (draw.uniform(-0.3 * width, 1.3 * width) for _ in range(2))
    y1, y2 = (draw.uniform(-0.3 * height, 1.3 * height) for _ in range(2))
    kind = draw.choice(["ordinary", "ordinary", "reversed", "thin", "empty", "huge", "beyond", "no number"])
    if kind not in ("reversed", "no number"):
        x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    if kind == "thin":
        x2 = x1 + draw.uniform(0, 1e-3)
    elif kind == "empty":
        x2, y2 = draw.choice([(x1, y2), (x2, y1), (x1, y1)])
    elif kind == "huge":
        size = 10 ** draw.uniform(2, 20)
        x1, y1, x2, y2 = x1 - size * draw.random(), y1 - size * draw.random(), x2 + size * draw.random(), y2 + size * draw.random()
    elif kind == "beyond":
        dx, dy = draw.choice([-1, 0, 1]) * 5 * width, draw.choice([-1, 0, 1]) * 5 * height
        x1, x2, y1, y2 = x1 + dx, x2 + dx, y1 + dy, y2 + dy
    box = [x1, y1, x2, y2]
    if kind == "no number":
        box[draw.randrange(4)] = draw.choice([float("nan"), float("inf"), -float("inf")])
    return box


def random_call(seed: int) -> tuple[partial, Tensor, Tensor, tuple[int, int], float]:
    draw = random.Random(seed)
    images, channels, height, width = draw.randint(1, 2), draw.randint(1, 3), draw.randint(1, 7), draw.randint(1, 7)
    scale = draw.choice([1 / 16, 1 / 32, 1.0, 0.3])
    boxes = [
        [float(draw.randrange(images + (draw.random() < 0.02))), *random_box(draw, width / scale, height / scale)]
        for _ in range(draw.randint(0, 3))
    ]
    features = torch.randn(images, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    operator = random_operator(draw)
    if operator.keywords.get("quantize_bins", "cover") != "none" and draw.random() < 0.3:
        features = features.round()  # many equals; where samples lie between cells, which of two equals is larger is a matter of rounding
    if draw.random() < 0.5:
        features = features.contiguous(memory_format=torch.channels_last)
    table = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 5)
    return operator, features, table, (draw.randint(1, 4), draw.randint(1, 4)), scale


def check(seed: int) -> str:
    """-> what the call came to: `equal` or `refused`."""
    operator, features, boxes, output_size, scale = random_call(seed)
    if not bool(boxes.isfinite().all() & (boxes[:, 0] < len(features)).all()):
        try:
            operator(features, boxes, output_size, scale)
        except ValueError as error:
            if "boxes: box " in str(error):
                return "refused"
            raise
        raise AssertionError("a box that is no box was not refused")
    exact = operator.keywords.get("quantize_bins", "none") == operator.keywords.get("quantize_roi", "none") == "none"
    extent = (boxes[:, 3:] - boxes[:, 1:3]).abs() * scale
    # a slope is a difference by a distance: next to nothing over next to nothing, or across 1e20 cells, has no digits to compare
    args = features, boxes, output_size, scale, exact and bool(((extent == 0) | ((extent > 0.01) & (extent < 1e4))).all())
    found, wanted = results(operator, *args), results(partial(oracle, operator), *args)
    assert_same(found, wanted, rtol=1e-7, atol=1e-8)
    return "equal"


def main() -> None:
    calls, first = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    counts = {"equal": 0, "refused": 0}
    progress = trange(first, first + calls, unit="call")
    for seed in progress:
        try:
            counts[check(seed)] += 1
        except Exception as error:
            operator, features, boxes, *rest = random_call(seed)
            progress.write(f"seed {seed}: {operator} of {tuple(features.shape)}, {boxes.tolist()}, {rest}\n{error}\n")
            counts[type(error).__name__] = counts.get(type(error).__name__, 0) + 1
    print(f"{calls} calls: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    sys.exit(int(calls > counts["equal"] + counts["refused"]))


if __name__ == "__main__":
    main()
