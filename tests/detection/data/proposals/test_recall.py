"""Recall, and the table of it, by hand."""

import math

import pytest
import torch

from roi_quantization.detection.data.proposals.recall import format_recall, recall, recall_table


def test_recall_counts_objects_over_all_images():
    box = torch.tensor([[0.0, 0, 10, 10]])
    half = torch.tensor([[0.0, 0, 10, 5]])  # IoU exactly 0.5
    three_images = recall([box, half, torch.zeros(0, 4)], [box, box, torch.cat([box, box])])
    assert three_images == {0.5: 2 / 4, 0.75: 1 / 4}


def test_recall_of_nothing_is_not_a_number():
    assert math.isnan(recall([torch.zeros(3, 4)], [torch.zeros(0, 4)])[0.5])
    assert math.isnan(recall([], [])[0.75])


class TestTable:
    # a small object that is met exactly by the second window, a large one of which the first window has 0.8
    OBJECTS = torch.tensor([[0.0, 0, 10, 10], [0, 0, 100, 100]])
    WINDOWS = torch.tensor([[0.0, 0, 100, 80], [0, 0, 10, 10]])

    def rows(self, counts=(1, None), empty=False):
        images = [(self.WINDOWS, self.OBJECTS)] + [(torch.zeros(0, 4), self.OBJECTS[:1])] * empty
        return {(row["windows"], row["size"]): row for row in recall_table(images, counts)}

    def test_by_size_and_number_of_windows(self):
        rows = self.rows()
        assert (rows[1, "small"]["R50"], rows[None, "small"]["R50"]) == (0, 100)
        assert rows[None, "small"]["AR"] == 100
        assert (rows[1, "large"]["R75"], rows[1, "large"]["AR"]) == (100, pytest.approx(70)), "0.5, 0.55, ... 0.8: seven of ten"
        assert (rows[1, "all"]["R75"], rows[None, "all"]["AR"]) == (50, pytest.approx(85))
        assert [rows[1, size]["objects"] for size in ("all", "small", "medium", "large")] == [2, 1, 0, 1]
        assert math.isnan(rows[1, "medium"]["AR"])

    def test_objects_of_images_without_windows_are_missed(self):
        assert self.rows(empty=True)[None, "small"]["R50"] == 50

    def test_the_sizes_are_cocos_and_a_border_belongs_to_the_larger(self):
        squares = torch.tensor([[0.0, 0, side, side] for side in (31.9, 32.0, 95.9, 96.0)])
        rows = recall_table([(squares, squares)], [None])
        assert [row["objects"] for row in rows] == [4, 1, 2, 1]

    def test_the_text_has_a_line_for_each_number(self):
        text = format_recall(list(self.rows().values()))
        assert text.splitlines()[0].split() == ["objects", "all", "(2)", "small", "(1)", "medium", "(0)", "large", "(1)"]
        assert text.splitlines()[2].split() == ["1", "35.0", "50.0", "50.0", "0.0", "0.0", "0.0", "-", "-", "-", "70.0", "100.0", "100.0"]
        assert text.splitlines()[3].startswith("    all     85.0  100.0  100.0")
        assert max(map(len, text.splitlines())) <= 94
