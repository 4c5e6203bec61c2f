"""benchmarks/kernel_cost.py: how machine code is counted, and the figures that docs/kernels.md promises of the CUDA kernels."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R8, desc[UR6][R10.64] ;
.L_x_0:
        /*0020*/                   FADD R2, R2, R3 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as `python benchmarks/kernel_cost.py` does
    return runpy.run_path(str(ROOT / "benchmarks" / "kernel_cost.py"))


def test_instructions_count_as_often_as_their_loops_run(script):
    instructions, loops = script["parse"](SASS)
    assert instructions[1] == "LDG.E.128 R8, desc[UR6][R10.64]"
    assert [(loop.start, loop.end) for loop in loops] == [(1, 4), (2, 3)]
    assert script["executed"](instructions, loops, [3.0, 12.0]) == [1, 3, 12, 12, 3, 1, 1]
    assert script["loaded_bytes"](instructions[1]) == 32 * 16
    assert [script["loaded_bytes"](i) for i in ("@!P0 LDG.E R1, [R2]", "LDG.E.U16 R1, [R2]", "STG.E R1, [R2]")] == [128, 64, 0]


@pytest.mark.parametrize("counts", [[3.0], [3.0, 12.0, 4.0]])
def test_loops_that_the_model_does_not_know_are_an_error(script, counts):
    with pytest.raises(ValueError, match=r"2 loops in the machine code, .* bring `trips` up to date"):
        script["executed"](*script["parse"](SASS), counts)


def test_rows_that_a_mean_visits(script):
    axis = script["Axis"](torch.tensor([[0.25, 3.0, 8.5, 0.0]]), torch.tensor([[0.5, 4.0, 1.0, 1.0]]), torch.tensor([[2, 2, 2, 0]]), None)
    # 0.25 and 0.75 lie between two rows; 3 and 7 are too far apart to visit all between; 8.5 and 9.5 share the last of ten rows; no sample
    assert script["visits"](axis, 10).tolist() == [[2, 4, 2, 0]]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the model compiles for GPUs that are absent")
def test_the_modelled_cost_keeps_its_limits(script, tmp_path):
    """Microseconds of an H100 for 1024 RoIs on 2 x 512 x 38 x 63; no spilled register, no duplicated warp, few launches."""
    if not (script["TOOLS"] / "nvdisasm").exists():
        pytest.skip("this Triton comes without NVIDIA's disassembler")
    command = [sys.executable, "benchmarks/kernel_cost.py", "--json", str(tmp_path / "cost.json")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, check=True, capture_output=True)
    rows = json.loads((tmp_path / "cost.json").read_text())
    theirs = [row for row in rows if "torchvision" in row["operator"]]
    assert {row["kernel"] for row in theirs} <= {"roi_align_forward", "roi_align_backward", "roi_pool_backward"}
    assert all(row["spilled"] == 0 and row["duplicated"] == 1 for row in rows if row not in theirs)
    limits = {
        ("float32", "align"): (50, 175),
        ("float32", "pool"): (75, 120),
        ("bfloat16", "align"): (50, 175),
        ("bfloat16", "pool"): (85, 100),
    }
    for (dtype, operator), most in limits.items():
        of_case = [row for row in rows if (row["dtype"], row["operator"]) == (dtype, operator)]
        passes = [[row["bound"] for row in of_case if row["direction"] == direction] for direction in ("forward", "backward")]
        assert all(sum(bounds) <= limit for bounds, limit in zip(passes, most, strict=True)), passes
        assert len(passes[0]) <= 2 and len(of_case) <= 5
