"""What a sweep was made from and with: written when it starts, told in the report."""

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

from roi_quantization.detection.files import atomic_write

NAME = "origin.json"
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "pycocotools", "numba", "numpy", "scipy")


def add_origin(folder: Path | str, data: Mapping[str, str], runs: Sequence[tuple[str, int]]) -> None:
    """Adds this start of the sweep to `<folder>/origin.json`: command, commit, versions, machine, time.

    data: split -> what is in it, in words.
    runs: (arm, seed) of every run that is planned.
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
    """Every start of the sweep, the first one first; empty where nothing was written down."""
    path = Path(folder) / NAME
    return json.loads(path.read_text()) if path.is_file() else []


def commit() -> str:
    """Of the code that is running; says so where files differ from it, or where it is no git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
