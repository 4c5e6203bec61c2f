"""probe.py from end to end, on a few small images and a small network with random weights."""

import numpy as np
import pytest
from omegaconf import OmegaConf

from roi_quantization.detection.common.errors import InputError
from roi_quantization.scripts import probe as script
from roi_quantization.scripts.probe import probe_operators
from tests import configuration

TINY = ["data.source.train=1", "data.source.val=1", "data.source.test=8", "data.source.image_size=128", "data.source.sides=[32,64]"]
TINY += ["proposals.step=0.2", "backbone=vgg16_small", "operators=[warp]", "resamples=50", "channels=4", "output_size=3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "embedded"


def composed(data, *overrides):
    return configuration.composed("probe", f"data.root={data}", *TINY, *overrides)


def test_from_images_to_the_table(data, capsys, monkeypatch):
    own = OmegaConf.create({"_target_": "torchvision.ops.roi_align", "_partial_": True, "sampling_ratio": 2, "aligned": True})
    read = script.read_operator
    monkeypatch.setattr(script, "read_operator", lambda name: own if name == "mine" else read(name))
    found = probe_operators(composed(data, "operators=[warp,mine]"))
    assert list(found.iou) == ["align", "warp", "mine"] and len(found.before) > 8
    assert np.abs(found.iou["mine"] - found.iou["align"]).max() < 1e-4, "the same operator from another project"
    assert np.abs(found.iou["warp"] - found.iou["align"]).max() > 1e-3
    text = capsys.readouterr().out
    assert "The backbone has random weights" in text and "VGG16 at stride 16" in text and "\nwarp " in text
    again = probe_operators(composed(data))
    assert np.array_equal(again.iou["warp"], found.iou["warp"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rois_per_object=0", "rois_per_object=0: expected a whole number from 1 on"),
        ("channels=none", "channels=none: expected a whole number from 1 on"),
        ("data.subset=3", "3 images have a proposal that overlaps an object by IoU 0.5, the probe needs 5"),
        ("proposals.scales=[0.02]", "No proposal overlaps an object by IoU 0.5"),
        ("operators=[rol]", "there is no operator rol"),
        ("split=train", "split=train: expected test or val"),
    ],
)
def test_mistakes_are_named(data, override, message):
    with pytest.raises(InputError, match=message):
        probe_operators(composed(data, override))
