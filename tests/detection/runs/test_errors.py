import json
from pathlib import Path

import pytest

from roi_quantization.detection.runs.errors import exit_with_message


def test_what_is_meant_for_who_runs_it_comes_alone():
    def check():
        raise ValueError("seed=x: expected a number")

    with pytest.raises(SystemExit, match=r"^train\.py: seed=x: expected a number$"), exit_with_message("train.py"):
        check()
    with pytest.raises(SystemExit, match=r"^eval\.py: .*No such file or directory: '/nowhere'$"), exit_with_message("eval.py"):
        Path("/nowhere").read_bytes()


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch):
    with pytest.raises(json.JSONDecodeError), exit_with_message("train.py"):
        json.loads("{")
    with pytest.raises(KeyError), exit_with_message("train.py"):
        {}["a"]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="wanted"), exit_with_message("train.py"):
        raise ValueError("wanted")
