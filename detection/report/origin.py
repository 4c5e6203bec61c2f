"""Provenance of a sweep: command, commit, versions, machine and data, written when it starts and shown in the report."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import atomic_write, read_json

NAME = "origin.json"
KEYS = {"command", "commit", "versions", "machine", "time", "data", "runs"}  # of a start
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "pycocotools", "numba", "numpy", "scipy")


def add_origin(folder: Path | str, data: Mapping[str, str], runs: Sequence[tuple[str, int]]) -> None:
    """Append this start of the sweep to `<folder>/origin.json`: command, commit, versions, machine, time.

    Args:
        folder: of the sweep.
        data: split -> description of its contents.
        runs: (arm, seed) of every planned run.
    """
    start = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": dict(data),
        "runs": [list(run) for run in runs],
    }
    atomic_write(Path(folder) / NAME, json.dumps([*read_origin(folder), start], indent=2).encode())


def read_origin(folder: Path | str) -> list[dict]:
    """Return the starts of the sweep in order. Empty where there is no origin.json.

    Raises:
        InputError: the file is damaged; the message names it.
    """
    path = Path(folder) / NAME
    starts = read_json(path, list) if path.is_file() else []
    for start in starts:
        if not (isinstance(start, dict) and KEYS <= start.keys()):
            raise InputError(f"{path} holds {start!r:.80}, expected {', '.join(sorted(KEYS))} of each start. Restore or remove it")
    return starts


def commit() -> str:
    """Return the commit of the running code, marked where files differ from it, or "not a git checkout"."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
