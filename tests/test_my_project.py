"""examples/my_project as its README says, from a copy outside of the checkout."""

import csv
import json
import re
import shlex
import shutil

import pytest

from roi_quantization.detection.runs.checkpoint import load_checkpoint
from tests import commands
from tests.configuration import ROOT

EXAMPLE = ROOT / "examples" / "my_project"
TINY = ["trainer=cpu", "trainer.enable_progress_bar=false", "threads=1"]
TINY_TRAINING = [
    "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=1",
    "head.box_head.hidden=32",
    "head.score_threshold=0",
]
TINY_DATA = ["data.source.train=8", "data.source.val=3", "data.source.image_size=64"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("elsewhere") / "project")


def run(command, project, *more):
    python, *words = shlex.split(command)
    assert python == "python"
    return commands.run(*words, *more, cwd=project)


def test_the_two_commands(project):
    training, evaluation = re.findall(r"^python .*$", (EXAMPLE / "README.md").read_text(), re.MULTILINE)
    done = run(training, project, *TINY, *TINY_TRAINING, *TINY_DATA)
    assert done.returncode == 0, done.stdout + done.stderr
    first = project / "runs/first"
    with open(first / "metrics.csv", newline="") as file:
        norms = [float(row["train/gradient_norm"]) for row in csv.DictReader(file) if row["train/gradient_norm"]]
    assert len(norms) == 2 and min(norms) > 0  # 8 images in batches of 4
    config = load_checkpoint(first / "best.ckpt")["config"]
    targets = [config[part]["_target_"] for part in ("roi", "backbone")] + [config["data"]["source"]["_target_"]]
    assert targets == ["my_project.operator.roi_align_with_context", "my_project.backbone.ResNet18", "my_project.data.draw"]

    done = run(evaluation, project, *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads((project / "runs" / name / "results.json").read_text()) for name in ("first", "again")]
    assert results[0] == results[1] != []

    done = run(evaluation.replace("--config-dir configs ", ""), project, *TINY)
    assert done.returncode == 1 and "its configuration would call my_project." in done.stderr
