"""Trainings of a few steps on a few small images, and their outcomes for comparison."""

import csv
import hashlib
import json

import torch

from roi_quantization.detection.runs.checkpoint import load_checkpoint, register_parts
from roi_quantization.scripts.eval import evaluate
from roi_quantization.scripts.train import train
from tests.configuration import composed

TINY = [
    "trainer=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
    "trainer.check_val_every_n_epoch=1",
    "data.num_workers=0",
    "data.source.train=8",
    "data.source.val=3",
    "data.source.test=4",
    "data.source.image_size=96",
    "data.source.sides=[24,48]",
    "data.source.objects=[1,2]",
    "backbone.width=0.0625",
    "head.box_head.hidden=32",
    "head.score_threshold=0.01",
]
# six steps in three epochs with a validation each; the loss decides which is the best, since the AP of so short a training is always 0
SHORT = [*TINY, "threads=1", "trainer.max_epochs=3", "optimized_metric=val/loss", "head.box_head.dropout=0.5", "checkpoint.every_n_steps=1"]


def run_train(folder, *overrides):
    cfg = composed("train", *TINY, f"run_dir={folder / 'run'}", f"data.root={folder / 'data'}", *overrides)
    return train(cfg)


def run_eval(ckpt, folder, *overrides):
    register_parts(load_checkpoint(ckpt)["config"], ckpt)
    return evaluate(composed("eval", "trainer=cpu", "trainer.enable_progress_bar=false", f"ckpt={ckpt}", f"run_dir={folder}", *overrides))


def configuration(run, data, *overrides):
    return composed("train", *SHORT, f"run_dir={run}", f"data.root={data}", *overrides)


def run_outcome(run):
    """Return hashes of the weights, of the best ones too, and the content of the result files and of metrics.csv without times."""
    files = {name: (run / name).read_text() for name in ("results.json", "metrics.json")}
    with open(run / "metrics.csv", newline="") as file:
        files["metrics.csv"] = [{name: cell for name, cell in row.items() if name != "train/waiting"} for row in csv.DictReader(file)]
    assert json.loads(files["results.json"]), "no detections"
    return {name: weights_hash(run / name) for name in ("last.ckpt", "best.ckpt")} | files


def weights_hash(path):
    weights = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in weights.values())).hexdigest()
