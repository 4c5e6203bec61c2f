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

from roi_quantization.detection.common.files import atomic_write

NAME = "origin.json"
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
    """Return the starts of the sweep in order. Empty where there is no origin.json."""
    path = Path(folder) / NAME
    return json.loads(path.read_text()) if path.is_file() else []


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
