"""Compile every Triton kernel for GPUs that this machine lacks, and print the registers and the stack that each needs.

    python -m tests.ops.compile_kernels [float32] [float16] [bfloat16] [sm_80] [sm_90] [sm_100]
        [channels=512,17] [bins=7,14] [rois=8] [height=38] [width=63]

It calls the functions of `ops/cuda/kernels.py` as they are, with a launch that compiles and goes no further.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from benchmarks.absent_gpu import AbsentGPU
from roi_quantization.ops.cuda import kernels as cuda
from roi_quantization.ops.functional import ROI_POOL
from roi_quantization.ops.geometry import Axis, Bounds, IntegralRule, LatticeRule, smallest_winners_dtype

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_all(
    capability: int, dtype: torch.dtype, channels: int = 512, bins: int = 7, rois: int = 8, height: int = 38, width: int = 63
) -> list[CompiledKernel]:
    """The kernels of every operator, forward and backward."""
    compiled = []
    triton.runtime.driver.set_active(AbsentGPU(capability))
    JITFunction.__getitem__ = lambda kernel, grid: lambda *a, **k: compiled.append(kernel.run(*a, grid=grid, warmup=True, **k))
    features, image = torch.zeros(1, channels, height, width, dtype=dtype), torch.zeros(rois, dtype=torch.int64)
    box = torch.zeros(rois, 4)
    for reduce, rule in (("mean", LatticeRule()), ("max", LatticeRule()), ("max", ROI_POOL)):
        _, y, count_y, x, count_x = cuda.place_boxes(rule, image, box, 1 / 16, 1, [bins, bins], [height, width])
        y, x = Axis(y[0], y[1], count_y, y[2]), Axis(x[0], x[1], count_x, x[2])  # as of a call: aligned as they are there
        dtype_of_winners = smallest_winners_dtype(rule.most_samples(height) * rule.most_samples(width))
        is_cells = rule.quantize_bins != "none"
        out, winners = cuda.lattice_forward(features, image, y, x, reduce, dtype_of_winners, is_cells)
        cuda.lattice_backward(out, features, winners, image, y, x, reduce, torch.empty_like(features), rule.has_box_gradient, is_cells)
    _, y, _, x, _ = cuda.place_boxes(IntegralRule(), image, box, 1 / 16, 1, [bins, bins], [height, width])
    y, x = Bounds(*y), Bounds(*x)
    cuda.integral_backward(cuda.integral_forward(features, image, y, x), features, image, y, x, torch.empty_like(features), True)
    return compiled


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Registers of a thread, and bytes of the stack, which is where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}


def numbers(name: str, default: int) -> list[int]:
    """The values of an argument like `bins=7,14`."""
    return [int(v) for a in sys.argv[1:] if a.startswith(f"{name}=") for v in a.split("=")[1].split(",")] or [default]


if __name__ == "__main__":
    targets = [a for a in sys.argv[1:] if a.startswith("sm_")] or ["sm_80", "sm_90", "sm_100"]
    dtypes = [a for a in sys.argv[1:] if "float" in a] or ["float32", "float16", "bfloat16"]
    defaults = {"channels": 512, "bins": 7, "rois": 8, "height": 38, "width": 63}
    for name, target, *sizes in product(dtypes, targets, *(numbers(*size) for size in defaults.items())):
        for kernel in compile_all(int(target.removeprefix("sm_")), getattr(torch, name), *sizes):
            fused = len(re.findall(r"\bfma\.", kernel.asm["ptx"]))
            row = {"target": target, "dtype": name, **dict(zip(defaults, sizes, strict=True)), "kernel": kernel.metadata.name}
            print(json.dumps(row | {"hash": kernel.hash, "fused multiply-adds": fused} | resources(kernel)), flush=True)
