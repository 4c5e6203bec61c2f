"""How numbers turn to text."""

import math

from roi_quantization.detection.evaluation.statistics import Estimate
from roi_quantization.detection.report.findings import describe_operator
from roi_quantization.detection.report.tables import Column, Table, format_estimate, format_number, format_p_value
from tests.ops.presets import PRESETS, preset


def test_an_interval_is_shown_by_its_half_width_or_by_its_ends():
    assert format_estimate()(Estimate(70.0, 68.0, 72.0)) == "70.0 ± 2.0"
    assert format_estimate(signed=True)(Estimate(3.0, 2.0, 4.0)) == "+3.0 ± 1.0"
    assert format_estimate()(Estimate(70.0, 65.0, 72.0)) == "70.0 [65.0, 72.0]"
    assert format_estimate()(Estimate(70.0)) == "70.0"


def test_what_there_is_not_is_a_dash():
    assert format_number()(math.nan) == "-" and format_p_value(math.nan) == "-" and format_p_value("") == "-"
    assert format_p_value(0.0004) == "< 0.001" and format_p_value(0.0316) == "0.032"


def test_csv_has_an_estimate_in_five_columns_and_nothing_for_nan():
    table = Table("t", "", (Column("arm"), Column("AP")), (("a", Estimate(1.5, 1.0, 2.0, p_value=0.25, n=3)), ("b", Estimate(2.0))))
    assert table.csv == "arm,AP,AP low,AP high,AP p,AP n\na,1.5,1.0,2.0,0.25,3\nb,2.0,,,,1\n"


def test_operators_in_words():
    words = {name: describe_operator(preset(name)) for name in PRESETS}
    assert words["align"] == ("exact", "exact, 2 x 2 samples", "mean")
    assert words["pool"] == ("rounded, + 1", "whole cells", "max")
    assert words["pool_floor"] == ("floored", "whole cells, rest lost", "max")
    assert words["align_no_half_pixel"] == ("exact, half a pixel off", "exact, 2 x 2 samples", "mean")
    assert words["prroi"] == ("exact, half a pixel off", "exact", "integral")
    told = set(words.values())
    assert len(told) == len(words), "no two presets are told alike"
