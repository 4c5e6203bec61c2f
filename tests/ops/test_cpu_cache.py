"""Machine code of the CPU kernels is kept on disk; where it cannot be, the operators work all the same."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.configuration import ROOT

SHOW = """
import numpy as np
from roi_quantization.ops.cpu.window import lattice_windows
one = np.ones((1, 1), np.float32)
print(lattice_windows(9 * one, one, np.ones((1, 1), np.int32), one, 5)[0], sum(lattice_windows.stats.cache_hits.values()))
"""
FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"  # no file can be longer than nothing
WARNING = "machine code of the RoI operators cannot be kept on disk"


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package that imports from `tmp_path`."""
    for folder in ("roi_quantization", "ops"):
        target = tmp_path / "roi_quantization" / folder.removeprefix("roi_quantization")
        shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "roi_quantization"


def shown(path: Path, code: str = SHOW, **environment: str) -> tuple[str, str]:
    """What a new Python prints, and what it logs."""
    folder = path if path.is_dir() else path.parent
    environment = os.environ | {"PYTHONPATH": str(path), "NUMBA_CACHE_DIR": str(folder / "cache")} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_change_in_what_kernels_share_is_noticed(package):
    """Of a position beyond the map, which `clamp` of another file puts onto its last cell."""
    assert [shown(package.parent)[0] for _ in range(2)] == ["[[4]] 0\n", "[[4]] 1\n"], "the second time it is there"
    shared = package / "ops" / "cpu" / "loops.py"
    shared.write_text(shared.read_text().replace("return min(max(position, 0), size - 1)", "return min(max(position, 0), size - 3)"))
    assert shown(package.parent)[0] == "[[2]] 0\n"


def test_without_a_writable_folder_kernels_are_compiled_in_memory(package):
    (package / "ops" / "cpu" / "__pycache__").write_text("a file, in which no folder can be made")
    nowhere = dict.fromkeys(["HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "IPYTHONDIR"], "/dev/null/nowhere")
    out, log = shown(package.parent, **nowhere)
    assert out == "[[4]] 0\n"
    assert log.count(WARNING) == 1 and log.count("NUMBA_CACHE_DIR") == 1


def test_from_a_zip_file(package):
    with zipfile.ZipFile(package.parent / "all.zip", "w") as archive:
        for file in package.rglob("*.py"):
            archive.write(file, file.relative_to(package.parent))
    assert shown(package.parent / "all.zip")[0] == "[[4]] 0\n"


def test_a_full_disk_and_damaged_files_cost_a_compilation(package):
    cache = package.parent / "cache"
    out, log = shown(package.parent, FULL_DISK + SHOW)
    assert out == "[[4]] 0\n" and log.count(WARNING) == 1
    assert shown(package.parent) == ("[[4]] 0\n", "")
    for pattern in ("*lattice_windows*.nbi", "*lattice_windows*.nbc"):
        (file,) = cache.rglob(pattern)
        file.write_bytes(file.read_bytes()[:100])
        out, log = shown(package.parent)
        assert out == "[[4]] 0\n" and log.count(WARNING) == 1
        assert shown(package.parent) == ("[[4]] 1\n", ""), "repaired"
