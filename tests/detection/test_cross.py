"""Train with one operator, test with another; the whole is tried in test_sweep."""

import pytest

from detection.cross import read_operator


def test_an_operator_that_is_not_there_lists_the_choices():
    assert read_operator("pool").reduce == "max"
    with pytest.raises(ValueError, match=r"no operator polo; choose from align.*pool"):
        read_operator("polo")
