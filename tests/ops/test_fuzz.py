"""A few of the random calls of `tests/ops/fuzz.py`; the long run is that command's."""

import pytest

from . import fuzz


def test_random_calls_equal_the_oracle_or_are_refused():
    for halves in (False, True):
        assert {fuzz.check(seed, halves) for seed in range(60)} == {"equal", "equal to torchvision", "refused"}


def test_a_disagreement_is_reported_with_its_seed(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "oracle", lambda operator, *args: operator(*args) + 1)
    monkeypatch.setattr("sys.argv", ["fuzz", "5", "7"])
    with pytest.raises(SystemExit) as stopped:
        fuzz.main()
    assert stopped.value.code == 1
    assert "seed 9: " in (out := capsys.readouterr().out)
    assert "AssertionError" in out
