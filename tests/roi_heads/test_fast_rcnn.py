"""Matching, sampling, losses and their corner cases, on boxes small enough to do by hand."""

import math
import re
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from roi_quantization.roi_heads import FastRCNNHeads, RoIExtractor
from roi_quantization.roi_heads.fast_rcnn import overlap

OBJECT = [0.0, 0.0, 10.0, 10.0]
PROPOSALS = torch.tensor(
    [
        [0.0, 0.0, 10.0, 10.0],  # IoU 1
        [0.0, 0.0, 10.0, 5.0],  # IoU 0.5, still foreground
        [0.0, 0.0, 10.0, 4.0],  # IoU 0.4
        [0.0, 0.0, 10.0, 1.0],  # IoU 0.1, the lower bound belongs to background
        [0.0, 0.0, 5.0, 1.0],  # IoU 0.05
        [20.0, 20.0, 30.0, 30.0],  # IoU 0
    ]
)


class Constant(nn.Module):
    """A predictor that gives every RoI the same scores and deltas."""

    def __init__(self, scores, deltas):
        super().__init__()
        self.scores, self.deltas = nn.Parameter(torch.tensor(scores)), nn.Parameter(torch.tensor(deltas))

    def forward(self, x):
        return self.scores.expand(len(x), -1), self.deltas.expand(len(x), -1)


def make(scores=(0.0, 0.0, 0.0), deltas=(0.0,) * 12, **knobs):
    extractor = RoIExtractor(partial(roi_align, sampling_ratio=2, aligned=True), output_size=2, spatial_scale=1 / 16)
    return FastRCNNHeads(extractor, nn.Flatten(), Constant(scores, deltas), **knobs)


def target(boxes=(OBJECT,), labels=(2,), **more):
    boxes, labels = torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "image_id": 7, **more}


def labels_of(heads, proposals, target):
    (labels,), _, _ = heads.match_and_sample([proposals], [target], epoch=0)
    return labels.tolist()


def test_labels_with_the_papers_bounds():
    assert labels_of(make(background_iou=(0.1, 0.5)), PROPOSALS, target()) == [2, 2, 0, 0, -1, -1]


def test_labels_without_the_lower_bound():
    assert labels_of(make(background_iou=(0.0, 0.5)), PROPOSALS, target()) == [2, 2, 0, 0, 0, 0]


def test_a_gap_between_background_and_foreground_is_not_sampled():
    assert labels_of(make(background_iou=(0.0, 0.3)), PROPOSALS, target()) == [2, 2, -1, 0, 0, 0]


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="background_iou"):
        make(background_iou=(0.5, 0.1))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("score_threshold", 50, "a number from 0 to 1"),
        ("nms_threshold", -1, "a number from 0 to 1"),
        ("foreground_iou", 50, "a number from 0 to 1"),
        ("foreground_fraction", float("nan"), "a number from 0 to 1"),
        ("detections_per_image", 0, "a whole number from 1 on"),
        ("rois_per_image", 0, "a whole number from 1 on"),
        ("smooth_l1_beta", -1, "a number from 0 on"),
        ("background_iou", [0.5], "[low, high]"),
        ("box_weights", [10, 10], "four numbers above 0"),
        ("box_weights", [10, 10, 5, 0], "four numbers above 0"),
    ],
)
def test_percent_and_nothing_at_all_are_refused(name, value, expected):
    with pytest.raises(ValueError, match="^" + re.escape(f"{name}={value}: expected {expected}")):
        make(**{name: value})


def test_background_inside_a_crowd_is_not_sampled_but_foreground_is():
    """The crowd covers all but the last proposal and just half of that one."""
    crowd = torch.tensor([[0.0, 0.0, 15.0, 15.0], [25.0, 0.0, 99.0, 99.0]])
    assert labels_of(make(background_iou=(0.0, 0.5)), PROPOSALS, target(crowd=crowd)) == [2, 2, -1, -1, -1, -1]
    assert labels_of(make(background_iou=(0.0, 0.5), crowd_overlap=0.51), PROPOSALS, target(crowd=crowd)) == [2, 2, -1, -1, -1, 0]


def test_overlap_is_a_part_of_the_boxs_own_area():
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    assert overlap(boxes, torch.tensor([[2.0, 0.0, 9.0, 9.0], [5.0, 5.0, 6.0, 6.0]])).tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_an_image_without_objects_is_background_or_nothing():
    empty = target(boxes=(), labels=())
    assert labels_of(make(background_iou=(0.0, 0.5)), PROPOSALS, empty) == [0] * 6
    assert labels_of(make(background_iou=(0.1, 0.5)), PROPOSALS, empty) == [-1] * 6


def test_sampling_takes_a_quarter_of_foreground_at_most():
    heads = make(rois_per_image=8, background_iou=(0.0, 0.5))
    proposals = torch.cat([PROPOSALS[:1].repeat(20, 1), PROPOSALS[5:].repeat(20, 1)])
    (sampled,) = heads.sample([proposals], [target()], epoch=0)
    assert sampled.labels.tolist() == [2] * 2 + [0] * 6 and sampled.foreground.tolist() == [0, 1]
    assert torch.equal(sampled.proposals, proposals[sampled.rows])


def test_seed_epoch_and_image_decide_the_sample_and_nothing_else(monkeypatch):
    def refuse_to_seed(_):
        raise AssertionError("dropout on a GPU draws from these generators")

    proposals = PROPOSALS.repeat(20, 1)

    def draw(seed=0, epoch=0, image_id=7, beside=()):
        heads = make(rois_per_image=8, seed=seed)
        targets = [*beside, target() | {"image_id": image_id}]
        return heads.match_and_sample([proposals] * len(targets), targets, epoch)[2][-1].tolist()

    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse_to_seed)
    before = torch.random.get_rng_state()
    first = draw()
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"
    torch.default_generator.manual_seed(1)
    assert draw() == first
    assert draw(beside=[target()]) == first, "nor does the rest of the batch matter"
    assert first not in (draw(seed=1), draw(epoch=1), draw(image_id=8))


def test_ground_truth_is_among_the_proposals_of_training_only_where_wanted():
    far = torch.tensor([[20.0, 20.0, 30.0, 30.0]])
    features = torch.rand(1, 3, 4, 4)
    for append, foreground in ((True, 1), (False, 0)):
        heads = make(append_ground_truth=append, background_iou=(0.0, 0.5), deltas=(1.0,) * 12)
        _, losses = heads(features, [far], [(64, 64)], [target()])
        assert (losses["loss_box"] > 0).item() == bool(foreground)


def test_losses_by_hand():
    """One foreground RoI on its object (targets 0) and one background: the box loss is one smooth L1 over four deltas, halved by the count.

    |delta| = 2 with beta 1 costs 2 - 1/2 = 1.5 a coordinate; with beta 4 it is in the square part, 2^2 / (2 * 4) = 0.5. The scores are
    equal: ln 3.
    """
    deltas = (0.0,) * 8 + (2.0,) * 4  # of class 2 alone
    proposals = [PROPOSALS[[0, 5]]]
    for beta, box_loss in ((1.0, 4 * 1.5 / 2), (4.0, 4 * 0.5 / 2)):
        heads = make(deltas=deltas, background_iou=(0.0, 0.5), append_ground_truth=False, smooth_l1_beta=beta)
        _, losses = heads(torch.rand(1, 3, 4, 4), proposals, [(64, 64)], [target()])
        assert losses["loss_box"].item() == pytest.approx(box_loss)
        assert losses["loss_classifier"].item() == pytest.approx(math.log(3))


def test_targets_are_divided_by_their_deviations():
    """The proposal must move by 5 of its 10 pixels: 0.5 / 0.1 = 5; and double in height: ln 2 / 0.2."""
    moved = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    heads = make(foreground_iou=0.1, background_iou=(0.0, 0.1))
    (sampled,) = heads.sample([moved], [target(boxes=([5.0, -5.0, 15.0, 15.0],))], epoch=0)
    assert sampled.regression_targets[0].tolist() == pytest.approx([5.0, 0.0, 0.0, math.log(2) / 0.2])


def test_training_without_targets_is_refused():
    with pytest.raises(ValueError, match="targets: training needs those of each image"):
        make()(torch.rand(1, 3, 4, 4), [PROPOSALS], [(64, 64)])


def test_no_roi_at_all_gives_zero_losses_and_gradients_not_nan():
    heads = make(background_iou=(0.1, 0.5))
    _, losses = heads(torch.rand(1, 3, 4, 4), [PROPOSALS], [(64, 64)], [target(boxes=(), labels=())])
    sum(losses.values()).backward()
    assert [loss.item() for loss in losses.values()] == [0, 0]
    assert heads.box_predictor.scores.grad.abs().sum() == 0


@pytest.mark.parametrize("training", [True, False])
def test_an_image_without_proposals(training):
    heads = make(append_ground_truth=False).train(training)
    detections, losses = heads(torch.rand(1, 3, 4, 4), [torch.zeros(0, 4)], [(64, 64)], [target()])
    assert [loss.item() for loss in losses.values()] == [0, 0]
    assert all(len(detection["boxes"]) == 0 for detection in detections)


def test_evaluation_detects_without_looking_at_the_targets_and_has_the_same_losses():
    heads = make(scores=(0.0, 0.0, 3.0), append_ground_truth=False, background_iou=(0.0, 0.5))
    features = torch.rand(1, 3, 4, 4)
    _, training_losses = heads(features, [PROPOSALS], [(64, 64)], [target()])
    heads.eval()
    alone, none = heads(features, [PROPOSALS], [(64, 64)])
    beside, losses = heads(features, [PROPOSALS], [(64, 64)], [target()])
    assert none == {}
    assert all(torch.equal(alone[0][key], beside[0][key]) for key in alone[0])
    assert {key: loss.item() for key, loss in losses.items()} == pytest.approx({key: loss.item() for key, loss in training_losses.items()})


def test_detections_are_decoded_clipped_and_suppressed():
    """Zero deltas give the proposals back; the second lies over the first (IoU 0.9) and goes; the third is cut at the image's edge."""
    heads = make(scores=(0.0, 5.0, 0.0)).eval()
    proposals = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 70.0, 70.0]])
    (detection,), _ = heads(torch.rand(1, 3, 4, 4), [proposals], [(60, 64)])
    assert detection["boxes"].tolist() == [[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 64.0, 60.0]]
    assert detection["proposals"].tolist() == proposals[[0, 2]].tolist(), "as they were given"
    assert detection["labels"].tolist() == [1, 1]
    assert detection["scores"].tolist() == pytest.approx([math.exp(5) / (math.exp(5) + 2)] * 2)


class FromFeatures(nn.Module):
    """A predictor in which every RoI has scores and deltas of its own; no hidden layer."""

    def __init__(self, channels, classes):
        super().__init__()
        self.scores, self.deltas = nn.Linear(channels * 4, classes), nn.Linear(channels * 4, 4 * classes)

    def forward(self, x):
        return self.scores(x), self.deltas(x)


def test_a_detection_knows_the_proposal_it_was_regressed_from():
    """Regressing that proposal alone gives the detection again; the same proposal twice, and boxes that end alike, do not confuse it."""
    torch.manual_seed(0)
    heads = make(score_threshold=0.0, nms_threshold=0.99).eval()
    heads.box_predictor = FromFeatures(3, 3)
    corners = torch.rand(40, 2) * 100
    proposals = torch.cat([corners, corners + 10 + torch.rand(40, 2) * 50], dim=1)
    proposals = torch.cat([proposals, proposals[:5]])
    features = 3 * torch.randn(2, 3, 8, 8)
    found, _ = heads(features, [proposals, proposals[:7] / 2], [(120, 128), (90, 90)])
    assert [len(detection["boxes"]) for detection in found] == [80, 14], "each of 40 and 7 for two classes; copies fall to NMS"
    for image, (detection, shape) in enumerate(zip(found, [(120, 128), (90, 90)], strict=True)):
        for box, score, label, proposal in zip(*(detection[key] for key in ("boxes", "scores", "labels", "proposals")), strict=True):
            (again,), _ = heads(features[image : image + 1], [proposal[None]], [shape])
            of_label = (again["labels"] == label).nonzero().item()
            assert again["scores"][of_label].item() == pytest.approx(score.item(), rel=1e-5)
            assert again["boxes"][of_label].tolist() == pytest.approx(box.tolist(), abs=1e-3)


class ConstantMasks(nn.Module):
    """Gives every RoI the same logit in all pixels of the mask of each class."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits[None, :, None, None].expand(len(x), -1, 4, 4)


def make_with_masks(logits, **knobs):
    extractor = RoIExtractor(partial(roi_align, sampling_ratio=2, aligned=True), output_size=2, spatial_scale=1 / 16)
    return make(mask_extractor=extractor, mask_head=nn.Identity(), mask_predictor=ConstantMasks(logits), **knobs)


def masks(*columns):
    """Of a 40 x 40 image: the columns from `low` to `high` are inside."""
    drawn = torch.zeros(len(columns), 40, 40, dtype=torch.uint8)
    for mask, (low, high) in zip(drawn, columns, strict=True):
        mask[:, low:high] = 1
    return drawn


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_of_masks_is_that_of_the_true_class_on_foreground(training):
    """The object has label 2 and fills its box: log(1 + exp(-logit of class 2)). Two of PROPOSALS are foreground."""
    heads = make_with_masks([9.0, -9.0, 0.5], append_ground_truth=False).train(training)
    _, losses = heads(torch.zeros(1, 1, 4, 4), [PROPOSALS], [(40, 40)], [target(masks=masks((0, 40)))])
    assert losses["loss_mask"].item() == pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-5)
    losses["loss_mask"].backward()
    assert (heads.mask_predictor.logits.grad != 0).tolist() == [False, False, True]


def test_a_proposal_learns_the_mask_of_the_object_that_it_overlaps_most():
    boxes, labels = ([20.0, 20.0, 30.0, 30.0], OBJECT), (1, 1)
    heads = make_with_masks([0.0, -2.0, 0.0], append_ground_truth=False).train()
    for columns, inside in [(((0, 40), (0, 0)), False), (((0, 0), (0, 40)), True)]:
        _, losses = heads(torch.zeros(1, 1, 4, 4), [PROPOSALS[:2]], [(40, 40)], [target(boxes, labels, masks=masks(*columns))])
        assert losses["loss_mask"].item() == pytest.approx(math.log(1 + math.exp(2.0 if inside else -2.0)), rel=1e-5)


def test_images_without_objects_have_no_loss_of_masks():
    heads = make_with_masks([0.0, 0.0, 0.0], background_iou=(0.0, 0.5)).train()
    _, losses = heads(torch.zeros(1, 1, 4, 4), [PROPOSALS], [(40, 40)], [target((), (), masks=masks())])
    assert losses["loss_mask"] == 0 and losses["loss_classifier"] > 0


def test_masks_that_are_not_there_are_an_error_in_training_alone():
    heads = make_with_masks([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"this head learns masks, .* Set detector\.masks=true"):
        heads.train()(torch.zeros(1, 1, 4, 4), [PROPOSALS], [(40, 40)], [target()])
    _, losses = heads.eval()(torch.zeros(1, 1, 4, 4), [PROPOSALS], [(40, 40)], [target()])
    assert set(losses) == {"loss_classifier", "loss_box"}


def test_a_detection_has_the_mask_of_its_class():
    heads = make_with_masks([0.0, -1.0, 2.0], scores=(0.0, 1.0, 2.0)).eval()
    ((found,), _) = heads(torch.zeros(1, 1, 4, 4), [PROPOSALS[:1]], [(40, 40)])
    assert found["labels"].tolist() == [2, 1] and found["mask_probabilities"].shape == (2, 4, 4)
    assert found["mask_probabilities"][:, 0, 0].tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))])
    ((nothing,), _) = heads(torch.zeros(1, 1, 4, 4), [PROPOSALS[:0]], [(40, 40)])
    assert nothing["mask_probabilities"].shape == (0, 4, 4)
