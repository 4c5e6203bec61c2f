"""Memory that is freed stays with a program."""

import platform
import subprocess
import sys

import pytest

FREES_A_TENSOR = """
import torch
from pathlib import Path
from roi_quantization.detection.runs.memory import set_up_memory

def resident():  # bytes
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

{call}
before = resident()
tensor = torch.ones(64 * 2**20)
assert resident() - before > 200 * 2**20
del tensor
print(resident() - before > 200 * 2**20, torch.utils.deterministic.fill_uninitialized_memory)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("call", "environment", "is_kept"),
    [("", {}, False), ("set_up_memory()", {}, True), ("set_up_memory()", {"MALLOC_MMAP_THRESHOLD_": "1000000"}, False)],
)
def test_a_freed_tensor_stays_unless_the_environment_says_otherwise(monkeypatch, call, environment, is_kept):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", FREES_A_TENSOR.format(call=call)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{is_kept} {not call}\n", "whether it is kept, and whether deterministic mode fills"
