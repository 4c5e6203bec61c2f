"""How fast are the RoI operators? Ours against torchvision's, in one run, on the same inputs and machine.

    python benchmarks/roi_operators.py                    # the table of the README: 1 x 512 x 38 x 50, 256 RoIs, 7 x 7, float32
    python benchmarks/roi_operators.py --shapes all       # training and testing shapes, fewer channels, stride 32, P = 14
    python benchmarks/roi_operators.py --device cuda --json gpu.json

Times are medians of torch.utils.benchmark, which repeats a call for a second. What torchvision lacks (RoIAlign's `max`, RoIWarp,
PrRoIPool) is held against its RoIAlign of the same shape.
"""

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor
from torch.utils.benchmark import Timer
from tqdm import tqdm

import ops


class Shape(NamedTuple):
    name: str
    features: tuple[int, int, int, int]
    rois: int
    output_size: int
    stride: int


SHAPES = [
    Shape("reference", (1, 512, 38, 50), 256, 7, 16),
    Shape("train 128", (2, 512, 38, 63), 128, 7, 16),
    Shape("train 1024", (2, 512, 38, 63), 1024, 7, 16),
    Shape("test 2000", (1, 512, 38, 63), 2000, 7, 16),
    Shape("C=256", (2, 256, 38, 63), 1024, 7, 16),
    Shape("C=64", (2, 64, 38, 63), 1024, 7, 16),
    Shape("stride 32", (2, 512, 19, 32), 1024, 7, 32),
    Shape("P=14", (2, 512, 38, 63), 128, 14, 16),
]

Operator = Callable[[Tensor, Tensor, int, float], Tensor]


def _align(library, **options) -> Operator:
    return lambda f, b, p, s: library.roi_align(f, b, p, s, 2, True, **options)


THEIR_ALIGN = _align(torchvision.ops)
OPERATORS: dict[str, tuple[Operator, Operator]] = {
    "align": (_align(ops), THEIR_ALIGN),
    "align_max": (_align(ops, reduce="max"), THEIR_ALIGN),
    "warp": (ops.roi_warp, THEIR_ALIGN),
    "prroi": (ops.prroi_pool, THEIR_ALIGN),
    "pool": (ops.roi_pool, torchvision.ops.roi_pool),
}


def inputs(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Features, and boxes as proposals are: from 2 cells to most of the image, inside it."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape.features, generator=generator)
    images, _, height, width = shape.features
    size = torch.tensor([width, height]) * shape.stride
    extent = torch.exp(torch.rand(shape.rois, 2, generator=generator) * torch.log(0.8 * size / (2 * shape.stride))) * 2 * shape.stride
    low = torch.rand(shape.rois, 2, generator=generator) * (size - extent)
    image = torch.randint(images, (shape.rois, 1), generator=generator)
    return features.to(device), torch.cat([image, low, low + extent], 1).to(device)


def milliseconds(call: Callable[[], object], seconds: float) -> float:
    call()  # compiles, where something is compiled
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def measure(pair: tuple[Operator, Operator], shape: Shape, device: str, seconds: float) -> dict[str, float]:
    """Milliseconds of ours and theirs, forward (in training) and backward, and how many times as fast ours is."""
    features, boxes = inputs(shape, device)
    features.requires_grad_()
    row = {}
    for whose, operator in zip(("ours", "theirs"), pair, strict=True):
        forward = partial(operator, features, boxes, shape.output_size, 1 / shape.stride)
        row[f"forward_{whose}_ms"] = milliseconds(forward, seconds)
        out = forward()
        backward = partial(torch.autograd.grad, out, features, torch.ones_like(out), retain_graph=True)
        row[f"backward_{whose}_ms"] = milliseconds(backward, seconds)
    return row | {f"{d}_ratio": row[f"{d}_theirs_ms"] / row[f"{d}_ours_ms"] for d in ("forward", "backward")}


def machine(device: str) -> str:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, torchvision {torchvision.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", default="reference", choices=["all", *(s.name for s in SHAPES)])
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=list(OPERATORS))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for how long a call is repeated (default: 1)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    shapes = [s for s in SHAPES if arguments.shapes in ("all", s.name)]
    tasks = [(shape, name) for shape in shapes for name in arguments.operators]
    rows = []
    for shape, name in tqdm(tasks, desc="measuring", leave=False):
        rows.append({"shape": shape.name, "operator": name, **measure(OPERATORS[name], shape, arguments.device, arguments.seconds)})

    print(f"{machine(arguments.device)}\n\n{'':22}{'forward, ms':>28}{'backward, ms':>28}")
    print(f"{'shape':11}{'operator':11}" + f"{'ours':>8}{'theirs':>10}{'ratio':>10}" * 2)
    for row in rows:
        line = f"{row['shape']:11}{row['operator']:11}"
        for direction in ("forward", "backward"):
            line += "{ours_ms:8.1f}{theirs_ms:10.1f}{ratio:8.1f} x".format(
                **{k: row[f"{direction}_{k}"] for k in ("ours_ms", "theirs_ms", "ratio")}
            )
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(arguments.device), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
