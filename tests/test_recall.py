"""recall.py from end to end, on three small images."""

import pytest

from roi_quantization.scripts.recall import print_recall
from tests import configuration

TINY = ["data.source.train=1", "data.source.val=1", "data.source.test=3", "data.source.image_size=96", "data.source.sides=[24,48]"]


def composed(*overrides):
    return configuration.composed("recall", *TINY, *overrides)


def test_the_table_of_a_split(tmp_path, capsys):
    rows = print_recall(composed(f"data.root={tmp_path}", "proposals.scales=[0.3,0.5]", "proposals.step=0.2", "windows=[1]"))
    assert [(row["windows"], row["size"]) for row in rows[::4]] == [(1, "all"), (None, "all")]
    assert 0 <= rows[0]["R50"] < rows[4]["R50"] <= 100
    text = capsys.readouterr().out
    assert "test: 3 images" in text and "    all  " in text


def test_numbers_of_windows_are_a_list(tmp_path):
    with pytest.raises(ValueError, match=r"windows=300: expected a list of numbers"):
        print_recall(composed(f"data.root={tmp_path}", "windows=300"))


@pytest.mark.parametrize("windows", ["[-3]", "[0]", "[1.5]"])
def test_numbers_of_windows_are_counts(tmp_path, windows):
    with pytest.raises(ValueError, match=r"windows=.*: expected a whole number from 1 on"):
        print_recall(composed(f"data.root={tmp_path}", f"windows={windows}"))


def test_a_missing_split_is_named_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"split=test: this data set has no such split\. Choose split= one of train, val"):
        print_recall(composed(f"data.root={tmp_path}", "data.test=null", "split=test"))
