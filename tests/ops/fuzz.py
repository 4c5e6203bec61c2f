"""Random calls of the operators against the oracle and torchvision: python -m tests.ops.fuzz [calls] [first seed] [halves]

Every knob, tiny maps of every shape, boxes of every kind: ordinary, without area, reversed, huge, beyond each edge, NaN. With `halves`
their edges are integers and half-integers, which put samples exactly on borders and on cells. A call must equal the oracle, output and
gradients by name, and torchvision where it has the operator, or refuse an invalid box. A call that does neither is reported with its seed.
To repeat it: python -m tests.ops.fuzz 1 SEED [halves]
"""

import random
import sys
from functools import cache, partial

import torch
import torchvision
from torch import Tensor
from tqdm import trange

from roi_quantization import ops

from .presets import preset as load_preset
from .test_against_reference import assert_same, oracle, results

preset = cache(load_preset)


def random_operator(draw: random.Random) -> partial:
    kind = draw.random()
    if kind < 0.15:
        return partial(ops.prroi_pool, half_pixel=draw.random() < 0.5)
    if kind < 0.25:
        return preset("pool")
    if kind < 0.45:
        return preset("align", half_pixel=draw.random() < 0.5, sampling_ratio=draw.choice([0, 1, 2, 3, 20]))
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


def torchvision_operator(operator: partial) -> partial | None:
    """Torchvision's operator for the same computation; None where it has none."""
    knobs = operator.keywords
    if knobs == preset("pool").keywords:
        return partial(torchvision.ops.roi_pool)
    if knobs == preset("align", half_pixel=knobs["half_pixel"], sampling_ratio=knobs.get("sampling_ratio")).keywords:
        return partial(torchvision.ops.roi_align, sampling_ratio=knobs["sampling_ratio"], aligned=knobs["half_pixel"])
    return None


def random_box(draw: random.Random, width: float, height: float) -> list[float]:
    x1, x2 = (draw.uniform(-0.3 * width, 1.3 * width) for _ in range(2))
    y1, y2 = (draw.uniform(-0.3 * height, 1.3 * height) for _ in range(2))
    kind = draw.choice(["ordinary", "ordinary", "reversed", "thin", "empty", "huge", "beyond", "not finite"])
    if kind not in ("reversed", "not finite"):
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
    if kind == "not finite":
        box[draw.randrange(4)] = draw.choice([float("nan"), float("inf"), -float("inf")])
    return box


def random_call(seed: int, halves: bool = False) -> tuple[partial, Tensor, Tensor, tuple[int, int], float]:
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
    if halves:
        table[:, 1:] = (2 * table[:, 1:]).round() / 2
    return operator, features, table, (draw.randint(1, 4), draw.randint(1, 4)), scale


def check(seed: int, halves: bool = False) -> str:
    """Make one call and compare it. Returns `equal` (to the oracle), `equal to torchvision` (and to the oracle) or `refused`."""
    operator, features, boxes, output_size, scale = random_call(seed, halves)
    if not bool(boxes.isfinite().all() & (boxes[:, 0] < len(features)).all()):
        try:
            operator(features, boxes, output_size, scale)
        except ValueError as error:
            if "boxes: box " in str(error):
                return "refused"
            raise
        raise AssertionError("an invalid box was not refused")
    exact = operator.keywords.get("quantize_bins", "none") == operator.keywords.get("quantize_roi", "none") == "none"
    extent = (boxes[:, 3:] - boxes[:, 1:3]).abs() * scale
    # a slope is a difference by a distance: next to nothing over next to nothing, or across 1e20 cells, has no digits to compare
    args = features, boxes, output_size, scale, exact and bool(((extent == 0) | ((extent > 0.01) & (extent < 1e4))).all())
    if halves:  # a sample on a cell's centre has two slopes
        args = *args[:4], False
    found, wanted = results(operator, *args), results(partial(oracle, operator), *args)
    assert_same(found, wanted, rtol=1e-7, atol=1e-8)
    theirs = torchvision_operator(operator)
    # torchvision visits every sample of a huge box, or more than an integer can count, and breaks off at one reversed along both axes
    if theirs is None or (extent > 1e4).any() or (boxes[:, 1:].abs() > 1e6).any() or (boxes[:, 3:] < boxes[:, 1:3]).any():
        return "equal"
    args = *args[:4], False
    assert_same(results(operator, *args), results(theirs, *args), rtol=1e-7, atol=1e-8)
    return "equal to torchvision"


def main() -> None:
    numbers, halves = [int(a) for a in sys.argv[1:] if a != "halves"], "halves" in sys.argv
    calls, first = numbers + [1000, 0][len(numbers) :]
    torch.set_num_threads(1)
    counts = dict.fromkeys(["equal", "equal to torchvision", "refused"], 0)
    progress = trange(first, first + calls, unit="call", mininterval=10)
    for seed in progress:
        try:
            counts[check(seed, halves)] += 1
        except Exception as error:
            operator, features, boxes, *rest = random_call(seed, halves)
            progress.write(f"seed {seed}: {operator} of {tuple(features.shape)}, {boxes.tolist()}, {rest}\n{error}\n")
            counts[type(error).__name__] = counts.get(type(error).__name__, 0) + 1
    print(f"{calls} calls: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    sys.exit(int(len(counts) > 3))


if __name__ == "__main__":
    main()
