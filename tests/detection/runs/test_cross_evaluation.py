"""Weights with other operators than they were trained with."""

import json
from types import SimpleNamespace

import pytest

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.evaluation.protocol import COCO_PROTOCOL
from roi_quantization.detection.runs.cross_evaluation import complete
from tests.trainings import run_train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """With a callback of one's own, which is not asked to save checkpoints of an evaluation."""
    folder = tmp_path_factory.mktemp("crossed")
    (folder / "own").mkdir()
    saves = f"+trainer.callbacks=[{{_target_: pytorch_lightning.callbacks.ModelCheckpoint, dirpath: {folder / 'own'}}}]"
    run_train(folder, "threads=1", "trainer.max_epochs=1", "cross=[warp]", saves)
    assert list((folder / "own").glob("*.ckpt"))
    return SimpleNamespace(
        folder=folder / "run",
        cross=lambda: {},
        metrics=SimpleNamespace(protocol=COCO_PROTOCOL),
    )


def test_a_callback_of_ones_own_stays_out_of_it(run):
    assert list(json.loads((run.folder / "cross.json").read_text())) == ["warp"]


def test_operators_are_compared_on_the_data_of_the_run(run):
    complete(run, ["pool"])
    assert list(json.loads((run.folder / "cross.json").read_text())) == ["pool"]
    path = run.folder / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test": "0"}))
    with pytest.raises(InputError, match=r"has other images, annotations or proposals \(test\) than when .*run was trained and evaluated"):
        complete(run, ["align_max"])
