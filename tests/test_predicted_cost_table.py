"""benchmarks/predicted_cost.py: the tables of docs/predicted_cost.md, its picture, and rough predictions."""

import math

import pytest

from tests.configuration import ROOT
from tests.detection.evaluation.coco_sets import annotation, coco


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import predicted_cost

    return predicted_cost


def test_the_document_has_the_tables_of_the_numbers(script):
    text = (ROOT / "docs" / "predicted_cost.md").read_text()
    tables = script.format_tables(script.read_rows(ROOT / "benchmarks" / "predicted_cost.csv")).split("\n\n")
    assert [table in text for table in tables] == [True, True]


def test_errors_and_correlation_of_a_setting(script, tmp_path):
    path = tmp_path / "rows.csv"
    head = "setting,operator,predicted,predicted_low,predicted_high,measured,measured_low,measured_high"
    rows = ["a,x,-1,-2,0,-3,,", "a,y,-5,,,-4,-6,-2", "a,z,0,,,0,,", "a,w,-2,,,-2,,", "b,x,-7,,,,,", "c,x,-1,,,-1,,"]
    path.write_text("\n".join([head, *rows]))
    found = script.read_rows(path)
    assert [row.error for row in found[:4]] == [2, -1, 0, 0] and math.isnan(found[4].error)
    text = script.format_tables(found)
    assert "| a | `x` | -1.0 [-2.0, +0.0] | -3.0 | +2.0 |" in text and "| b | `x` | -7.0 |  | not measured yet |" in text
    assert text.splitlines()[-3:-1] == ["| a | 4 | 0.75 | 0.80 |", "| c | 1 | 0.00 | - |"]
    script.plot(found, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("side", "worst", "best"), [(64, -25, -12), (640, -1.5, 0.5)])
def test_a_rough_prediction_depends_on_the_size_in_cells(script, side, worst, best):
    """Objects of 2 and of 20 cells. The levels are those that were given: AP75 / AP50 chooses the spread."""
    truth = coco(*[annotation(1, id=i, bbox=[0, 0, side, side]) for i in range(1, 41)], images=(1,))
    truth.imgs[1].update(width=800, height=800)
    level, changes = script.rough_prediction(truth, {"AP50": 60.0, "AP75": 40.0}, 32, 800, 1333, ["pool", "align"])
    assert 30 < level < 40
    assert changes["align"] == pytest.approx([0, 0, 0], abs=0.05)
    assert worst < changes["pool"][0] < best
