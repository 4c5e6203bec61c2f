"""average=ema: what is averaged, and that the average is what is evaluated and kept. That such a run goes on is in test_resume.py."""

import pytest
import torch
from omegaconf import OmegaConf

from roi_quantization.detection.model.build import build_detector
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.runs.checkpoint import load_checkpoint, load_weights
from roi_quantization.scripts.train import train
from tests.configuration import composed
from tests.trainings import TINY, run_eval

DECAY = 0.75
WEIGHT = "roi_heads.box_predictor.cls_score.weight"


def configuration(run, data, *overrides):
    """Six steps in three epochs with a validation each; the loss decides which is the best, since the AP of so short a training is 0."""
    knobs = ["trainer.max_epochs=3", "optimized_metric=val/loss", "optim.groups.lr=1e-2", "backbone.frozen_blocks=1"]
    return composed("train", *TINY, *knobs, f"run_dir={run}", f"data.root={data}", *overrides)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The folder of a run, what `train` returned, and the trained weights after each of its steps."""
    folder, steps = tmp_path_factory.mktemp("averaged"), []
    optimizer_step = DetectionModule.optimizer_step

    def remember(self, *args, **kwargs):
        optimizer_step(self, *args, **kwargs)
        steps.append({name: value.detach().clone() for name, value in self.detector.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionModule, "optimizer_step", remember)
        cfg = configuration(folder / "run", folder / "data", "average=ema", f"average.multi_avg_fn.decay={DECAY}")
        metrics = train(cfg)
    return folder, metrics, steps


def weights(path, prefix):
    return {k.removeprefix(prefix): v for k, v in load_checkpoint(path)["state_dict"].items() if k.startswith(prefix)}


def by_hand(steps):
    """The first step's weights, then `decay * average + (1 - decay) * weights`, in float64; batch norm's statistics alike."""
    average = {name: value.double() for name, value in steps[0].items() if value.is_floating_point()}
    for step in steps[1:]:
        average = {name: DECAY * value + (1 - DECAY) * step[name].double() for name, value in average.items()}
    return average


def test_the_average_is_that_by_hand(averaged):
    folder, _, steps = averaged
    assert len(steps) == 6
    kept, trained = (weights(folder / "run/last.ckpt", prefix) for prefix in ("averaged.module.", "detector."))
    for name, expected in by_hand(steps).items():
        torch.testing.assert_close(kept[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(trained[name], value) for name, value in steps[-1].items()), "kept beside it, to go on from"
    assert not torch.allclose(kept[WEIGHT], trained[WEIGHT], rtol=1e-2), "the weights have moved by more than the tolerance"


def test_the_best_checkpoint_holds_the_average_of_its_step_and_that_is_what_is_evaluated(averaged, tmp_path):
    folder, metrics, steps = averaged
    best = load_checkpoint(folder / "run/best.ckpt")
    assert best["global_step"] in (2, 4, 6)
    detector = build_detector(OmegaConf.load(folder / "run/config.yaml"), num_classes=6)
    load_weights(detector, best)
    found = detector.state_dict()
    for name, expected in by_hand(steps[: best["global_step"]]).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-7)

    again = run_eval(folder / "run/best.ckpt", tmp_path)
    assert again["test/AP"] == metrics["test/AP"]
    assert (tmp_path / "results.json").read_text() == (folder / "run/results.json").read_text() != "[]\n"


def test_training_is_not_changed_and_frozen_blocks_stay_to_the_bit(averaged, tmp_path):
    folder, _, steps = averaged
    train(configuration(tmp_path, folder / "data"))
    alone = weights(tmp_path / "last.ckpt", "detector.")
    assert all(torch.equal(alone[name], value) for name, value in steps[-1].items())
    assert not weights(tmp_path / "last.ckpt", "averaged.")
    assert (tmp_path / "results.json").read_text() != (folder / "run/results.json").read_text(), "other weights were evaluated"

    frozen = [name for name in alone if name.startswith(tuple(f"backbone.features.{layer}." for layer in (0, 1, 3, 4)))]
    kept = weights(folder / "run/last.ckpt", "averaged.module.")
    assert len(frozen) == 2 * 2 + 2 * 5, "weight and bias of two convolutions, and the five tensors of their batch norm"
    for values in (alone, kept):
        assert all(torch.equal(values[name], steps[0][name]) for name in frozen)
