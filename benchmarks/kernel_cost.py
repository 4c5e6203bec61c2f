"""What do the CUDA kernels cost? A model computed from their machine code, for a machine without a GPU. Nothing here is measured.

    python benchmarks/kernel_cost.py                                  # sm_90, float32 and bfloat16: the table of docs/kernels.md
    python benchmarks/kernel_cost.py --targets sm_80 --dtypes float16 --shape "test 2000" --json cost.json

Triton compiles what `ops/cuda/kernels.py` launches for a shape of `benchmarks/roi_operators.py`, and NVIDIA's disassembler, which comes
with Triton, lists the instructions. Those outside of loops count once a warp, those of a loop as often as the benchmark's own boxes have
it run; of two sides of a branch both count. A kernel takes at least the longest of three times on the GPU that the target stands for:

    issue   warp instructions, one a cycle on each of the four schedulers of a multiprocessor
    L1      bytes that global loads read, 128 a cycle on each multiprocessor
    memory  bytes of the tensors that the launch reads or writes, each once

Latency, stalls, cache misses and the throughput of atomics are not modelled, so that a measured time is longer. Spills are bytes of a
thread's stack; duplicated is how often the warps of a program hold the same part of its largest tensor.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
import triton
from absent_gpu import AbsentGPU
from roi_operators import SHAPES, Shape, inputs
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from roi_quantization.detection.common.files import atomic_write
from roi_quantization.ops.cuda import kernels as cuda
from roi_quantization.ops.functional import ROI_POOL
from roi_quantization.ops.geometry import Axis, LatticeRule, smallest_winners_dtype

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ATOMIC = r"\b(REDG?|ATOMG?)\."
RULES = {"align": ("mean", LatticeRule()), "pool": ("max", ROI_POOL), "align_max": ("max", LatticeRule())}


class GPU(NamedTuple):
    name: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second


GPUS = {
    "sm_80": GPU("A100 SXM", 108, 1.41e9, 2.04e12),
    "sm_90": GPU("H100 SXM", 132, 1.755e9, 3.35e12),
}


class Launch(NamedTuple):
    kernel: CompiledKernel
    grid: tuple[int, ...]
    arguments: tuple[object, ...]

    @property
    def name(self) -> str:
        return self.kernel.metadata.name

    @property
    def warps(self) -> int:
        programs = 1
        for side in self.grid:
            programs *= side
        return programs * self.kernel.metadata.num_warps

    @property
    def nbytes(self) -> int:
        return sum(a.numel() * a.itemsize for a in self.arguments if isinstance(a, Tensor))


class Loop(NamedTuple):
    start: int
    end: int  # its last instruction, a branch back to the first

    def holds(self, other: "Loop") -> bool:
        return self != other and self.start <= other.start and other.end <= self.end


def launches(capability: int, operator: str, shape: Shape, dtype: torch.dtype) -> list[Launch]:
    """What a forward and a backward pass on a GPU launch, compiled and not run."""
    compiled: list[Launch] = []
    triton.runtime.driver.set_active(AbsentGPU(capability))
    original = JITFunction.__getitem__

    def capture(kernel: JITFunction, grid: tuple[int, ...]):
        return lambda *a, **k: compiled.append(Launch(kernel.run(*a, grid=grid, warmup=True, **k), grid, a))

    reduce, rule = RULES[operator]
    _, boxes = inputs(shape, "cpu")
    features = torch.empty(shape.features, dtype=dtype).to(memory_format=torch.channels_last)
    bins, size = [shape.output_size] * 2, list(features.shape[2:])
    y, x = axes(operator, shape)
    image, is_cells = boxes[:, 0].long(), rule.quantize_bins != "none"
    winners_dtype = smallest_winners_dtype(rule.most_samples(size[0]) * rule.most_samples(size[1]))
    JITFunction.__getitem__ = capture
    try:
        cuda.place_boxes(rule, boxes[:, 0], boxes[:, 1:], 1 / shape.stride, len(features), bins, size)
        out, winners = cuda.lattice_forward(features, image, y, x, reduce, winners_dtype, is_cells)
        cuda.lattice_backward(out, None, winners, image, y, x, reduce, torch.empty_like(features), False, is_cells)
    finally:
        JITFunction.__getitem__ = original
    return compiled


def axes(operator: str, shape: Shape) -> tuple[Axis, Axis]:
    """The lattices of the benchmark's boxes, along y and x."""
    boxes, rule = inputs(shape, "cpu")[1], RULES[operator][1]
    return tuple(
        rule.axis(boxes[:, i], boxes[:, i + 2], 1 / shape.stride, shape.output_size, side)
        for i, side in ((2, shape.features[2]), (1, shape.features[3]))
    )


def disassemble(kernel: CompiledKernel) -> tuple[list[str], list[Loop], dict[str, int]]:
    """Instructions of a kernel, its loops in their order, and its registers and bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = run(TOOLS / "nvdisasm", "-c", file.name)
        usage = run(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
    return *parse(text), {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}


def run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def parse(text: str) -> tuple[list[str], list[Loop]]:
    """Instructions and loops of a disassembly: a branch to an earlier label closes a loop."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    ends: dict[int, int] = {}
    for i, instruction in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
        if target and (start := labels.get(target[1], i + 1)) < i:  # a branch to itself is the kernel's end
            ends[start] = max(i, ends.get(start, 0))
    loops = [Loop(start, end) for start, end in sorted(ends.items())]
    exits = [i for i, instruction in enumerate(instructions) if re.match(r"EXIT", instruction)]
    return instructions, [loop for loop in loops if not exits or loop.start < exits[-1]]


def unrolled(instructions: list[str], first: Loop, second: Loop) -> int:
    """How many rounds of the second loop one of the first is: the compiler puts an unrolled loop before the one for what is left."""
    counts = [sum("FMNMX" in i for i in instructions[loop.start : loop.end + 1]) for loop in (first, second)]
    return counts[0] // counts[1] if counts[1] and counts[0] % counts[1] == 0 and first.end < second.start else 1


def visits(axis: Axis, size: int) -> Tensor:
    """Rows that `mean_forward` reads for each bin: see `rows_of_bin`."""
    last = axis.first + (axis.visited - 1) * axis.step
    low, high = torch.minimum(axis.first, last).clamp(0, size - 1).floor(), torch.maximum(axis.first, last).clamp(0, size - 1).floor() + 1
    window = high.clamp(max=size - 1) - low
    is_dense = (axis.visited <= 4) & (window < 2 * axis.visited)
    return torch.where(axis.visited > 0, torch.where(is_dense, window + 1, 2.0 * axis.visited), 0.0)


def cells_of_blocks(axis: Axis, size: int, rows: int) -> tuple[Tensor, Tensor]:
    """First and last cell of each block of `rows` bins, `[K, blocks]`."""
    last = axis.first + (axis.visited - 1).clamp(min=0) * axis.step
    low, high = torch.minimum(axis.first, last).clamp(0, size - 1).floor(), torch.maximum(axis.first, last).clamp(0, size - 1).floor() + 1
    low, high = (list(t.split(rows, 1)) for t in (low, high.clamp(max=size - 1)))
    return torch.stack([t.amin(1) for t in low], 1), torch.stack([t.amax(1) for t in high], 1)


def trips(launch: Launch, operator: str, shape: Shape) -> list[float]:
    """How often a program runs each of its loops on average, in the order of the machine code, nested ones after those around them."""
    y, x = axes(operator, shape)
    of_row = x.visited.amax(1, keepdim=True).float()  # samples along x of the widest bin of a row of bins
    images, channels, height, width = shape.features
    if launch.name == "mean_forward":
        rows = of_row * visits(y, height)
        return [float(t.mean()) for t in (of_row, rows, rows * y.visited)]
    if launch.name == "max_forward":
        return [float(t.float().mean()) for t in (y.visited, y.visited * of_row)]
    tile_y, tile_x = cuda.TILE["TILE_Y"], cuda.TILE["TILE_X"]
    tiles = -(-height // tile_y) * -(-width // tile_x)
    if launch.name == "mark_rois_by_tile":
        return [images * tiles / 16 / launch.grid[1]]
    if launch.name == "mean_backward":
        rows = max(32 // triton.next_power_of_2(shape.output_size), 1)
        (top, bottom), (left, right) = cells_of_blocks(y, height, rows), cells_of_blocks(x, width, shape.output_size)
        across = right // tile_x - left // tile_x + 1
        entries = ((bottom.amax(1) // tile_y - top.amin(1) // tile_y + 1) * across[:, 0]).sum() / (images * tiles)
        blocks = ((bottom // tile_y - top // tile_y + 1) * across).sum() / (images * tiles)
        samples = float(y.visited.max())
        return [-(-shape.rois // 32), float(entries), float(entries) * samples, float(blocks), float(blocks) * samples]
    if launch.name == "clear_and_find_largest":
        of_roi, programs = channels * shape.output_size**2, launch.grid[0]
        of_program = shape.rois / programs
        return [images * channels * height * width / 4096 / programs, of_program, of_program * -(-of_roi // 4096)]
    return []


def executed(instructions: list[str], loops: list[Loop], counts: list[float]) -> list[float]:
    """How often a warp runs each instruction on average.

    Raises:
        ValueError: the machine code has other loops than the model knows.
    """
    weights, left, i = [1.0] * len(instructions), list(counts), 0
    while i < len(loops):
        times = unrolled(instructions, loops[i], loops[i + 1]) if i + 1 < len(loops) else 1
        if not left:
            raise ValueError(f"{len(loops)} loops in the machine code, {len(counts)} in the model: bring `trips` up to date")
        count = left.pop(0)
        if times > 1:  # the loop runs twice a sample in all shapes: never as many as it is unrolled for
            weights[loops[i].start : loops[i].end + 1] = [0.0] * (loops[i].end - loops[i].start + 1)
            i += 1
        weights[loops[i].start : loops[i].end + 1] = [count] * (loops[i].end - loops[i].start + 1)
        i += 1
    if left:
        raise ValueError(f"{len(loops)} loops in the machine code, {len(counts)} in the model: bring `trips` up to date")
    return weights


def loaded_bytes(instruction: str) -> int:
    """Bytes that a warp's load from global memory reads."""
    if "LDG" not in instruction:
        return 0
    width = re.search(r"LDG\S*\.(128|64|U16|S16|U8|S8)\b", instruction)
    return 32 * {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width[1]] if width else 128


def duplicated(kernel: CompiledKernel) -> int:
    """How many warps of a program hold the same part of its largest tensor, which its results are."""
    text = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(?:blocked|nvidia_mma)<(\{.*\})>", text, re.MULTILINE))
    most, result = 0, 1
    for sides, layout in re.findall(r"tensor<([\dx]+)xf32, (#\w+)>", text):
        shape = [int(side) for side in sides.split("x")]
        if layout not in layouts or len(shape) != 2 or shape[0] * shape[1] < most:
            continue
        field = {name: [int(v) for v in values.split(",")] for name, values in re.findall(r"(\w+) = \[([\d, ]+)\]", layouts[layout])}
        in_warp = [field["instrShape"][0], field["instrShape"][1]] if "instrShape" in field else None
        in_warp = in_warp or [a * b for a, b in zip(field["sizePerThread"], field["threadsPerWarp"], strict=True)]
        times = 1
        for side, one, warps in zip(shape, in_warp, field["warpsPerCTA"], strict=True):
            times *= max(warps // max(side // one, 1), 1)
        result = times if shape[0] * shape[1] > most else max(result, times)
        most = shape[0] * shape[1]
    return result


def rows(target: str, operator: str, shape: Shape, dtype: torch.dtype) -> Iterator[dict[str, object]]:
    """The cost of each launch of a forward and a backward pass; times in microseconds."""
    gpu = GPUS[target]
    for launch in launches(int(target.removeprefix("sm_")), operator, shape, dtype):
        instructions, loops, usage = disassemble(launch.kernel)
        weights = executed(instructions, loops, trips(launch, operator, shape))
        by_warp = sum(weights), sum(w * loaded_bytes(i) for w, i in zip(weights, instructions, strict=True))
        cycles = gpu.multiprocessors * gpu.clock / 1e6
        time = {
            "issue": launch.warps * by_warp[0] / (4 * cycles),
            "L1": launch.warps * by_warp[1] / (128 * cycles),
            "memory": 1e6 * launch.nbytes / gpu.bandwidth,
        }
        is_forward = launch.name == "place" or launch.name.endswith("_forward")
        yield {
            **{"target": target, "dtype": str(dtype).removeprefix("torch."), "operator": operator, "kernel": launch.name},
            **{"direction": "forward" if is_forward else "backward", "registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"]},
            **{"shared": launch.kernel.metadata.shared, "duplicated": duplicated(launch.kernel)},
            **{"instructions": launch.warps * by_warp[0], **time, "bound": max(time.values())},
            "atomics": launch.warps * 32 * sum(w for w, i in zip(weights, instructions, strict=True) if re.search(ATOMIC, i)),
        }


def torchvision_rows(target: str, operator: str, shape: Shape) -> Iterator[dict[str, object]]:
    """The same of torchvision's own float32 kernels, from the machine code in its library: a thread computes an element at a time.

    RoIPool's forward is left out: how often its unrolled loops run depends on the number of cells of each bin. Of RoIAlign's the round that
    is left over for an odd number of samples does not count.
    """
    library = next(Path(torchvision.__file__).parent.glob("_C*.so"))
    elements, gpu = shape.rois * shape.features[1] * shape.output_size**2, GPUS[target]
    cycles = gpu.multiprocessors * gpu.clock / 1e6
    for direction in ("forward", "backward") if operator == "align" else ("backward",):
        instructions, loops = parse(torchvision_sections(library, target)[f"roi_{operator}_{direction}"])
        weights = [0.0] * len(instructions)
        for loop, count in zip(loops, [1.0, shape.sampling_ratio, shape.sampling_ratio * shape.sampling_ratio / 2], strict=False):
            weights[loop.start : loop.end + 1] = [count] * (loop.end - loop.start + 1)
        if len(loops) > 1:
            weights[loops[2].end + 1 : loops[1].end + 1] = [0.0] * (loops[1].end - loops[2].end)
        loads = sum(w * loaded_bytes(i) for w, i in zip(weights, instructions, strict=True))
        argmax = 4 * elements if operator == "pool" else 0
        time = {
            "issue": elements / 32 * sum(weights) / (4 * cycles),
            "L1": elements / 32 * loads / (128 * cycles),
            "memory": 1e6 * (sum(shape._replace(dtype=torch.float32).nbytes()) + argmax) / gpu.bandwidth,
        }
        yield {
            **{"target": target, "dtype": "float32", "operator": f"torchvision {operator}", "kernel": f"roi_{operator}_{direction}"},
            **{"direction": direction, "registers": "", "spilled": "", "duplicated": "", **time, "bound": max(time.values())},
            "atomics": elements * sum(w for w, i in zip(weights, instructions, strict=True) if re.search(ATOMIC, i)),
        }


@cache
def torchvision_sections(library: Path, target: str) -> dict[str, str]:
    """Disassembly of torchvision's float32 kernels of RoIAlign and RoIPool, by their names.

    Raises:
        ValueError: torchvision has none for this target.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([TOOLS / "cuobjdump", "-xelf", target, library], cwd=folder, check=True, capture_output=True)
        for cubin in Path(folder).glob("*.cubin"):
            if b"_roi_align_kernel" not in (code := cubin.read_bytes()) and b"_roi_pool_kernel" not in code:
                continue
            sections = re.split(r"^\.text\.(\S+):$", run(TOOLS / "nvdisasm", "-c", cubin), flags=re.MULTILINE)
            for name, text in zip(sections[1::2], sections[2::2], strict=True):
                if kernel := re.search(r"\d(roi_(?:align|pool)_(?:forward|backward))_kernel_implIf", name):
                    found[kernel[1]] = text
    if not found:
        raise ValueError(f"{library} has no kernels for {target}")
    return found


def table(found: list[dict[str, object]]) -> str:
    """As Markdown."""
    names = ["target", "dtype", "operator", "kernel", "registers", "spilled", "duplicated", "issue", "L1", "memory", "bound"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in found:
        lines.append("| " + " | ".join(f"{row[n]:.0f}" if isinstance(row[n], float) else str(row[n]) for n in names) + " |")
    return "\n".join(lines)


def totals(found: list[dict[str, object]]) -> str:
    """Of each pass, the sum of what its launches take at least."""
    lines = ["| target | dtype | operator | pass | launches | issue | bound |", "|" + "---|" * 7]
    passes: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in found:
        passes.setdefault(tuple(row[n] for n in ("target", "dtype", "operator", "direction")), []).append(row)
    for key, launched in passes.items():
        sums = [f"{sum(row[n] for row in launched):.0f}" for n in ("issue", "bound")]
        lines.append("| " + " | ".join([*map(str, key), str(len(launched)), *sums]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["sm_90"], choices=list(GPUS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--operators", nargs="+", default=["align", "pool"], choices=list(RULES))
    parser.add_argument("--shape", default="train 1024", choices=[s.name for s in SHAPES if s.sampling_ratio != 0])
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args(arguments)
    if not all((TOOLS / tool).exists() for tool in ("nvdisasm", "cuobjdump")):
        sys.exit(f"{TOOLS} has no nvdisasm and no cuobjdump: this Triton was installed without NVIDIA's tools")
    shape = next(s for s in SHAPES if s.name == args.shape)
    cases = [(t, o, getattr(torch, d)) for t in args.targets for d in args.dtypes for o in args.operators]
    found = [row for target, operator, dtype in cases for row in rows(target, operator, shape, dtype)]
    if shape.sampling_ratio == 2 and "+cpu" not in torchvision.__version__:
        found += [row for t in args.targets for o in args.operators if o != "align_max" for row in torchvision_rows(t, o, shape)]
    print(f"Modelled, not measured: {shape.name}, {shape.rois} RoIs on {'x'.join(map(str, shape.features))}; microseconds\n")
    print(table(found), totals(found), sep="\n\n")
    if args.json:
        atomic_write(args.json, (json.dumps(found, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
