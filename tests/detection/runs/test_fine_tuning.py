"""Weights of a checkpoint as a start: which rows are kept is decided by the names of the classes."""

import pytest
import torch

from roi_quantization.detection.model.build import build_detector
from roi_quantization.detection.runs.fine_tuning import initialize_from
from tests.configuration import composed

SMALL = ["backbone.width=0.0625", "head.box_head.hidden=8"]


def classes(*names):
    return [{"id": number, "name": name} for number, name in enumerate(names, 3)]


def detector(num_classes, *overrides):
    return build_detector(composed("train", *SMALL, *overrides), num_classes + 1)


def saved(path, trained, names):
    state = {f"detector.{key}": value for key, value in trained.state_dict().items()}
    torch.save({"state_dict": state, "categories": classes(*names), "config": {}}, path)
    return path


def test_rows_of_known_classes_are_kept_and_others_are_new(tmp_path, caplog):
    masks = ["mask_head=two_conv_small", "head.mask_head.layers=[4]", "head.mask_predictor.in_channels=4"]
    trained, fresh = detector(3, *masks), detector(4, *masks)
    before, made = trained.state_dict(), {key: value.clone() for key, value in fresh.state_dict().items()}
    path = saved(tmp_path / "best.ckpt", trained, ["cat", "cow", "dog"])
    with caplog.at_level("INFO"):
        initialize_from(fresh, path, classes("zebra", "dog", "cat", "ant"))
    assert "rows of dog, cat are kept, those of zebra, ant are new" in caplog.text
    after, kept = fresh.state_dict(), {0: 0, 2: 3, 3: 1}
    for key, value in after.items():
        if not key.startswith(("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")):
            assert torch.equal(value, before[key]), key
            continue
        rows = (value.unflatten(0, (5, -1)), made[key].unflatten(0, (5, -1)), before[key].unflatten(0, (4, -1)))
        for label in range(5):
            expected = rows[2][kept[label]] if label in kept else rows[1][label]
            assert torch.equal(rows[0][label], expected), (key, label)


def test_the_same_classes_are_taken_as_they_are(tmp_path):
    trained, fresh = detector(2), detector(2)
    initialize_from(fresh, saved(tmp_path / "best.ckpt", trained, ["cat", "dog"]), classes("cat", "dog"))
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in trained.state_dict().items())


@pytest.mark.parametrize("before", [2, 3])
def test_a_regressor_of_all_classes_is_kept_whole(tmp_path, before):
    agnostic = "head.box_predictor.class_agnostic=true"
    trained, fresh = detector(before, agnostic), detector(1, agnostic)
    initialize_from(fresh, saved(tmp_path / "best.ckpt", trained, ["cat", "cow", "dog"][:before]), classes("ant"))
    key = "roi_heads.box_predictor.bbox_pred.weight"
    assert fresh.state_dict()[key].shape == (4, 8) and torch.equal(fresh.state_dict()[key], trained.state_dict()[key])
    with pytest.raises(ValueError, match=r"init_from=.*bbox_pred\.bias has shape \[4\] in the checkpoint, \[8\] in the detector"):
        initialize_from(detector(1), tmp_path / "best.ckpt", classes("ant"))


def test_other_layers_are_an_error(tmp_path):
    path = saved(tmp_path / "best.ckpt", detector(2), ["cat", "dog"])
    with pytest.raises(ValueError, match=r"init_from=.*does not fit the detector"):
        initialize_from(detector(1, "head.box_head.hidden=16"), path, classes("dog"))
    foreign = detector(1)
    foreign.roi_heads.box_predictor = torch.nn.Linear(8, 10)
    with pytest.raises(ValueError, match=r"head\.box_predictor is not a BoxPredictor"):
        initialize_from(foreign, path, classes("dog"))
