"""Values are held against annotations. Keys and names of targets are, in test_build.py, those of the shipped configurations."""

import re
from collections.abc import Sequence

import pytest
from omegaconf import OmegaConf

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.model.build import instantiate


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ({"count": 2.5}, "a whole number"),
        ({"count": True}, "a whole number"),
        ({"count": None}, "a whole number"),
        ({"count": 2.0}, None),
        ({"count": {"_target_": "builtins.int"}}, None),
        ({"count": {"a": 3}}, "a whole number"),
        ({"share": "a"}, "a number or true or false or null"),
        ({"share": [0.5]}, "a number or true or false or null"),
        ({"share": None}, None),
        ({"share": False}, None),
        ({"flag": 1}, None),
        ({"flag": 2}, "true or false"),
        ({"flag": "yes"}, "true or false"),
        ({"old": None}, None),
        ({"names": "abc"}, "a list or null"),
        ({"names": 3}, "a list or null"),
        ({"names": ["abc"]}, None),
        ({"either": "abc"}, None),
        ({"anything": [3]}, None),
    ],
)
def test_a_value_is_one_that_the_annotation_allows(setting, wanted, monkeypatch):
    node = OmegaConf.create({"part": {"_target_": "tests.detection.common.test_instantiation.takes", **setting}})
    instantiate(node)
    monkeypatch.setattr("roi_quantization.detection.common.instantiation.ANNOTATED", ("tests.",))
    if wanted is None:
        instantiate(node)
    else:
        ((key, value),) = setting.items()
        with pytest.raises(InputError, match=re.escape(f"part.{key}={value}: expected {wanted}")):
            instantiate(node)


def test_annotations_of_others_are_not_read():
    node = OmegaConf.create([{"_target_": "tests.detection.common.test_instantiation.in_words", "side": 3}])
    assert instantiate(node) == [3]
    node = OmegaConf.create({"parts": [{"_target_": "tests.detection.common.test_instantiation.in_words", "width": 3}]})
    with pytest.raises(InputError, match=r"^parts\[0\]\.width: .* It has side$"):
        instantiate(node)


def in_words(side: "number of pixels" = 1):  # noqa: F722
    return side


def takes(
    count: int = 1,
    share: float | bool | None = 0.5,
    old: int = None,  # noqa: RUF013 - as older code is annotated
    flag: bool = True,
    names: Sequence[str] | None = None,
    either: int | str = 3,
    anything=None,
):
    return count, share, old, flag, names, either, anything
