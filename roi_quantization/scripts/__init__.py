"""The programs: `train`, `eval`, `predict`, `recall`, `explain` and so on. In a checkout they are the files of its top level."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2])]
