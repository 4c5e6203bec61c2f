"""A file is there whole or not at all, whatever happens while it is written."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

from roi_quantization.detection.common.files import NotWrittenError, atomic_file, atomic_write
from tests.conftest import ROOT
from tests.faults import full_disk

UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override"]  # root may write everywhere, without this one


@pytest.mark.parametrize("size", [4, 4000, 400_000])
def test_a_full_disk_leaves_what_was_there(tmp_path, size):
    path = tmp_path / "last.ckpt"
    atomic_write(path, b"before")
    message = r"last\.ckpt could not be written: File too large\. No earlier file is lost\. Make room there .* resume=auto"
    with full_disk(size // 2), pytest.raises(NotWrittenError, match=message) as told:
        atomic_write(path, bytes(size))
    assert told.value.errno == errno.EFBIG
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_an_error_while_it_is_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "p.npz"
    atomic_write(path, b"before")
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


READ_ONLY = """
import sys
from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.runs.lock import is_running, exclusive_run_folder

run = sys.argv[1]
print(is_running(run))
for attempt in (lambda: atomic_write(f"{run}/results.json", b"[]"), lambda: exclusive_run_folder(run).__enter__()):
    try:
        attempt()
    except OSError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow  # a process that compiles all that it imports
def test_a_read_only_run_folder_is_named(tmp_path):
    if os.geteuid() == 0 and not shutil.which(UNPRIVILEGED[0]):
        pytest.skip("root may write everywhere, and setpriv is not there to take that away")
    (tmp_path / ".lock").touch()
    (tmp_path / ".lock").chmod(0o444)
    tmp_path.chmod(0o555)
    command = [*(UNPRIVILEGED if os.geteuid() == 0 else []), sys.executable, "-c", READ_ONLY, str(tmp_path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    tmp_path.chmod(0o755)
    assert told[0] == "False", "nobody is at work there"
    for name, line in zip(("results.json", ".lock"), told[1:], strict=True):
        assert f"{tmp_path}/{name} could not be written: Permission denied" in line
        assert "Make its folder writable, or choose another one" in line
