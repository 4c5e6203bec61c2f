"""How a call is measured: its time as Python sees it, the GPU's part of that, its memory at the peak; and how fast this machine copies."""

import platform
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch.utils.benchmark import Timer

Call = Callable[[], object]
MIB = 2**20
CALLS_A_GRAPH = 10  # so that launching a graph costs little beside what is in it


def meters(device: str, seconds: float) -> dict[str, Callable[[Call], float]]:
    """What can be measured here. Memory is CUDA's alone: on a CPU torch does not see what NumPy and Numba allocate."""
    called = {"called": partial(milliseconds, seconds=seconds)}
    return called | {"memory": peak_mebibytes, "gpu": partial(gpu_milliseconds, seconds=seconds)} if device == "cuda" else called


def use(device: str, threads: int) -> None:
    """Call it before the first tensor is made."""
    torch.set_num_threads(threads)
    if device == "cuda":
        # No graph can be captured on the default stream, and a backward runs on the stream of its forward: all of it goes to one other.
        torch.cuda.set_stream(torch.cuda.Stream())


def milliseconds(call: Call, seconds: float) -> float:
    """Median of one call among many in a row, the GPU's last work waited for."""
    call()  # compiles, where something is compiled
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def gpu_milliseconds(call: Call, seconds: float) -> float:
    """The same without Python and launches: the call's kernels alone, recorded once and replayed."""
    _without_waiting(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(CALLS_A_GRAPH):
            call()
    return milliseconds(graph.replay, seconds) / CALLS_A_GRAPH


def _without_waiting(call: Call) -> None:
    """An error if the call waits for the GPU. Such a call cannot be captured, and a capture that breaks off can spoil later ones."""
    call()  # compiling may wait
    with warnings.catch_warnings(action="ignore"):  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_mebibytes(call: Call) -> float:
    """Memory of tensors at its highest during a call, beyond what was held before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def copy_bandwidth(device: str, seconds: float) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    source = torch.ones((1024 if device == "cuda" else 256) * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / milliseconds(partial(target.copy_, source), seconds)


def machine(device: str) -> str:
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, torchvision {torchvision.__version__}"
