"""Machine code of the CPU kernels is cached on disk; where it cannot be, the kernels are compiled in memory."""

import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest

from tests.configuration import ROOT

SMALL = """
from roi_quantization.ops.cpu.window import _tent_integral
print(_tent_integral(0.0, 1.0), sum(_tent_integral.stats.cache_hits.values()))
"""
WITH_SHARED_FUNCTION = """
import numpy as np
from roi_quantization.ops.cpu.window import lattice_windows
one = np.ones((1, 1), np.float32)
print(lattice_windows(9 * one, one, np.ones((1, 1), np.int32), one, 5)[0], sum(lattice_windows.stats.cache_hits.values()))
"""
FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"  # every file stays empty
WARNING = "machine code of the RoI operators cannot be kept on disk"


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the kernels that imports from `tmp_path`. The packages around them are empty, so that PyTorch is not imported."""
    package = tmp_path / "roi_quantization"
    shutil.copytree(ROOT / "ops" / "cpu", package / "ops" / "cpu", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (package, package / "ops"):
        (folder / "__init__.py").touch()
    return package


def output_and_log(path: Path, code: str = SMALL, **environment: str) -> tuple[str, str]:
    """Run `code` in a new Python that imports from `path`."""
    folder = path if path.is_dir() else path.parent
    environment = os.environ | {"PYTHONPATH": str(path), "NUMBA_CACHE_DIR": str(folder / "cache")} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_a_change_in_a_shared_function_recompiles_the_kernels(package):
    """`lattice_windows` puts a position beyond the map onto its last cell by `clamp`, which is in another file."""
    call = partial(output_and_log, package.parent, WITH_SHARED_FUNCTION)
    assert [call()[0] for _ in range(2)] == ["[[4]] 0\n", "[[4]] 1\n"], "the second run reads the cache"
    shared = package / "ops" / "cpu" / "loops.py"
    shared.write_text(shared.read_text().replace("return min(max(position, 0), size - 1)", "return min(max(position, 0), size - 3)"))
    assert call()[0] == "[[2]] 0\n"


def test_without_a_writable_folder_kernels_are_compiled_in_memory(package):
    (package / "ops" / "cpu" / "__pycache__").write_text("a file, in which no folder can be made")
    nowhere = dict.fromkeys(["HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "IPYTHONDIR"], "/dev/null/nowhere")
    out, log = output_and_log(package.parent, **nowhere)
    assert out == "0.5 0\n"
    assert log.count(WARNING) == 1 and log.count("NUMBA_CACHE_DIR") == 1


def test_kernels_compile_when_imported_from_a_zip_file(package):
    with zipfile.ZipFile(package.parent / "all.zip", "w") as archive:
        for file in package.rglob("*.py"):
            archive.write(file, file.relative_to(package.parent))
    assert output_and_log(package.parent / "all.zip")[0] == "0.5 0\n"


@pytest.mark.slow
def test_a_full_disk_or_a_damaged_file_costs_a_compilation(package):
    cache = package.parent / "cache"
    out, log = output_and_log(package.parent, FULL_DISK + SMALL)
    assert out == "0.5 0\n" and log.count(WARNING) == 1
    assert output_and_log(package.parent) == ("0.5 0\n", "")
    for pattern in ("*_tent_integral*.nbi", "*_tent_integral*.nbc"):
        (file,) = cache.rglob(pattern)
        file.write_bytes(file.read_bytes()[:100])
        out, log = output_and_log(package.parent)
        assert out == "0.5 0\n" and log.count(WARNING) == 1
        assert output_and_log(package.parent) == ("0.5 1\n", ""), "repaired"
