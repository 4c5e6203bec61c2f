"""benchmarks/memory.py: what it reads of a run and makes of it."""

import json
from pathlib import Path

import pytest

from .test_train_and_eval import run_train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as `python benchmarks/memory.py` does
    import memory

    return memory


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux alone tells it")
def test_a_run_is_read_every_so_many_steps(memory, tmp_path):
    run_train(tmp_path, "trainer._target_=memory.watched", "+trainer.every=2", "trainer.max_epochs=2", "data.num_workers=1")
    read = json.loads((tmp_path / "run" / memory.FOUND).read_text())
    assert read["step"] == [2, 4]
    assert all(50 < held < 50_000 for held in read["resident"]), "MB"
    assert all(0 < held < 50_000 for held in read["workers"])


def test_the_slope_leaves_the_first_steps_out(memory):
    """10 MB in 100 steps are 100 MB in 1000; from 1010 to 1020 it grew by 10. A validation comes after the last step left out."""
    read = {"step": [100, 200, 300, 400], "resident": [100.0, 1000.0, 1010.0, 1020.0], "workers": [0.0, 50.0, 50.0, 50.0]}
    told = memory.summary(read, warmup=200)
    assert told["resident"] == pytest.approx({"slope": 100, "growth": 10, "most": 1020})
    assert told["workers"] == pytest.approx({"slope": 0, "growth": 0, "most": 50}, abs=1e-9)
    text = memory.table(read, told, warmup=200)
    assert "     100         100.0           0.0" in text and "after 200 steps: MB a 1000 steps 100.0, workers" in text
