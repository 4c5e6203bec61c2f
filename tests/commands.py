"""Commands in processes of their own, without the seconds that Python takes to import PyTorch and Lightning.

A server that has imported `preload.py` is forked for each command: `multiprocessing`'s forkserver. What starts from nothing is
tested in `test_installation.py`.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from roi_quantization.detection.runs.lock import exclusive_run_folder

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def run(*command: object, cwd: Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Do as `subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)`."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = start(*command, cwd=cwd, environment=environment, stdout=stdout, stderr=stderr)
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode, stdout.read_text(), stderr.read_text())


def start(*command: object, cwd: Path, stdout: Path, stderr: Path, environment: Mapping[str, str] | None = None) -> ForkServerProcess:
    """Start `python *command`: a script, `-m` and a module, or `-c` and code, with arguments. Append its output to the files."""
    environment = dict(os.environ if environment is None else environment)
    process = _context.Process(target=_execute, args=([str(word) for word in command], str(cwd), environment, str(stdout), str(stderr)))
    process.start()
    return process


@contextmanager
def another_process_in(run_dir: Path) -> Iterator[None]:
    """Another process holds the lock of this run folder inside."""
    ready, done = _context.Event(), _context.Event()
    process = _context.Process(target=_hold, args=(run_dir, ready, done))
    process.start()
    assert ready.wait(60)
    yield
    done.set()
    process.join()


def _hold(run_dir: Path, ready: Event, done: Event) -> None:
    with exclusive_run_folder(run_dir):
        ready.set()
        done.wait(60)


def _execute(command: Sequence[str], cwd: str, environment: Mapping[str, str], stdout: str, stderr: str) -> None:
    """Be that process."""
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.current_process().name = "MainProcess"
    if "PYTEST_XDIST_WORKER" in os.environ:  # as in conftest.py
        torch.set_num_threads(1)
    first, *rest = command
    there = cwd if first in ("-m", "-c") else str(Path(first).resolve().parent)
    sys.path[:0] = [there, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [first, *rest[1:]] if first == "-c" else rest if first == "-m" else list(command)
    try:
        if first == "-c":
            exec(rest[0], {"__name__": "__main__"})
        elif first == "-m":
            sys.modules.pop(rest[0], None)  # it would warn
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(first, run_name="__main__")
    finally:
        threading._shutdown()  # the end of an interpreter, in its order: multiprocessing leaves the second out
        atexit._run_exitfuncs()
