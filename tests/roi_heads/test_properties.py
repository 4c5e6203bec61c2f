"""What holds of box coding, matching, sampling and detections for any boxes; see `tests/conftest.py` for how many are tried."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import box_area, box_iou

from roi_quantization.roi_heads.fast_rcnn import IGNORED, overlap

from .test_fast_rcnn import make

SIDE = 64  # pixels of an image


@st.composite
def boxes(draw, low=0, high=12):
    """`[L, 4]` with whole pixels as edges and an area."""
    count = draw(st.integers(low, high))
    edges = st.lists(st.integers(0, SIDE), min_size=2, max_size=2, unique=True).map(sorted)
    drawn = [(draw(edges), draw(edges)) for _ in range(count)]
    return torch.tensor([[x1, y1, x2, y2] for (x1, x2), (y1, y2) in drawn], dtype=torch.float32).reshape(-1, 4)


@st.composite
def images(draw):
    """Proposals and target of an image. Objects are among the proposals, and some of those are there several times."""
    objects, crowd, proposals = draw(boxes(high=3)), draw(boxes(high=2)), draw(boxes(high=20))
    labels = torch.tensor(draw(st.lists(st.integers(1, 2), min_size=len(objects), max_size=len(objects))), dtype=torch.int64)
    proposals = torch.cat([proposals, proposals[:5], objects])
    return proposals, {"boxes": objects, "labels": labels, "crowd": crowd, "image_id": draw(st.integers(1, 600_000))}


KNOBS = st.fixed_dictionaries(
    {
        "rois_per_image": st.integers(1, 16),
        "foreground_fraction": st.sampled_from([0.25, 0.5, 1.0]),
        "background_iou": st.sampled_from([(0.0, 0.5), (0.1, 0.5), (0.1, 0.3)]),
        "seed": st.integers(0, 100),
    }
)


@given(boxes(1), boxes(1), st.sampled_from([(10.0, 10.0, 5.0, 5.0), (1.0, 1.0, 1.0, 1.0)]))
def test_decoding_undoes_encoding(objects, proposals, weights):
    """Of proposals two pixels wide at least: torchvision lets none grow by more than 1000 / 16 times."""
    count = min(len(objects), len(proposals))
    objects, proposals = objects[:count], proposals[:count].clone()
    proposals[:, 2:] = torch.maximum(proposals[:, 2:], proposals[:, :2] + 2)
    coder = make(box_weights=weights).box_coder
    (deltas,) = coder.encode([objects], [proposals])
    assert_close(coder.decode(deltas, [proposals])[:, 0], objects, rtol=0, atol=1e-3)


@given(boxes(1), st.integers(-100, 100), st.sampled_from([0.5, 2.0, 4.0]))
def test_targets_do_not_depend_on_where_and_how_large_an_image_is(objects, shift, scale):
    coder, proposals = make().box_coder, objects.roll(1, 0)
    (deltas,) = coder.encode([objects], [proposals])
    (moved,) = coder.encode([(objects + shift) * scale], [(proposals + shift) * scale])
    assert_close(moved, deltas, rtol=0, atol=1e-5)
    assert (coder.encode([objects], [objects])[0] == 0).all()


@given(boxes(1), boxes(1), st.integers(-100, 100), st.sampled_from([0.5, 2.0, 4.0]))
def test_overlap_is_an_intersection_by_the_boxs_own_area(ours, regions, shift, scale):
    part = overlap(ours, regions)
    intersection = part * box_area(ours)[:, None]
    assert_close(intersection, (overlap(regions, ours) * box_area(regions)[:, None]).T)
    assert_close(intersection / (box_area(ours)[:, None] + box_area(regions) - intersection), box_iou(ours, regions))
    inside = (ours[:, None, :2] >= regions[:, :2]).all(2) & (ours[:, None, 2:] <= regions[:, 2:]).all(2)
    assert torch.equal(part == 1, inside)
    assert_close(overlap((ours + shift) * scale, (regions + shift) * scale), part)


@given(images(), KNOBS)
def test_a_label_is_that_of_the_object_covered_best(image, knobs):
    proposals, target = image
    low, high = knobs["background_iou"]
    (labels,), (matched,), _ = make(**knobs).match_and_sample([proposals], [target], epoch=0)
    ious = box_iou(proposals, target["boxes"]) if len(target["boxes"]) else torch.zeros(len(proposals), 1)
    best = ious.amax(1)
    in_crowd = torch.cat([overlap(proposals, target["crowd"]), torch.zeros(len(proposals), 1)], dim=1).amax(1) >= 0.5
    foreground = best >= 0.5
    assert torch.equal(labels > 0, foreground)
    assert torch.equal(labels == 0, ~foreground & (best >= low) & (best < high) & ~in_crowd)
    assert torch.equal(labels == IGNORED, ~foreground & ~((best >= low) & (best < high) & ~in_crowd))
    for proposal in foreground.nonzero().flatten().tolist():
        fitting = (target["boxes"] == matched[proposal]).all(1) & (target["labels"] == labels[proposal])
        assert (fitting & (ious[proposal] == best[proposal])).any()


@given(images(), KNOBS)
def test_as_many_as_possible_are_sampled_and_none_that_is_ignored(image, knobs):
    proposals, target = image
    (labels,), _, (chosen,) = make(**knobs).match_and_sample([proposals], [target], epoch=0)
    foreground = min(int((labels > 0).sum()), int(knobs["rois_per_image"] * knobs["foreground_fraction"]))
    background = min(int((labels == 0).sum()), knobs["rois_per_image"] - foreground)
    assert (labels[chosen] > 0).sum() == foreground
    assert (labels[chosen] == 0).sum() == background
    assert chosen.sum() == foreground + background


@given(images(), images(), KNOBS, st.integers(0, 5))
def test_sampling_repeats_and_does_not_depend_on_the_other_images(image, other, knobs, epoch):
    (proposals, target), (beside, its) = image, other
    heads = make(**knobs)
    (alone,) = heads.match_and_sample([proposals], [target], epoch)[2]
    _, second = make(**knobs).match_and_sample([beside, proposals], [its, target], epoch)[2]
    assert torch.equal(alone, second)


@given(images(), st.randoms(use_true_random=False))
def test_labels_and_objects_go_with_their_proposals_in_any_order(image, random):
    proposals, target = image
    order = torch.tensor(random.sample(range(len(proposals)), len(proposals)), dtype=torch.int64)
    (labels,), (matched,), (chosen,) = make().match_and_sample([proposals], [target], epoch=0)
    (again,), (matched_again,), (chosen_again,) = make().match_and_sample([proposals[order]], [target], epoch=0)
    assert torch.equal(again, labels[order]) and torch.equal(matched_again, matched[order])
    assert chosen_again.sum() == chosen.sum()


@given(boxes(), st.integers(0, 2**32 - 1), st.sampled_from([0.3, 0.5, 0.7]), st.integers(1, 10))
def test_detections_are_in_the_image_sorted_by_score_and_apart(proposals, seed, nms_threshold, most):
    heads = make(nms_threshold=nms_threshold, score_threshold=0.1, detections_per_image=most).eval()
    noise = torch.Generator().manual_seed(seed)
    scores, deltas = torch.randn(len(proposals), 3, generator=noise), torch.randn(len(proposals), 12, generator=noise)
    shape = (SIDE - 8, SIDE)
    (found,) = heads.detect(scores, deltas, [proposals], [shape])
    boxes, labels = found["boxes"], found["labels"]
    assert len(boxes) <= most and (found["scores"] > 0.1).all() and torch.isin(labels, torch.tensor([1, 2])).all()
    assert (found["scores"].diff() <= 0).all()
    assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= shape[1]).all() and (boxes[:, [1, 3]] <= shape[0]).all()
    pairs = torch.triu(labels[:, None] == labels, diagonal=1)
    assert (box_iou(boxes, boxes)[pairs] <= nms_threshold + 1e-4).all()
    for proposal in found["proposals"]:
        assert (proposals == proposal).all(1).any()
