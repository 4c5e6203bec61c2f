import pytest
import torch
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from roi_quantization.detection.model.vgg16 import VGG16


@pytest.mark.parametrize("stride, side", [(16, 32), (32, 16)])
def test_a_512_image_at_either_stride(stride, side):
    """With pool5 the map of a 512 x 512 image is 16 x 16, without it 32 x 32."""
    backbone = VGG16(stride=stride, width=0.125).eval()
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, 512, 512)).shape == (1, 64, side, side)
    assert (backbone.stride, backbone.out_channels) == (stride, 64)


def test_full_width_has_torchvisions_names_and_numbers(tmp_path):
    theirs = nn.ModuleDict({"features": make_layers(cfgs["D"])}).eval()  # what vgg16() is made of, without its classifier
    torch.save({name: value.half() for name, value in theirs.state_dict().items()}, tmp_path / "vgg16.pth")
    ours = VGG16(stride=32, weights=tmp_path / "vgg16.pth").eval()
    theirs.load_state_dict({name: value.half().float() for name, value in theirs.state_dict().items()})
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(image), theirs["features"](image))


def _batch_norm_file(path, width=0.125):
    torch.save(VGG16(stride=32, width=width, norm="batch").state_dict(), path)
    return path


def test_weights_of_batch_norm_fit_both_strides(tmp_path):
    path = _batch_norm_file(tmp_path / "bn.pth")
    for stride in (16, 32):
        VGG16(stride=stride, width=0.125, norm="batch", weights=path)


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"norm": "batch", "width": 0.25}, r"bn.pth: features.0.weight has shape \[8, 3, 3, 3\], the backbone has \[16, 3, 3, 3\]"),
        ({"norm": "none", "width": 0.125}, r"bn.pth lacks features.2.weight|bn.pth: features.\d+.\w+ has shape"),
    ],
)
def test_weights_that_do_not_fit_name_the_first_key(tmp_path, knobs, message):
    with pytest.raises(ValueError, match=message):
        VGG16(weights=_batch_norm_file(tmp_path / "bn.pth"), **knobs)


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    for path, message in [
        (tmp_path / "none.pth", "no such file, and no name of torchvision's VGG16 weights .IMAGENET1K_V1"),
        (tmp_path / "text.pth", "text.pth is not a readable file of weights"),
        (tmp_path / "foreign.pth", "expected a state dict with keys like 'features.0.weight'"),
    ]:
        with pytest.raises(ValueError, match=message):
            VGG16(weights=path)


@pytest.mark.parametrize("prepare", [lambda made: made, lambda made: made.eval().train()], ids=["as made", "in training mode again"])
def test_frozen_blocks_neither_learn_nor_count(prepare):
    """VGG16 has convolutions 2 + 2 + 3 + 3 + 3; freezing two blocks leaves nine. Their batch norm keeps its statistics."""
    backbone = prepare(VGG16(width=0.0625, norm="batch", frozen_blocks=2))
    convolutions = [layer for layer in backbone.features if isinstance(layer, nn.Conv2d)]
    assert [layer.weight.requires_grad for layer in convolutions] == [False] * 4 + [True] * 9
    norms = [layer for layer in backbone.features if isinstance(layer, nn.BatchNorm2d)]
    backbone(torch.rand(2, 3, 32, 32)).sum().backward()
    assert [layer.num_batches_tracked.item() for layer in norms] == [0] * 4 + [1] * 9


def test_all_five_blocks_can_be_frozen_at_stride_16():
    assert not any(parameter.requires_grad for parameter in VGG16(width=0.0625, frozen_blocks=5).parameters())


@pytest.mark.parametrize("knobs", [{"stride": 8}, {"norm": "group"}, {"frozen_blocks": 6}, {"width": 0}, {"width": -1.0}])
def test_what_there_is_not(knobs):
    with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
        VGG16(**knobs)
