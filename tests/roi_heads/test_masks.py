"""Masks that are cut out of boxes and pasted back are where they were, to a fraction of a pixel."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.roi_heads import maskrcnn_loss, paste_masks_in_image, project_masks_on_boxes

from roi_quantization.roi_heads.masks import cut_masks, mask_loss, paste_masks

HALF = torch.zeros(1, 32, 32, dtype=torch.uint8)
HALF[:, :, :16] = 1  # inside to the left of x = 16
FIRST = torch.tensor([0])


def test_cells_have_the_share_that_is_inside():
    box = torch.tensor([[13.0, 8.0, 21.0, 16.0]])  # cells of two pixels: [13, 15] inside, half of [15, 17], the others outside
    (cut,) = cut_masks(HALF, box, FIRST, 4)
    torch.testing.assert_close(cut, torch.tensor([1.0, 0.5, 0.0, 0.0]).expand(4, 4))


def test_a_mask_fills_its_box_and_nothing_else():
    """To the pixels whose centre is inside."""
    box = torch.tensor([[4.25, 8.75, 20.25, 24.75]])
    pasted = paste_masks(torch.ones(1, 28, 28), box, (32, 32)) > 0.5
    rows, columns = pasted[0].nonzero().T
    assert (columns.min().item(), columns.max().item(), rows.min().item(), rows.max().item()) == (4, 19, 9, 24)
    assert pasted.sum() == 16 * 16


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.5, 0.8])
def test_what_is_cut_out_and_pasted_back_is_the_same(shift):
    """A disc in a box that ends within pixels. Of torchvision's the same cannot be said."""
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    disc = ((x - 30 - shift) ** 2 + (y - 33) ** 2 < 20**2)[None]
    box = torch.tensor([[10 + shift, 13.0, 50 + shift, 53.0]])

    def iou(pasted):
        return ((pasted & disc).sum() / (pasted | disc).sum()).item()

    own = paste_masks(cut_masks(disc, box, FIRST, 28), box, (64, 64)) > 0.5
    theirs = paste_masks_in_image(project_masks_on_boxes(disc, box, FIRST, 28)[:, None], box, (64, 64))[:, 0] > 0.5
    assert iou(own) > 0.98 > iou(theirs)


def test_images_of_any_size_and_no_detections():
    pasted = paste_masks(torch.ones(2, 28, 28), torch.tensor([[-5.0, -5.0, 8.0, 4.0], [2.0, 3.0, 9.0, 90.0]]), (20, 10)) > 0.5
    assert pasted[0, :4, :8].all() and pasted[0].sum() == 32
    assert pasted[1, 3:, 2:9].all() and pasted[1].sum() == 17 * 7, "cut off at the edge of the image"
    assert paste_masks(torch.ones(0, 28, 28), torch.zeros(0, 4), (20, 10)).shape == (0, 20, 10)


def test_the_loss_is_torchvisions_where_masks_are_the_same_half_a_pixel_off():
    """Of masks that do not change along the box and its surroundings."""
    torch.manual_seed(0)
    logits = nn.Parameter(torch.randn(3, 4, 14, 14))
    boxes = [torch.tensor([[3.0, 3.0, 20.0, 20.0], [5.0, 8.0, 9.5, 17.25]]), torch.tensor([[6.0, 6.0, 12.0, 12.0]]), torch.zeros(0, 4)]
    full = torch.ones(2, 32, 32, dtype=torch.uint8)
    masks, labels = [full * torch.tensor([1, 0], dtype=torch.uint8)[:, None, None], full, full[:0]], [torch.tensor([1, 3])] * 2
    labels = [*labels, torch.tensor([], dtype=torch.int64)]
    objects = [torch.tensor([1, 0]), torch.tensor([1]), torch.tensor([], dtype=torch.int64)]
    torch.testing.assert_close(mask_loss(logits, boxes, masks, labels, objects), maskrcnn_loss(logits, boxes, masks, labels, objects))
    none = mask_loss(logits[:0], boxes[2:], masks[2:], labels[2:], objects[2:])
    none.backward()
    assert none == 0 and logits.grad.abs().sum() == 0
