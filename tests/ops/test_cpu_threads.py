"""The threads of the CPU kernels: one pool for all calls, and none while Python shuts down."""

import subprocess
import sys
import threading

import pytest
import torch

from roi_quantization import ops

AT_EXIT = """
import atexit, torch
from roi_quantization import ops
torch.set_num_threads(2)
def pool():
    print(ops.roi_align(torch.ones(1, 64, 8, 8), torch.tensor([[0.0, 0, 0, 7, 7]]), 2).mean().item())
{before}
atexit.register(pool)
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["pool()", ""], ids=["called before", "called first then"])
def test_an_operator_can_be_called_while_python_shuts_down(before):
    done = subprocess.run([sys.executable, "-c", AT_EXIT.format(before=before)], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("1.0\n" * (2 if before else 1), 0), done.stderr


def test_another_number_of_threads_needs_no_other_pool():
    features, boxes = torch.ones(1, 512, 8, 8), torch.tensor([[0.0, 0, 0, 7, 7]])
    before = torch.get_num_threads()
    try:
        for count in range(2, 12):
            torch.set_num_threads(count)
            ops.roi_align(features, boxes, 2)
    finally:
        torch.set_num_threads(before)
    helpers = [thread for thread in threading.enumerate() if thread.name.startswith("roi")]
    assert len(helpers) <= 11
    assert len({thread.name.rpartition("_")[0] for thread in helpers}) <= 1, "one pool"
