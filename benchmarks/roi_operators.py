"""How fast are the RoI operators? Ours against torchvision's, in one run, on the same inputs and machine.

    python benchmarks/roi_operators.py                    # the table of the README: 1 x 512 x 38 x 50, 256 RoIs, 7 x 7, float32
    python benchmarks/roi_operators.py --shapes all       # training, testing, fewer channels, stride 32, P = 14, sampling, bf16, layouts
    python benchmarks/roi_operators.py --device cuda --shapes all --json gpu.json --picture gpu.png    # all that a GPU can tell, 5 minutes

Times are medians of torch.utils.benchmark, which repeats a call for a second (on CUDA a fifth). On CUDA there are two: as called, Python
and launches included, and the GPU's alone, from a replayed CUDA graph; and the peak of memory besides. Where torchvision lacks something,
the nearest that it has is put in brackets: RoIAlign for the `max` of RoIAlign, for RoIWarp and PrRoIPool, float32 for bfloat16.

The floor is the time of the bytes that must move at the speed of a large copy, measured in the same run: features and boxes read and the
output written; or the output's gradient read and the features' written. Calls follow one another on the same inputs, so that what fits a
cache stays there, and a small shape can be faster than its floor. What cannot run is a "-", and its error is told at the end.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from meters import MIB, copy_bandwidth, describe_machine, meters, set_up_device
from results import picture, table
from torch import Tensor
from tqdm import tqdm

from roi_quantization import ops
from roi_quantization.detection.common.files import atomic_write


class Shape(NamedTuple):
    name: str
    features: tuple[int, int, int, int]
    rois: int
    output_size: int = 7
    stride: int = 16
    sampling_ratio: int = 2  # 0: adaptive
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    training: bool = True  # gradients are asked for

    def nbytes(self) -> tuple[int, int, int]:
        """Of features, boxes and output."""
        output = self.rois * self.features[1] * self.output_size**2
        return math.prod(self.features) * self.dtype.itemsize, self.rois * 5 * 4, output * self.dtype.itemsize


TWO_IMAGES = (2, 512, 38, 63)  # 600 x 1000 pixels at stride 16, VGG16's channels
SHAPES = [
    Shape("reference", (1, 512, 38, 50), 256),
    Shape("train 128", TWO_IMAGES, 128),
    Shape("train 1024", TWO_IMAGES, 1024),
    Shape("test 2000", (1, 512, 38, 63), 2000, training=False),
    Shape("C=256", (2, 256, 38, 63), 1024),
    Shape("C=64", (2, 64, 38, 63), 1024),
    Shape("stride 32", (2, 512, 19, 32), 1024, stride=32),
    Shape("P=14", TWO_IMAGES, 128, output_size=14),
    Shape("sampling 1", TWO_IMAGES, 1024, sampling_ratio=1),
    Shape("adaptive", TWO_IMAGES, 1024, sampling_ratio=0),
    Shape("NHWC", TWO_IMAGES, 1024, layout=torch.channels_last),
    Shape("bf16", TWO_IMAGES, 1024, dtype=torch.bfloat16),
    Shape("bf16 NHWC", TWO_IMAGES, 1024, dtype=torch.bfloat16, layout=torch.channels_last),
    Shape("bf16 test", (1, 512, 38, 63), 2000, dtype=torch.bfloat16, training=False),
]

Call = Callable[[Tensor, Tensor, Shape], Tensor]


class Operator(NamedTuple):
    call: Call
    against: str  # one of THEIRS
    same: bool = False  # theirs computes the same
    sampled: bool = True  # the sampling ratio matters


THEIRS: dict[str, Call] = {
    "align": lambda f, b, s: torchvision.ops.roi_align(f, b, s.output_size, 1 / s.stride, s.sampling_ratio, True),
    "pool": lambda f, b, s: torchvision.ops.roi_pool(f, b, s.output_size, 1 / s.stride),
}
OPERATORS = {
    "align": Operator(lambda f, b, s: ops.roi_align(f, b, s.output_size, 1 / s.stride, s.sampling_ratio, True), "align", same=True),
    "align_max": Operator(lambda f, b, s: ops.roi_align(f, b, s.output_size, 1 / s.stride, s.sampling_ratio, True, "max"), "align"),
    "warp": Operator(lambda f, b, s: ops.roi_warp(f, b, s.output_size, 1 / s.stride, s.sampling_ratio), "align"),
    "prroi": Operator(lambda f, b, s: ops.prroi_pool(f, b, s.output_size, 1 / s.stride), "align", sampled=False),
    "pool": Operator(lambda f, b, s: ops.roi_pool(f, b, s.output_size, 1 / s.stride), "pool", same=True, sampled=False),
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
    features = features.to(device, shape.dtype, memory_format=shape.layout)
    return features, torch.cat([image, low, low + extent], 1).to(device)


class BenchmarkRunner:
    """Measures whatever can run, and remembers why the rest could not."""

    def __init__(self, device: str, seconds: float):
        self.meters = meters(device, seconds)
        self.failures: list[dict[str, str]] = []

    def measure(self, name: str, call: Call, features: Tensor, boxes: Tensor, shape: Shape) -> dict[str, dict[str, float | None]]:
        """What is measured -> forward, backward (of memory: both, one after the other) -> milliseconds or MiB; None where it failed."""
        features = features.detach().requires_grad_(shape.training)
        forward = partial(call, features, boxes, shape)

        def backward() -> Callable[[], object]:
            out = forward()
            return partial(torch.autograd.grad, out, features, torch.ones_like(out), retain_graph=True)

        def both() -> Callable[[], object]:
            gradient = torch.ones_like(forward())
            return lambda: torch.autograd.grad(forward(), features, gradient)

        values = {}
        for what, meter in self.meters.items():
            makers = {"forward": lambda: forward, "backward": both if what == "memory" else backward}
            for direction in ("forward", "backward") if shape.training else ("forward",):
                value = self.attempt(shape, name, f"{what} {direction}", lambda meter=meter, make=makers[direction]: meter(make()))
                values.setdefault(what, {})[direction] = value
        return values

    def attempt(self, shape: Shape, name: str, what: str, measurement: Callable[[], float]) -> float | None:
        try:
            return measurement()
        except Exception as error:
            self.failures.append({"shape": shape.name, "operator": name, "what": what, "why": story(error)})
            return None


def story(error: BaseException) -> str:
    """The first cause first: a capture that breaks off complains once more at its end."""
    told = f"{type(error).__name__}: {error}"
    return f"{story(error.__context__)}; then {told}" if error.__context__ else told


def floors(shape: Shape, bandwidth: float) -> dict[str, dict[str, float]]:
    """The least that each measured thing can be: the time of the bytes that must move, the memory of the results alone."""
    features, boxes, output = shape.nbytes()
    time = {"forward": 1e3 * (features + boxes + output) / bandwidth, "backward": 1e3 * (output + features) / bandwidth}
    return {"called": time, "gpu": time, "memory": {"forward": output / MIB, "backward": (output + features) / MIB}}


def beside(**sides: dict[str, dict[str, float | None]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """What is measured -> direction -> ours, theirs, floor."""
    ours = sides["ours"]
    return {what: {d: {side: values[what][d] for side, values in sides.items()} for d in ours[what]} for what in ours}


def benchmark(shapes: list[Shape], names: list[str], device: str, seconds: float) -> dict:
    """All that is written as json: the machine, a row for each shape and operator, and what failed."""
    bandwidth = copy_bandwidth(device, seconds)
    laboratory, theirs, rows = BenchmarkRunner(device, seconds), {}, []
    tasks = [(shape, name) for shape in shapes for name in names if shape.sampling_ratio == 2 or OPERATORS[name].sampled]
    for shape, name in tqdm(tasks, desc="measuring", leave=False):
        call, against, same, _ = OPERATORS[name]
        features, boxes = inputs(shape, device)
        theirs_features = features.float()  # torchvision has no bfloat16
        if (shape, against) not in theirs:
            theirs[shape, against] = laboratory.measure(f"torchvision's {against}", THEIRS[against], theirs_features, boxes, shape)
        ours = laboratory.measure(name, call, features, boxes, shape)
        float32 = shape.dtype == torch.float32
        row = {"shape": shape.name, "operator": name, "against": against if float32 else f"{against} f32", "alike": same and float32}
        row |= beside(ours=ours, theirs=theirs[shape, against], floor=floors(shape, bandwidth))
        if same:
            compare = partial(difference, call, THEIRS[against], features, boxes, shape)
            row["largest_difference"] = laboratory.attempt(shape, name, "difference", compare)
        rows.append(row)
    described = {s.name: {k: v if isinstance(v, int | tuple) else str(v) for k, v in s._asdict().items() if k != "name"} for s in shapes}
    head = {"machine": describe_machine(device), "copy_gb_s": bandwidth / 1e9, "seconds": seconds, "shapes": described}
    return head | {"rows": rows, "failures": laboratory.failures}


def difference(ours: Call, theirs: Call, features: Tensor, boxes: Tensor, shape: Shape) -> float:
    return float((ours(features, boxes, shape) - theirs(features.float(), boxes, shape)).abs().max())


def modelled(shapes: list[Shape]) -> str:
    """What the same passes cost by `benchmarks/kernel_cost.py`, in a process of its own because it replaces Triton's driver."""
    target, told = "sm_{}{}".format(*torch.cuda.get_device_capability()), []
    for shape in shapes:
        command = [sys.executable, Path(__file__).with_name("kernel_cost.py"), "--shape", shape.name, "--targets", target]
        command += ["--dtypes", str(shape.dtype).removeprefix("torch.")]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stderr if done.returncode else done.stdout
        told.append(f"{shape.name}: {lines.strip().splitlines()[-1]}" if done.returncode else lines)
    return "\n".join(told)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", default=["reference"], choices=["all", *(s.name for s in SHAPES)])
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=list(OPERATORS))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seconds", type=float, help="for how long a call is repeated (default: 1, on CUDA 0.2)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--picture", type=Path, help="also draw the times into this PNG file")
    args = parser.parse_args(arguments)

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    set_up_device(args.device, args.threads)
    shapes = [s for s in SHAPES if "all" in args.shapes or s.name in args.shapes]
    found = benchmark(shapes, args.operators, args.device, args.seconds or {"cpu": 1.0, "cuda": 0.2}[args.device])
    print(table(found))
    if args.device == "cuda":
        print(modelled(shapes))
    if args.json:
        atomic_write(args.json, (json.dumps(found, indent=2) + "\n").encode())
    if args.picture:
        atomic_write(args.picture, picture(found))


if __name__ == "__main__":
    main()
