from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, googlenet, resnet18
from torchvision.ops import FrozenBatchNorm2d

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.model.build import build_detector
from roi_quantization.detection.model.torchvision_backbone import IMAGENET, TorchvisionBackbone
from tests.configuration import composed

C4 = {"name": "resnet18", "layer": "layer3", "stride": 16}


@pytest.fixture(scope="module")
def network():
    """With statistics, as a trained one."""
    torch.manual_seed(0)
    network = resnet18().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
    return network


@pytest.fixture
def weights(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "own.pth")
    return str(tmp_path / "own.pth")


def up_to_layer3(network, images):
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    return network.layer3(network.layer2(network.layer1(x)))


@pytest.mark.parametrize("frozen_norm", [True, False])
def test_the_map_is_that_of_the_layer(network, weights, frozen_norm):
    backbone = TorchvisionBackbone(**C4, weights=weights, frozen_norm=frozen_norm).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        found = backbone(images)
        torch.testing.assert_close(found, up_to_layer3(network, images))
    assert found.shape == (2, 256, 4, 6) and backbone.out_channels == 256
    assert not any(key.startswith(("body.layer4", "body.fc")) for key in backbone.state_dict()), "what is not used is left out"
    assert (backbone.mean, backbone.std) == (IMAGENET["mean"], IMAGENET["std"])


def test_a_layer_inside_of_another_and_another_network():
    backbone = TorchvisionBackbone(name="mobilenet_v3_small", layer="features.3", stride=8)
    assert backbone(torch.rand(1, 3, 64, 64)).shape == (1, backbone.out_channels, 8, 8)


def test_weights_by_name_are_torchvisions(network, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    backbone = TorchvisionBackbone(**C4, weights="IMAGENET1K_V1")
    assert torch.equal(backbone.body.conv1.weight, network.conv1.weight)
    assert backbone.mean == pytest.approx(IMAGENET["mean"])


def test_frozen_layers_and_norms_stay_as_they_are(weights):
    """Norms that are not frozen learn, and those of a frozen layer keep their statistics."""
    for frozen_norm in (True, False):
        torch.manual_seed(0)
        backbone = TorchvisionBackbone(**C4, weights=weights, frozen=["conv1", "bn1", "layer1"], frozen_norm=frozen_norm).train()
        kinds = {type(module) for module in backbone.modules()}
        assert (FrozenBatchNorm2d in kinds, nn.BatchNorm2d in kinds) == (frozen_norm, not frozen_norm)
        before = {key: value.clone() for key, value in backbone.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
        backbone(torch.rand(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
        changed = {key.split(".")[1] for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
        assert changed == {"layer2", "layer3"}
        norms = {key for key, value in backbone.state_dict().items() if "running" in key and not torch.equal(value, before[key])}
        assert bool(norms) == (not frozen_norm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet51"}, r"backbone\.name=resnet51: torchvision has no such classification network\. It has .*resnet50"),
        ({"name": "fasterrcnn_resnet50_fpn"}, r"no such classification network"),
        ({"layer": "layer5"}, r"backbone\.layer=layer5: resnet18 has no such layer\. It has .*layer3.*, and layers in these"),
        ({"stride": 32}, r"backbone\.stride=32: the stride of layer3 of resnet18 is 16\. Set backbone\.stride=16"),
        ({"layer": "flatten"}, r"backbone\.layer: flatten of resnet18 makes \[1, 512\] .*, which is no map of whole strides"),
        ({"weights": "IMAGENET1K_V7"}, r"backbone\.weights=IMAGENET1K_V7: no such file, and no name .* resnet18 \(IMAGENET1K_V1"),
        ({"weights": __file__}, r"backbone\.weights=.*py: not the state dict of torchvision's resnet18: .* is not a readable file"),
        ({"frozen": ["layer4"]}, r"backbone\.frozen: resnet18 has no layer layer4 up to layer3\. It has conv1, bn1"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(InputError, match=message):
        TorchvisionBackbone(**C4 | settings)


def test_weights_of_another_network(weights):
    with pytest.raises(InputError, match=r"not the state dict of torchvision's resnet50"):
        TorchvisionBackbone(name="resnet50", layer="layer3", stride=16, weights=weights)


@pytest.mark.parametrize(
    ("name", "weights", "mean", "std"),
    [
        ("resnet18", "IMAGENET1K_V1", *IMAGENET.values()),
        ("efficientnet_v2_l", "IMAGENET1K_V1", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("efficientnet_v2_l", "own.pth", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("efficientnet_v2_l", None, *IMAGENET.values()),
        ("vgg16", "IMAGENET1K_FEATURES", (0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)),
        ("vgg16", "own.pth", *IMAGENET.values()),
    ],
)
def test_pixels_are_those_of_the_weights(name, weights, mean, std):
    backbone = SimpleNamespace(name=name)
    TorchvisionBackbone.normalize_as(backbone, weights)
    assert backbone.mean == pytest.approx(mean, abs=1e-4) and backbone.std == pytest.approx(std, abs=1e-4)


normalize = TorchvisionBackbone.normalize_as


def test_a_checkpoint_expects_the_pixels_of_the_weights_that_it_was_trained_from(monkeypatch):
    asked = []
    monkeypatch.setattr(TorchvisionBackbone, "normalize_as", lambda self, weights: asked.append(weights) or normalize(self, weights))
    options = ["backbone=torchvision", "backbone.name=resnet18", "backbone.layer=layer3", "backbone.stride=16", "head=two_fc_small"]
    build_detector(composed("train", *options, "backbone.weights=IMAGENET1K_V1"), num_classes=3, pretrained=False)
    assert asked[-1] == "IMAGENET1K_V1"


def test_googlenet_has_the_input_that_its_weights_were_trained_with(tmp_path):
    """Its builder sets `transform_input` where it loads weights."""
    torch.manual_seed(0)
    network = googlenet(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(network.state_dict(), tmp_path / "own.pth")
    backbone = TorchvisionBackbone("googlenet", "inception3a", 8, weights=str(tmp_path / "own.pth")).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found, x = backbone(images), network._transform_input(images)
        for layer in ("conv1", "maxpool1", "conv2", "conv3", "maxpool2", "inception3a"):
            x = getattr(network, layer)(x)
    torch.testing.assert_close(found, x)
