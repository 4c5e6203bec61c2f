"""Memory of the CPU kernels: the pages of large outputs, and what maxima over large boxes look up."""

import re
from pathlib import Path

import pytest
import torch

from roi_quantization import ops
from roi_quantization.ops import library
from roi_quantization.ops.cpu import kernels, pages

from .presets import preset, random_boxes
from .test_against_reference import assert_same, feature_map, results

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="needs Linux with transparent huge pages")
@pytest.mark.parametrize("operator", [ops.roi_align, ops.roi_pool])
def test_large_pages_are_asked_for_large_outputs(operator):
    boxes = torch.tensor([[0.0, 0, 0, 7, 7]]).expand(pages.LEAST // (256 * 49 * 4) + 1, 5)
    out = operator(torch.ones(1, 256, 8, 8), boxes, 7)
    middle = out.data_ptr() + out.nbytes // 2
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(edge, 16) for edge in mapping.split()[0].split("-"))
        if start <= middle < end:
            assert " hg" in mapping.rsplit("VmFlags:")[1]
            return
    raise AssertionError("the output is in no mapping")


@pytest.mark.parametrize("name", ["pool", "align_max"])
def test_maxima_computed_in_chunks_of_rois_are_the_same(name, monkeypatch):
    boxes = torch.cat([random_boxes(40, 2, 160, 128), torch.tensor([[1.0, 0, 0, 160, 128]]).double().repeat(60, 1)]).float()
    args = feature_map(2, 150, 8, 10, dtype=torch.float32), boxes, (2, 3), 1 / 16, False
    operator = preset(name, sampling_ratio=8) if name == "align_max" else preset(name)
    whole, looked_up = results(operator, *args), []
    lattice_samples = kernels.max_kernels.lattice_samples

    def watched(*arrays):
        samples = lattice_samples(*arrays)
        looked_up.append(len(samples[5]))
        return samples

    monkeypatch.setattr(kernels, "MOST_SAMPLES", 1)
    monkeypatch.setattr(kernels.max_kernels, "lattice_samples", watched)
    assert_same(results(operator, *args), whole, rtol=0, atol=0)
    assert len(looked_up) > 2 and max(looked_up) <= 16 * 2 * 8 * 10, "sixteen samples a cell of the map"


@pytest.fixture
def filled_memory(monkeypatch):
    """A command that a test ran in this process may have switched it off."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


@pytest.fixture
def deterministic_mode(filled_memory):
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("operator", [ops.roi_align, ops.prroi_pool])
def test_deterministic_mode_does_not_fill_what_the_kernels_write(operator, monkeypatch, deterministic_mode):
    """PyTorch's deterministic mode fills fresh memory, which takes a GPU as long as to write it."""
    fills, kernels_of = [], library.kernels

    def watched(device):
        fills.append(torch.utils.deterministic.fill_uninitialized_memory)
        return kernels_of(device)

    monkeypatch.setattr(library, "kernels", watched)
    features = torch.ones(1, 2, 4, 4, requires_grad=True)
    operator(features, torch.tensor([[0.0, 0, 0, 3, 3]]), 2).sum().backward()
    assert fills == [False, False]
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_calls_that_overlap_restore_the_fill_of_deterministic_mode(deterministic_mode):
    """As those of two threads do; the setting is that of the process."""
    first, second = library.unfilled_memory(), library.unfilled_memory()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.utils.deterministic.fill_uninitialized_memory, "the second still allocates"
    second.__exit__(None, None, None)
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_outside_deterministic_mode_the_setting_is_left_alone(filled_memory):
    with library.unfilled_memory():
        assert torch.utils.deterministic.fill_uninitialized_memory
