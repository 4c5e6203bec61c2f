"""Measure a call: its time as called from Python, the time of its kernels on a GPU, its peak memory; and the machine's copy bandwidth."""

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
CALLS_PER_GRAPH = 10  # so that the launch of a graph costs little beside its content


def meters(device: str, seconds: float) -> dict[str, Callable[[Call], float]]:
    """Return the meters of a device by name. Memory needs CUDA: on a CPU torch does not see what NumPy and Numba allocate."""
    called = {"called": partial(median_milliseconds, seconds=seconds)}
    return called | {"memory": peak_mebibytes, "gpu": partial(gpu_milliseconds, seconds=seconds)} if device == "cuda" else called


def set_up_device(device: str, threads: int) -> None:
    """Set the number of CPU threads and the CUDA stream; call it before the first tensor is made."""
    torch.set_num_threads(threads)
    if device == "cuda":
        # A graph cannot be captured on the default stream, and a backward runs on the stream of its forward: everything uses one other.
        torch.cuda.set_stream(torch.cuda.Stream())


def median_milliseconds(call: Call, seconds: float) -> float:
    """Measure the median of one call among many in a row, including the wait for the GPU."""
    call()  # compiles, where something is compiled
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def gpu_milliseconds(call: Call, seconds: float) -> float:
    """Measure the call's kernels without Python and launches: they are captured in a CUDA graph and replayed."""
    _check_no_synchronization(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(CALLS_PER_GRAPH):
            call()
    return median_milliseconds(graph.replay, seconds) / CALLS_PER_GRAPH


def _check_no_synchronization(call: Call) -> None:
    """Raise an error if the call waits for the GPU: it cannot be captured, and a failed capture can break later ones."""
    call()  # compilation may wait
    with warnings.catch_warnings(action="ignore"):  # warns that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_mebibytes(call: Call) -> float:
    """Measure the peak memory of tensors during a call, beyond what was allocated before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def copy_bandwidth(device: str, seconds: float) -> float:
    """Measure a copy too large for any cache, in bytes read and written per second."""
    source = torch.ones((1024 if device == "cuda" else 256) * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / median_milliseconds(partial(target.copy_, source), seconds)


def describe_machine(device: str) -> str:
    """Return the device, the number of CPU threads and the versions of torch and torchvision, in one line."""
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, torchvision {torchvision.__version__}"
