"""Frozen layers in ncnn give the maps that PyTorch gives, so that both fill the same file."""

import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from roi_quantization.detection.common.errors import InputError, MissingPackageError
from roi_quantization.detection.data.feature_cache import FeatureCache
from roi_quantization.detection.model.build import build_detector, instantiate
from roi_quantization.detection.model.vgg16 import VGG16
from roi_quantization.detection.runs.frozen_features import FrozenFeatures
from roi_quantization.detection.runs.ncnn_layers import ncnn_layers
from tests.configuration import composed
from tests.trainings import TINY

needs_ncnn = pytest.mark.skipif(not (find_spec("ncnn") and find_spec("pnnx")), reason="ncnn or pnnx is missing")
SIZES = [(64, 96), (96, 224), (160, 32)]


def vgg(**settings):
    torch.manual_seed(0)
    frozen, _ = VGG16(width=0.125, frozen_blocks=5, **settings).eval().split()
    for layer in frozen:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -1, 1), nn.init.uniform_(layer.running_var, 0.5, 2)
    return frozen


@needs_ncnn
@pytest.mark.parametrize("settings", [{}, {"norm": "batch"}])
@torch.inference_mode()
def test_the_maps_are_those_of_the_layers_at_every_size(settings):
    frozen = vgg(**settings)
    run = ncnn_layers(frozen, threads=1)
    for height, width in SIZES:
        batch = torch.randn(1, 3, height, width).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(run(batch), frozen(batch), rtol=1e-4, atol=1e-5)


@needs_ncnn
def test_layers_that_cannot_be_converted_are_refused():
    class Unknown(nn.Module):
        def forward(self, batch):
            return torch.linalg.svd(batch)[1]

    with pytest.raises(InputError, match=r"cannot convert the frozen layers of Unknown.*choose features=cached"):
        ncnn_layers(Unknown())


@needs_ncnn
def test_other_values_are_refused(monkeypatch):
    monkeypatch.setattr("roi_quantization.detection.runs.ncnn_layers.LARGEST_DIFFERENCE", 1e-12)
    with pytest.raises(
        InputError, match=r"ncnn gives other values for the frozen layers of Sequential, apart by .*: choose features=cached"
    ):
        ncnn_layers(vgg(), threads=1)


@needs_ncnn
def test_a_file_is_shared_with_the_maps_of_pytorch(tmp_path, monkeypatch):
    cfg = composed(
        "train", *TINY, "backbone.frozen_blocks=5", "features=cached_ncnn", f"data.root={tmp_path}/set", f"features.cache_dir={tmp_path}"
    )
    torch.manual_seed(0)
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup("test")
    detector = build_detector(cfg, len(data.categories) + 1)
    instantiate(cfg.features).attach(detector, data)
    by_ncnn = data.test[0][1]["features"]
    monkeypatch.setattr(FeatureCache, "_compute", None)  # nothing is missing
    FrozenFeatures(tmp_path).attach(detector, data)
    with torch.inference_mode():
        frozen, _ = detector.backbone.split()
        data.test.features = None
        expected = frozen(detector.batch([data.test[0][0]]))[0]
    torch.testing.assert_close(by_ncnn.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_another_precision_is_refused(precision):
    with pytest.raises(InputError, match=rf"features.precision={precision}.*features.precision=32-true"):
        FrozenFeatures("unused", precision, run_layers=ncnn_layers)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ncnn", None)
    with pytest.raises(MissingPackageError, match=r"features=cached_ncnn needs ncnn and pnnx.*\[fast-features\]"):
        ncnn_layers(vgg())
