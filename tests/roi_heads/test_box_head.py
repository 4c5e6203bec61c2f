import pytest
import torch

from roi_quantization.roi_heads import BoxPredictor, TwoFCHead, box_head
from roi_quantization.roi_heads.weights import load_vgg16


def test_shapes():
    head = TwoFCHead(in_channels=4, output_size=7, hidden=16)
    scores, deltas = BoxPredictor(16, num_classes=6)(head(torch.rand(5, 4, 7, 7)))
    assert (scores.shape, deltas.shape) == ((5, 6), (5, 24))


def test_a_class_agnostic_predictor_gives_every_class_the_same_box():
    predictor = BoxPredictor(16, num_classes=6, class_agnostic=True)
    scores, deltas = predictor(torch.rand(5, 16))
    assert (scores.shape, deltas.shape, predictor.bbox_pred.weight.shape) == ((5, 6), (5, 24), (4, 16))
    assert torch.equal(deltas.unflatten(1, (6, 4)), deltas[:, None, :4].expand(5, 6, 4)) and deltas.abs().sum() > 0


def test_no_rois_give_no_rows():
    assert TwoFCHead(in_channels=4, output_size=7, hidden=16)(torch.rand(0, 4, 7, 7)).shape == (0, 16)


def test_the_predictor_starts_as_in_the_paper():
    predictor = BoxPredictor(4096, num_classes=81)
    assert predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert predictor.cls_score.bias.abs().sum() == predictor.bbox_pred.bias.abs().sum() == 0


def _classifier(hidden, inputs):
    return {
        "features.0.weight": torch.zeros(1),
        "classifier.0.weight": torch.rand(hidden, inputs),
        "classifier.0.bias": torch.rand(hidden),
        "classifier.3.weight": torch.rand(hidden, hidden),
        "classifier.3.bias": torch.rand(hidden),
    }


def test_fc6_and_fc7_come_from_the_weights_also_in_half_precision(tmp_path):
    state = {name: value.half() for name, value in _classifier(hidden=6, inputs=2 * 3 * 3).items()}
    torch.save(state, tmp_path / "vgg16.pth")
    head = TwoFCHead(in_channels=2, output_size=3, hidden=6, weights=tmp_path / "vgg16.pth")
    assert torch.equal(head[1].weight, state["classifier.0.weight"].float())
    assert torch.equal(head[4].bias, state["classifier.3.bias"].float())


def test_weights_of_another_shape_name_the_layer_and_both_shapes(tmp_path):
    torch.save(_classifier(hidden=6, inputs=18), tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match=r"vgg16.pth: classifier.0.weight has shape \[6, 18\], the head wants \[6, 98\]"):
        TwoFCHead(in_channels=2, output_size=7, hidden=6, weights=tmp_path / "vgg16.pth")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TwoFCHead(in_channels=2, output_size=7, hidden=0), "hidden=0: expected a whole number from 1 on"),
        (lambda: BoxPredictor(4, 3, score_std=-1), "score_std=-1: expected a number from 0 on"),
        (lambda: BoxPredictor(4, 3, delta_std=-1), "delta_std=-1: expected a number from 0 on"),
    ],
)
def test_numbers_out_of_their_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_weights_without_fully_connected_layers_are_logged(tmp_path, caplog):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    TwoFCHead(in_channels=2, output_size=3, hidden=6, weights=tmp_path / "vgg16.pth")
    assert "fc6 and fc7 start random" in caplog.text


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_name_means_the_network_of_the_backbone(norm, monkeypatch):
    asked = []
    monkeypatch.setattr(box_head, "load_vgg16", lambda *_, batch_norm: asked.append(batch_norm) or _classifier(hidden=6, inputs=18))
    TwoFCHead(in_channels=2, output_size=3, hidden=6, weights="IMAGENET1K_V1", norm=norm)
    assert asked == [norm == "batch"]


def test_weights_for_other_pixel_scales_are_not_offered():
    with pytest.raises(ValueError, match=r"no name of torchvision's VGG16 weights \(IMAGENET1K_V1, DEFAULT\)"):
        load_vgg16("IMAGENET1K_FEATURES")
