"""Kernels are compiled once and kept on disk."""

import os
import shutil
import subprocess
import sys

from tests.configuration import ROOT

SHOW = """
import numpy as np
from roi_quantization.ops.cpu.window import lattice_windows
one = np.ones((1, 1), np.float32)
print(lattice_windows(9 * one, one, np.ones((1, 1), np.int32), one, 5)[0], sum(lattice_windows.stats.cache_hits.values()))
"""


def test_a_change_in_what_kernels_share_is_noticed(tmp_path):
    """Of a position beyond the map, which `clamp` of another file puts onto its last cell."""
    package = tmp_path / "roi_quantization"
    for folder in ("roi_quantization", "ops"):
        target = package / folder.removeprefix("roi_quantization")
        shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__"))

    def shown():
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        return subprocess.run(
            [sys.executable, "-c", SHOW], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert [shown(), shown()] == ["[[4]] 0\n", "[[4]] 1\n"], "the second time it is there"
    shared = package / "ops" / "cpu" / "loops.py"
    shared.write_text(shared.read_text().replace("return min(max(position, 0), size - 1)", "return min(max(position, 0), size - 3)"))
    assert shown() == "[[2]] 0\n"
