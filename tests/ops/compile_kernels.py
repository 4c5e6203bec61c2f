"""Compile every Triton kernel for GPUs that this machine lacks, and print the registers and the stack that each needs.

    python -m tests.ops.compile_kernels [float32] [float16] [bfloat16] [sm_80] [sm_90] [sm_100]

It calls the functions of `ops/cuda/kernels.py` as they are, with a launch that compiles and goes no further.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from roi_quantization.ops.cuda import kernels as cuda
from roi_quantization.ops.geometry import IntegralRule, LatticeRule

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class AbsentGPU:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_all(capability: int, dtype: torch.dtype) -> list[CompiledKernel]:
    """The kernels of every operator, forward and backward, at VGG16's shapes."""
    compiled = []
    triton.runtime.driver.set_active(AbsentGPU(capability))
    JITFunction.__getitem__ = lambda kernel, grid: lambda *a, **k: compiled.append(kernel.run(*a, grid=grid, warmup=True, **k))
    features, image = torch.zeros(1, 512, 38, 63, dtype=dtype), torch.zeros(8, dtype=torch.int64)
    low, high = torch.zeros(8), torch.full((8,), 300.0)
    for reduce, winners_dtype in (("mean", None), ("max", torch.int8)):
        y, x = (LatticeRule().axis(low, high, 1 / 16, 7, size) for size in features.shape[2:])
        out, winners = cuda.lattice_forward(features, image, y, x, reduce, winners_dtype)
        cuda.lattice_backward(out, features, winners, image, y, x, reduce, torch.empty_like(features), True)
    y, x = (IntegralRule().axis(low, high, 1 / 16, 7, size) for size in features.shape[2:])
    cuda.integral_backward(cuda.integral_forward(features, image, y, x), features, image, y, x, torch.empty_like(features), True)
    return compiled


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Registers of a thread, and bytes of the stack, which is where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}


if __name__ == "__main__":
    targets = [name for name in sys.argv[1:] if name.startswith("sm_")] or ["sm_80", "sm_90", "sm_100"]
    for name in [name for name in sys.argv[1:] if name not in targets] or ["float32", "float16", "bfloat16"]:
        for target in targets:
            for kernel in compile_all(int(target.removeprefix("sm_")), getattr(torch, name)):
                row = {"target": target, "dtype": name, "kernel": kernel.metadata.name}
                print(json.dumps(row | resources(kernel)), flush=True)
