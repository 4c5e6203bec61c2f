import json
from pathlib import Path

import pytest

from roi_quantization.detection.runs.errors import message_alone


def test_what_is_meant_for_who_runs_it_comes_alone():
    def check():
        raise ValueError("seed=x: expected a number")

    with pytest.raises(SystemExit, match=r"^train\.py: seed=x: expected a number$"), message_alone("train.py"):
        check()
    with pytest.raises(SystemExit, match=r"^eval\.py: .*No such file or directory: '/nowhere'$"), message_alone("eval.py"):
        Path("/nowhere").read_bytes()


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch):
    with pytest.raises(json.JSONDecodeError), message_alone("train.py"):
        json.loads("{")
    with pytest.raises(KeyError), message_alone("train.py"):
        {}["a"]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="wanted"), message_alone("train.py"):
        raise ValueError("wanted")
