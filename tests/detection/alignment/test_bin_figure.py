"""The weights that are told of a bin are those that the operator uses."""

import pytest
import torch

from roi_quantization.detection.alignment.bin_figure import samples_of
from roi_quantization.detection.alignment.explanation import explain
from tests.ops.presets import preset


@pytest.mark.parametrize("name", ["align", "warp", "warp_mnc", "pool", "pool_bins", "pool_floor"])
def test_the_weights_of_the_samples_are_the_operators(name):
    """One channel a cell, 1 in that cell: what the operator returns are the weights of the cells in a bin's mean."""
    operator = preset(name, reduce="mean")
    e = explain(name, operator, (3.0, 20.0, 131.0, 125.0), image_size=(128, 160), stride=16, bins=3)
    cells = torch.eye(8 * 10, dtype=torch.float64).view(1, 80, 8, 10)
    returned = operator(cells, [torch.tensor([[3.0, 20.0, 131.0, 125.0]], dtype=torch.float64)], 3, 1 / 16)[0].view(8, 10, 3, 3)
    for row, column in ((0, 0), (1, 2), (2, 1)):
        samples, weights = samples_of(e, row, column), torch.zeros(8, 10, dtype=torch.float64)
        for sample in samples:
            for i, j, weight in sample.taps:
                weights[j, i] += weight / len(samples)
        assert torch.allclose(weights, returned[..., row, column], atol=1e-5)


def test_a_bin_off_the_map_has_no_samples():
    # 12 pixels are a cell, with + 1 two; the second is beyond the map and its bin with it
    e = explain("pool", preset("pool"), (500, 500, 512, 512), image_size=(512, 512), stride=32, bins=3)
    with pytest.raises(ValueError, match=r"bin=\[2, 2\]: pool has no samples there, the bin lies off the map"):
        samples_of(e, 2, 2)


def test_an_integral_has_no_samples():
    e = explain("prroi", preset("prroi"), (100, 100, 300, 300), image_size=(512, 512), stride=32, bins=3)
    with pytest.raises(ValueError, match=r"prroi has no samples there, the operator integrates"):
        samples_of(e, 0, 0)
