"""Fast R-CNN's heads on torchvision's `RoIHeads`: what the paper has and torchvision lacks, and nothing else."""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.ops import box_iou, clip_boxes_to_image

from roi_quantization.roi_heads.extractor import RoIExtractor
from roi_quantization.roi_heads.masks import mask_loss

Target = dict[str, Any]
"""Of one image: see `FastRCNNHeads.forward`."""
ANNOTATIONS = ("boxes", "labels", "crowd")  # tensors of a target that RoIs are matched with
IGNORED = -1  # the label that torchvision's sampler passes over


class SampledRoIs(NamedTuple):
    """The RoIs of an image that losses are computed of."""

    rows: Tensor  # [K]: which of the proposals they are
    proposals: Tensor  # [K, 4], pixels
    labels: Tensor  # [K], 0 is background
    regression_targets: Tensor  # [K, 4]
    foreground: Tensor  # [F]: which of the K have a label above 0
    objects: Tensor  # [F]: the object that each of these overlaps most

    def to(self, device: torch.device) -> "SampledRoIs":
        """Copy to a device. The CPU goes on meanwhile where that is a GPU."""
        if device.type != "cuda":
            return SampledRoIs(*(tensor.to(device) for tensor in self))
        return SampledRoIs(*((x if x.is_cuda else x.pin_memory()).to(device, non_blocking=True) for x in self))


class FastRCNNHeads(RoIHeads):
    """RoI features, two-FC head, sampling, losses and post-processing; and Mask R-CNN's branch for masks where its three parts are given.

    Matching, box coding, sampling and per-class NMS are torchvision's. Added here: a lower bound on the IoU of background, crowd regions,
    sampling that a seed alone decides, the smooth L1 of the paper, losses in evaluation as well, and masks that are cut out exactly.

    Args:
        extractor: `(features, boxes, image_shapes) -> [K, C, P, P]`.
        box_head: `[K, C, P, P] -> [K, hidden]`.
        box_predictor: `[K, hidden] -> (scores [K, num_classes], deltas [K, 4 * num_classes])`, the background included.
        rois_per_image: RoIs sampled of each training image.
        foreground_fraction: at most this part of them is foreground.
        foreground_iou: IoU with an object from which a proposal is foreground.
        background_iou: `[low, high)` of the best IoU of a background proposal. (0.1, 0.5) is the paper's mining of hard examples; an image
            without objects then has no background either. What lies between `high` and `foreground_iou`, or below `low`, is not sampled.
        crowd_overlap: a proposal that is not foreground and has at least this part of its area inside one crowd region is not sampled.
        append_ground_truth: whether the objects themselves are proposals in training. Never in evaluation.
        box_weights: factors of the targets (dx, dy, dw, dh); (10, 10, 5, 5) divides by the deviations (0.1, 0.1, 0.2, 0.2).
        smooth_l1_beta: where the loss turns from square to linear, on the scaled targets; 1 in the paper.
        score_threshold, nms_threshold, detections_per_image: of the post-processing; NMS is per class.
        mask_extractor: as `extractor`, with an output size of its own, such as 14.
        mask_head: `[K, C, P, P] -> [K, hidden, P, P]`, such as torchvision's `MaskRCNNHeads`.
        mask_predictor: `[K, hidden, P, P] -> [K, num_classes, M, M]`, logits for each class, such as torchvision's `MaskRCNNPredictor`.
        seed: with `epoch` (an attribute that the training loop sets) and a target's `image_id` it decides which RoIs are sampled.
    """

    def __init__(
        self,
        extractor: RoIExtractor,
        box_head: nn.Module,
        box_predictor: nn.Module,
        rois_per_image: int = 64,
        foreground_fraction: float = 0.25,
        foreground_iou: float = 0.5,
        background_iou: tuple[float, float] = (0.1, 0.5),
        crowd_overlap: float = 0.5,
        append_ground_truth: bool = True,
        box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        smooth_l1_beta: float = 1.0,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
        seed: int = 0,
        mask_extractor: RoIExtractor | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
    ):
        if len(background_iou) != 2 or not 0 <= background_iou[0] < background_iou[1] <= foreground_iou:
            raise ValueError(
                f"background_iou={list(background_iou)}: expected [low, high], 0 <= low < high <= {foreground_iou} (foreground_iou)"
            )
        low, high = background_iou
        if len(box_weights) != 4 or not all(0 < weight < math.inf for weight in box_weights):
            raise ValueError(f"box_weights={list(box_weights)}: expected four numbers above 0")
        if not smooth_l1_beta >= 0:
            raise ValueError(f"smooth_l1_beta={smooth_l1_beta}: expected a number from 0 on")
        shares = {"foreground_fraction": foreground_fraction, "foreground_iou": foreground_iou, "crowd_overlap": crowd_overlap}
        for name, value in (shares | {"score_threshold": score_threshold, "nms_threshold": nms_threshold}).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: expected a number from 0 to 1")
        for name, value in {"rois_per_image": rois_per_image, "detections_per_image": detections_per_image}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: expected a whole number from 1 on")
        super().__init__(
            box_roi_pool=extractor,
            box_head=box_head,
            box_predictor=box_predictor,
            fg_iou_thresh=foreground_iou,
            bg_iou_thresh=high,
            batch_size_per_image=rois_per_image,
            positive_fraction=foreground_fraction,
            bbox_reg_weights=tuple(box_weights),
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=detections_per_image,
            mask_roi_pool=mask_extractor,
            mask_head=mask_head,
            mask_predictor=mask_predictor,
        )
        self.background_low = low
        self.crowd_overlap = crowd_overlap
        self.append_ground_truth = append_ground_truth
        self.smooth_l1_beta = smooth_l1_beta
        self.seed = seed
        self.epoch = 0

    def forward(
        self, features: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]], targets: list[Target] | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Sample RoIs and compute losses in training; detect in evaluation, with losses where targets are given.

        Args:
            features: `[N, C, H, W]`.
            proposals: one `[L, 4]` an image, pixels.
            image_shapes: (height, width) in pixels of each image without its padding; boxes are clipped to it.
            targets: one dict an image with `boxes` [G, 4], `labels` [G] from 1, `image_id` and, where there are any, `crowd` [M, 4]; and
                `masks` [G, height, width] where masks are learnt. In evaluation there is no loss of masks without them. In training there
                may be `sampled`, what `sample_for_training` gives for the image, instead of `boxes` and `crowd`.

        Returns:
            `(detections, losses)`. In training the detections are empty and targets are needed. In evaluation each detection is a dict of
            `boxes` [D, 4], `scores` [D], `labels` [D] and `proposals` [D, 4], from which the boxes were regressed, and of
            `mask_probabilities` [D, M, M] inside the boxes where masks are learnt; and with targets there are losses too: on RoIs sampled
            as in training, with the same draw each time and without the ground truth among the proposals, so that nothing of the targets
            reaches the detections.
        """
        if self.training:
            if targets is None:
                raise ValueError("targets: training needs those of each image, got None. Call eval() to detect without targets")
            given = "sampled" in targets[0]
            sampled = [target["sampled"] for target in targets] if given else self.sample_for_training(proposals, targets)
            sampled = [rois.to(features.device) for rois in sampled]
            scores, deltas = self.predict(features, [rois.proposals for rois in sampled], image_shapes)
            losses = self.losses(scores, deltas, sampled)
            if self.has_mask():
                losses |= self.mask_losses(features, sampled, image_shapes, targets)
            return [], losses

        scores, deltas = self.predict(features, proposals, image_shapes)
        detections = self.detect(scores, deltas, proposals, image_shapes)
        if self.has_mask():
            self.detect_masks(features, detections, image_shapes)
        if targets is None:
            return detections, {}
        sampled = [rois.to(features.device) for rois in self.sample(proposals, targets, epoch=0)]
        chosen = concatenate_indices([rois.rows for rois in sampled], [len(boxes) for boxes in proposals])
        losses = self.losses(scores[chosen], deltas[chosen], sampled)
        if self.has_mask() and all("masks" in target for target in targets):
            losses |= self.mask_losses(features, sampled, image_shapes, targets)
        return detections, losses

    def predict(self, features: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Class scores `[K, C + 1]` (before softmax) and deltas `[K, 4 (C + 1)]` of all proposals, always in float32."""
        scores, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        return scores.float(), deltas.float()

    def detect(
        self, scores: Tensor, deltas: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Post-processing: boxes decoded and clipped, weak and small ones dropped, NMS per class; and the proposal of each detection."""
        found = self.postprocess_detections(scores, deltas, proposals, image_shapes)
        lengths = [len(boxes) for boxes in proposals]
        candidates = zip(scores.softmax(-1).split(lengths), self.box_coder.decode(deltas, proposals).split(lengths), strict=True)
        detections = []
        for boxes, sure, labels, own, (all_scores, all_boxes), shape in zip(*found, proposals, candidates, image_shapes, strict=True):
            source = boxes
            if len(boxes):  # torchvision forgets which proposal a detection comes from: the one that has its very score and its very box
                same = (all_scores[:, labels] == sure) & (clip_boxes_to_image(all_boxes[:, labels], shape) == boxes).all(-1)
                source = own[same.int().argmax(0)]
            detections.append({"boxes": boxes, "scores": sure, "labels": labels, "proposals": source})
        return detections

    def detect_masks(self, features: Tensor, detections: list[dict[str, Tensor]], image_shapes: list[tuple[int, int]]) -> None:
        """Give each detection the `mask_probabilities` [D, M, M] of its class, in its box."""
        logits = self.predict_masks(features, [detection["boxes"] for detection in detections], image_shapes)
        found = maskrcnn_inference(logits, [detection["labels"] for detection in detections])
        for detection, probabilities in zip(detections, found, strict=True):
            detection["mask_probabilities"] = probabilities[:, 0]

    def predict_masks(self, features: Tensor, boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Logits `[K, C + 1, M, M]` of each class in each box, always in float32."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))).float()

    def mask_losses(
        self, features: Tensor, sampled: list[SampledRoIs], image_shapes: list[tuple[int, int]], targets: list[Target]
    ) -> dict[str, Tensor]:
        """Mask R-CNN's loss on the foreground of the sampled RoIs: the mean over pixels of their class."""
        if not all("masks" in target for target in targets):
            raise ValueError(
                "targets: this head learns masks, and has none of the objects. Set detector.masks=true, which data.masks follows"
            )
        boxes = [rois.proposals[rois.foreground] for rois in sampled]
        logits = self.predict_masks(features, boxes, image_shapes)
        masks, classes = ([target[name] for target in targets] for name in ("masks", "labels"))
        return {"loss_mask": mask_loss(logits, boxes, masks, classes, [rois.objects for rois in sampled])}

    def sample_for_training(self, proposals: list[Tensor], targets: list[Target]) -> list[SampledRoIs]:
        """The RoIs of a training step, on the CPU. They need no features: called before the backbone, it lets no GPU wait."""
        if self.append_ground_truth:
            proposals = self.add_gt_proposals([boxes.cpu() for boxes in proposals], [target["boxes"].cpu() for target in targets])
        return self.sample(proposals, targets, self.epoch)

    def sample(self, proposals: list[Tensor], targets: list[Target], epoch: int) -> list[SampledRoIs]:
        """The RoIs of each image that losses are computed of, matched and sampled on the CPU."""
        proposals = [boxes.cpu() for boxes in proposals]
        targets = [{name: x.cpu() if name in ANNOTATIONS else x for name, x in target.items()} for target in targets]
        of_images = self.match_and_sample(proposals, targets, epoch)
        rows = [chosen.nonzero()[:, 0] for chosen in of_images[2]]
        labels, matched, boxes = ([x[chosen] for x, chosen in zip(xs, rows, strict=True)] for xs in (*of_images[:2], proposals))
        foreground = [(label > 0).nonzero()[:, 0] for label in labels]
        objects = [
            box_iou(target["boxes"], of_image[of_objects]).max(dim=0).indices if len(of_objects) else of_objects
            for target, of_image, of_objects in zip(targets, boxes, foreground, strict=True)
        ]
        return list(map(SampledRoIs, rows, boxes, labels, self.box_coder.encode(matched, boxes), foreground, objects))

    def match_and_sample(
        self, proposals: list[Tensor], targets: list[Target], epoch: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """For each image the label `[L]` of every proposal, the object `[L, 4]` it is matched to, and a mask `[L]` of those sampled."""
        labels, matched, chosen = [], [], []
        for boxes, target in zip(proposals, targets, strict=True):
            # torchvision's matcher refuses an image without objects or without proposals; both occur
            if len(boxes) and len(target["boxes"]):
                (indices,), (label,) = self.assign_targets_to_proposals([boxes], [target["boxes"]], [target["labels"]])
                objects = target["boxes"]
            else:
                indices = label = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
                objects = boxes.new_tensor([[0.0, 0.0, 1.0, 1.0]])
            label = self.ignore(label, boxes, target)
            labels.append(label)
            matched.append(objects[indices])
            chosen.append(self.draw(label, epoch, target["image_id"]))
        return labels, matched, chosen

    def ignore(self, labels: Tensor, proposals: Tensor, target: Target) -> Tensor:
        """The labels, with background below the lower bound or inside a crowd region marked as not to be sampled."""
        labels = labels.clone()
        if self.background_low > 0:
            best = box_iou(target["boxes"], proposals).amax(dim=0) if len(target["boxes"]) else proposals.new_zeros(len(proposals))
            labels[(labels == 0) & (best < self.background_low)] = IGNORED
        crowd = target.get("crowd")
        if crowd is not None and len(crowd):
            labels[(labels == 0) & (overlap(proposals, crowd).amax(dim=1) >= self.crowd_overlap)] = IGNORED
        return labels

    def draw(self, labels: Tensor, epoch: int, image_id: int) -> Tensor:
        """Mask of the RoIs sampled."""
        return draw(self.fg_bg_sampler, labels, self.seed, epoch, int(image_id))

    def losses(self, scores: Tensor, deltas: Tensor, sampled: list[SampledRoIs]) -> dict[str, Tensor]:
        """Fast R-CNN's losses of the sampled RoIs, whose scores and deltas these are: means over all of them; 0 where there are none."""
        labels = torch.cat([rois.labels for rois in sampled])
        regression_targets = torch.cat([rois.regression_targets for rois in sampled])
        foreground = concatenate_indices([rois.foreground for rois in sampled], [len(rois.labels) for rois in sampled])
        count = max(len(labels), 1)
        predicted = deltas.view(len(labels), scores.shape[1], 4)[foreground, labels[foreground]]
        box_loss = F.smooth_l1_loss(predicted, regression_targets[foreground], beta=self.smooth_l1_beta, reduction="sum")
        return {"loss_classifier": F.cross_entropy(scores, labels, reduction="sum") / count, "loss_box": box_loss / count}


def concatenate_indices(indices: list[Tensor], lengths: list[int]) -> Tensor:
    """Indices into the concatenation of sequences of these lengths, from those into each."""
    return torch.cat([of_one + start for of_one, start in zip(indices, accumulate(lengths, initial=0), strict=False)])


def draw(sampler: Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]], labels: Tensor, *key: int) -> Tensor:
    """Mask of what torchvision's sampler takes: on a CPU generator that the key seeds, so that the batch has no say."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash(key))  # torch.manual_seed would reseed CUDA's as well
        foreground, background = sampler([labels.cpu()])
    return (foreground[0] | background[0]).bool().to(labels.device)


def overlap(boxes: Tensor, regions: Tensor) -> Tensor:
    """`[L, M]`: the part of each box's own area that lies inside each region."""
    width_height = (torch.minimum(boxes[:, None, 2:], regions[:, 2:]) - torch.maximum(boxes[:, None, :2], regions[:, :2])).clamp(min=0)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1, keepdim=True)
    return width_height.prod(dim=2) / area.clamp(min=torch.finfo(area.dtype).tiny)
