import pytest
import torch
from torch import nn

from roi_quantization.detection.runs.checkpoint import check_categories, load_checkpoint, load_weights

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 5, "name": "star"}]


def checkpoint_of(detector):
    return {
        "state_dict": {f"detector.{key}": value for key, value in detector.state_dict().items()},
        "categories": CATEGORIES,
        "config": {},
    }


def test_what_is_saved_is_loaded(tmp_path):
    saved, fresh = nn.Linear(2, 3), nn.Linear(2, 3)
    torch.save(checkpoint_of(saved), tmp_path / "best.ckpt")
    load_weights(fresh, load_checkpoint(tmp_path / "best.ckpt"))
    assert torch.equal(fresh.weight, saved.weight)


def test_missing_truncated_and_foreign_files_are_told_apart(tmp_path):
    path = tmp_path / "best.ckpt"
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*best.ckpt"):
        load_checkpoint(path)
    torch.save(checkpoint_of(nn.Linear(50, 50)), path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"best.ckpt is not an intact checkpoint"):
            load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"was not written by train\.py: it has no config, categories"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": nn.Linear(1, 1)}, tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match="not an intact checkpoint"):
        load_checkpoint(tmp_path / "best.ckpt")


def test_other_classes_are_named():
    checkpoint = checkpoint_of(nn.Linear(1, 1))
    check_categories(checkpoint, [{"id": 1, "name": "disc"}, {"id": 2, "name": "star"}])  # the ids may differ, the labels mean the same
    with pytest.raises(ValueError, match=r"trained on 2 classes \(disc, star\), the data has 3 \(cat, disc, star\)"):
        check_categories(checkpoint, [{"id": 1, "name": "cat"}, {"id": 2, "name": "disc"}, {"id": 3, "name": "star"}])
    with pytest.raises(ValueError, match="in the order"):
        check_categories(checkpoint, CATEGORIES[::-1])


@pytest.mark.parametrize(
    "detector, message",
    [
        (nn.Linear(2, 4), r"2 of its weights differ: bias has shape \[3\] in the checkpoint, \[4\] in the detector"),
        (nn.Linear(2, 3, bias=False), "bias of the checkpoint has no place in the detector"),
        (nn.Sequential(nn.Linear(2, 3)), "0.bias is not in the checkpoint"),
    ],
)
def test_weights_that_do_not_fit(detector, message):
    with pytest.raises(ValueError, match=message):
        load_weights(detector, checkpoint_of(nn.Linear(2, 3)))
