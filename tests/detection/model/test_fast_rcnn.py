from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from roi_quantization import ops
from roi_quantization.detection.model.fast_rcnn import FastRCNN, to_original
from roi_quantization.detection.model.vgg16 import VGG16
from roi_quantization.roi_heads import BoxPredictor, FastRCNNHeads, RoIExtractor, TwoFCHead


def make(channels_last=False, backbone=None, **knobs):
    torch.manual_seed(0)
    backbone = backbone or VGG16(width=0.0625)
    extractor = RoIExtractor(partial(roi_align, sampling_ratio=2, aligned=True), 3, spatial_scale=1 / 16)
    heads = FastRCNNHeads(extractor, TwoFCHead(32, 3, hidden=8, dropout=0.0), BoxPredictor(8, num_classes=3), **knobs)
    return FastRCNN(backbone, heads, channels_last)


def batch(*sizes):
    torch.manual_seed(1)
    images = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for height, width in sizes]
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    windows = {"proposals": torch.tensor([[8.0, 8.0, 40.0, 36.0], [0.0, 0.0, 20.0, 20.0]])}
    return images, [target | windows | {"image_id": i, "original_size": (2 * h, 4 * w)} for i, (h, w) in enumerate(sizes)]


def test_a_batch_is_normalised_and_padded_with_zeros_to_the_stride():
    white = torch.full((3, 20, 33), 255, dtype=torch.uint8)
    padded = make().batch([white, white[:, :5, :5]])
    assert padded.shape == (2, 3, 32, 48)
    assert padded[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    assert padded[0, :, 20:].abs().sum() == padded[0, :, :, 33:].abs().sum() == padded[1, :, 5:].abs().sum() == 0


@pytest.mark.parametrize("image", [torch.rand(3, 20, 33), torch.zeros(3, 20, 33, dtype=torch.uint16)])
def test_an_image_that_is_not_uint8_is_refused(image):
    """One from 0 to 1 would be nearly black."""
    with pytest.raises(ValueError, match=rf"an image is {image.dtype}, expected uint8 RGB from 0 to 255"):
        make().batch([image])


def test_boxes_return_to_the_original_image_and_stay_in_it():
    """An image of 200 x 400 (height, width) was shown at 100 x 100: x grows by 4, y by 2."""
    assert to_original(torch.tensor([[10.0, 10.0, 50.0, 60.0]]), (100, 100), (200, 400)).tolist() == [[40.0, 20.0, 200.0, 120.0]]
    assert to_original(torch.tensor([[-1.0, 0.0, 101.0, 100.0]]), (100, 100), (200, 400)).tolist() == [[0.0, 0.0, 400.0, 200.0]]


def test_detections_are_in_pixels_of_the_original():
    """The predictor is made to give every window back as it is: its box deltas are zero."""
    detector = make(score_threshold=0.0, nms_threshold=1.0).eval()
    nn.init.zeros_(detector.roi_heads.box_predictor.bbox_pred.weight)
    images, targets = batch((64, 64))
    (detection,), _ = detector(images, targets)
    assert len(detection["boxes"]) == 4  # two windows, two classes
    found = {tuple(box) for box in detection["boxes"].tolist()}
    assert torch.equal(detection["proposals"], detection["boxes"])
    assert found == {(32.0, 16.0, 160.0, 72.0), (0.0, 0.0, 80.0, 40.0)}


def test_training_gives_losses_that_reach_every_weight():
    detector = make()
    detections, losses = detector(*batch((64, 64), (48, 80)))
    assert detections == [] and set(losses) == {"loss_classifier", "loss_box"}
    sum(losses.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in detector.parameters())


# those that torch.use_deterministic_algorithms refuses on a GPU, by its documentation, as ATen calls them
REFUSED_ON_GPU = (
    *("adaptive_avg_pool", "adaptive_max_pool", "avg_pool3d", "bincount", "ctc_loss", "embedding_bag", "fractional_max_pool"),
    *("grid_sampler", "histc", "index_reduce", "kthvalue", "max_pool3d", "max_unpool", "median", "nll_loss2d", "put_", "reflection_pad"),
    *("replication_pad", "scatter", "upsample"),
)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_nothing_in_a_step_of_training_lacks_a_deterministic_kernel_on_a_gpu(norm):
    """Without a GPU this much can be told: which of PyTorch's operators a step calls, forward and backward."""
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            called.add(operator.overloadpacket._qualified_op_name.removeprefix("aten::"))
            return operator(*args, **(kwargs or {}))

    detector = make(backbone=VGG16(width=0.0625, norm=norm))
    with Record():
        _, losses = detector(*batch((64, 64), (48, 80)))
        sum(losses.values()).backward()
    assert {"convolution_backward", "max_pool2d_with_indices_backward", "nll_loss_backward"} <= called
    assert not [name for name in called if name.startswith(REFUSED_ON_GPU)]


@pytest.mark.parametrize("operator", [roi_align, ops.roi_align, ops.roi_pool])
def test_a_step_reads_nothing_back_from_the_device(operator):
    """A tensor without content takes the place of a GPU's: `item`, `nonzero`, an index of booleans and a copy to the CPU raise."""
    detector = make()
    detector.roi_heads.box_roi_pool.operator = operator
    images, targets = batch((64, 64), (48, 80))
    optimizer = torch.optim.AdamW(detector.to("meta").parameters())
    _, losses = detector([image.to("meta") for image in images], targets)
    sum(losses.values()).backward()
    optimizer.step()
    assert losses["loss_box"].is_meta


def test_rois_that_were_sampled_before_the_step_are_those_of_the_step():
    images, targets = batch((64, 64), (48, 80))
    detector = make(rois_per_image=2)
    sampled = detector.sample_rois(targets)
    detector.roi_heads.seed = 1  # another would be drawn now
    _, losses = detector(images, sampled)
    detector.roi_heads.seed = 0
    assert losses == detector(images, targets)[1]
    blind = [{"proposals": target["proposals"], "sampled": target["sampled"]} for target in sampled]
    assert losses == detector(images, blind)[1], "nothing else of a target is read"


def test_evaluation_has_losses_where_there_are_boxes():
    detector = make().eval()
    images, targets = batch((64, 64))
    assert set(detector(images, targets)[1]) == {"loss_classifier", "loss_box"}
    blind = [{key: target[key] for key in ("proposals", "image_id", "original_size")} for target in targets]
    detections, losses = detector(images, blind)
    assert len(detections) == 1 and losses == {}


def test_an_image_is_detected_alike_alone_and_in_a_batch_of_its_size():
    detector = make(score_threshold=0.0).eval()
    images, targets = batch((64, 64), (64, 64))
    together, _ = detector(images, targets)
    alone, _ = detector(images[1:], targets[1:])
    torch.testing.assert_close(alone[0], together[1])


def test_channels_last_gives_the_same_numbers():
    detections = [make(channels_last, score_threshold=0.0).eval()(*batch((64, 64)))[0] for channels_last in (False, True)]
    torch.testing.assert_close(*detections)


def test_masks_are_pasted_into_the_original_image():
    """Where the mask of every class is inside, the mask of a detection is its box, to the pixels that its edges go through."""
    extractor = RoIExtractor(partial(roi_align, sampling_ratio=2, aligned=True), 14, spatial_scale=1 / 16)
    head, predictor = MaskRCNNHeads(32, [4], 1), MaskRCNNPredictor(4, 4, 3)
    nn.init.constant_(predictor.mask_fcn_logits.bias, 9.0)
    detector = make(score_threshold=0.0, mask_extractor=extractor, mask_head=head, mask_predictor=predictor).eval()
    images, targets = batch((48, 64), (64, 40))
    detections, losses = detector(images, targets)
    assert "loss_mask" not in losses, "the targets have no masks"
    for found, target in zip(detections, targets, strict=True):
        assert found["masks"].dtype == torch.bool and found["masks"].shape == (len(found["boxes"]), *target["original_size"])
        assert len(found["masks"]) > 0 and "mask_probabilities" not in found
        for mask, (x1, y1, x2, y2) in zip(found["masks"], found["boxes"].tolist(), strict=True):
            rows, columns = mask.nonzero().T
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert [edge.item() for edge in edges] == pytest.approx([x1, y1, x2, y2], abs=2)
