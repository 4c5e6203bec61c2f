import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.model.build import build_detector
from roi_quantization.detection.model.faster_rcnn import ProposalNetwork
from tests.configuration import composed
from tests.detection.model.test_fast_rcnn import batch

SMALL = ["head.box_head.hidden=8", "backbone.width=0.0625", "head.score_threshold=0"]


def build(*overrides):
    torch.manual_seed(0)
    return build_detector(composed("train", "detector=faster_rcnn", *SMALL, *overrides), num_classes=3)


def images_and_targets():
    """Without proposals."""
    images, targets = batch((64, 96), (48, 80))
    return images, [{name: value for name, value in target.items() if name != "proposals"} for target in targets]


def network(**options):
    torch.manual_seed(0)
    return ProposalNetwork(8, sizes=[16, 32], **options)


def features_and_targets():
    torch.manual_seed(1)
    images, features = ImageList(torch.zeros(2, 0, 128, 128), [(128, 100), (120, 128)]), {"0": torch.rand(2, 8, 8, 8)}
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [60.0, 30.0, 90.0, 110.0]])
    return images, features, [{"boxes": boxes, "image_id": 3}, {"boxes": boxes[:0], "image_id": 5}]


def test_training_gives_losses_that_reach_every_weight():
    detector = build()
    detections, losses = detector.train()(*images_and_targets())
    assert detections == [] and set(losses) == {"loss_classifier", "loss_box", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in detector.parameters())


def assert_coordinates_are_kept(detector, images, targets):
    """Where layers compute in 16 bits. torchvision gives anchors and proposals the dtype of the maps: 301.3 pixels are 302 in bfloat16."""
    proposals = []
    detector.rpn.register_forward_hook(lambda *call: proposals.extend(call[-1][0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, losses = detector(images, targets)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    for boxes in (*proposals, *(of_image["boxes"] for of_image in found)):
        assert boxes.dtype == torch.float32 and len(boxes) and not torch.equal(boxes, boxes.bfloat16().float())


@pytest.mark.parametrize("training", [True, False])
def test_mixed_precision_leaves_coordinates_in_float32(training):
    assert_coordinates_are_kept(build().train(training), *images_and_targets())


def test_evaluation_finds_boxes_with_the_proposals_of_the_network():
    detector = build("detector.rpn.after_nms.testing=7").eval()
    images, targets = images_and_targets()
    with torch.no_grad():
        detections, losses = detector(images, targets)
        blind, nothing = detector(images, [{name: target[name] for name in ("image_id", "original_size")} for target in targets])
    assert set(losses) == {"loss_classifier", "loss_box", "loss_objectness", "loss_rpn_box_reg"} and nothing == {}
    for detection, other, target in zip(detections, blind, targets, strict=True):
        assert 0 < len(detection["proposals"].unique(dim=0)) <= 7
        height, width = target["original_size"]
        assert (detection["proposals"] <= torch.tensor([width, height, width, height])).all()
        assert torch.equal(detection["boxes"], other["boxes"]), "nothing of the targets reaches them"
        assert detection["best_overlap"].shape == (1,) and "best_overlap" not in other


def test_proposals_and_losses_are_torchvisions():
    """Where all anchors are sampled."""
    mine = network(anchors_per_image=10_000, foreground_fraction=1.0)
    its = RegionProposalNetwork(
        mine.anchor_generator, mine.head, 0.7, 0.3, 10_000, 1.0,
        {"training": 2000, "testing": 1000}, {"training": 1000, "testing": 300}, 0.7,
    )  # fmt: skip
    for mode in (True, False):
        proposals, losses = mine.train(mode)(*features_and_targets())
        expected, expected_losses = its.train(mode)(*features_and_targets())
        assert all(torch.equal(one, other) for one, other in zip(proposals, expected, strict=True))
        assert set(losses) == {"loss_objectness", "loss_rpn_box_reg"}
        if mode:
            in_training = losses
            torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(losses, in_training)


def sampled(rpn, images, features, targets):
    anchors = rpn.anchor_generator(images, list(features.values()))
    return [label >= 0 for label in rpn.assign_targets_to_anchors(anchors, targets)[0]]


def test_a_seed_the_epoch_and_the_image_decide_which_anchors_are_sampled():
    rpn = network(anchors_per_image=16)
    images, features, targets = features_and_targets()
    first, second = sampled(rpn, images, features, targets)
    assert first.sum() == second.sum() == 16
    alone = sampled(rpn, ImageList(images.tensors[1:], images.image_sizes[1:]), {"0": features["0"][1:]}, targets[1:])
    assert torch.equal(alone[0], second), "the batch has no say"
    rpn.epoch = 1
    assert not torch.equal(sampled(rpn, images, features, targets)[0], first)


def test_background_in_a_crowd_region_is_not_sampled():
    rpn = network(anchors_per_image=10_000, foreground_fraction=1.0)
    images, features, targets = features_and_targets()
    targets[1]["crowd"] = torch.tensor([[0.0, 0.0, 64.0, 128.0]])
    _, beside = sampled(rpn, images, features, targets)
    anchors = rpn.anchor_generator(images, list(features.values()))[1]
    inside = (anchors[:, 2].clamp(max=64) - anchors[:, 0].clamp(min=0)).clamp(min=0) * (
        anchors[:, 3].clamp(max=128) - anchors[:, 1].clamp(min=0)
    ).clamp(min=0) >= 0.5 * (anchors[:, 2:] - anchors[:, :2]).prod(dim=1)
    assert inside.any() and torch.equal(beside, ~inside)


def test_the_epoch_reaches_the_network_in_training_alone():
    detector = build()
    detector.roi_heads.epoch = 4
    detector.train()(*images_and_targets())
    assert detector.rpn.epoch == 4
    detector.eval()(*images_and_targets())
    assert detector.rpn.epoch == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["proposals=grid"], r"proposals: this detector finds its own, and would not use these\. Set proposals=null"),
        (["detector.rpn.sizes=[]"], r"detector\.rpn: sizes and aspect_ratios of anchors are positive numbers"),
        (["detector.rpn.aspect_ratios=[0]"], r"detector\.rpn: sizes and aspect_ratios of anchors are positive numbers"),
        (["detector.rpn.background_iou=0.8"], r"expected 0 <= background_iou <= foreground_iou <= 1"),
    ],
)
def test_errors(overrides, message):
    with pytest.raises(InputError, match=message):
        build(*overrides)
