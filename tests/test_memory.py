"""benchmarks/memory.py: its samples of a run, and the line through them."""

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


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_a_run_is_sampled_every_so_many_steps(memory, tmp_path):
    run_train(tmp_path, "trainer._target_=memory.monitored_trainer", "+trainer.every=2", "trainer.max_epochs=2", "data.num_workers=1")
    samples = json.loads((tmp_path / "run" / memory.SAMPLES_FILE).read_text())
    assert samples["step"] == [2, 4]
    assert all(50 < held < 50_000 for held in samples["resident"]), "MB"
    assert all(0 < held < 50_000 for held in samples["workers"])


def test_the_slope_leaves_the_first_steps_out(memory):
    """10 MB in 100 steps are 100 MB in 1000; from 1010 to 1020 it grew by 10. A validation comes after the last step left out."""
    samples = {"step": [100, 200, 300, 400], "resident": [100.0, 1000.0, 1010.0, 1020.0], "workers": [0.0, 50.0, 50.0, 50.0]}
    fitted = memory.summarize(samples, warmup=200)
    assert fitted["resident"] == pytest.approx({"slope": 100, "growth": 10, "most": 1020})
    assert fitted["workers"] == pytest.approx({"slope": 0, "growth": 0, "most": 50}, abs=1e-9)
    text = memory.format_table(samples, fitted, warmup=200)
    assert "     100         100.0           0.0" in text and "after 200 steps: MB a 1000 steps 100.0, workers" in text
