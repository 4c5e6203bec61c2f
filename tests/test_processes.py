"""Several processes are one run: each image counts once, one process writes, all stop and go on together. On the CPU, for real."""

import json
import os
import shutil
import signal

import pytest
import torch
from omegaconf import OmegaConf

from roi_quantization.detection.runs.distributed import is_rank_zero, new_folder
from roi_quantization.detection.runs.lock import exclusive_run_folder, is_running
from roi_quantization.detection.runs.training_checkpoints import periodic_checkpoints
from tests import commands
from tests.configuration import ROOT
from tests.trainings import TINY, run_eval, run_outcome, run_train

# Two steps an epoch in two processes. Three images of val and five of test are one batch and two: what two processes get does not come out
# even, neither in images nor, with val, in batches.
SHORT = [*TINY, "threads=1", "data.source.test=5", "trainer.max_epochs=3", "optimized_metric=val/loss", "head.score_threshold=0"]
SHORT += ["data.batch_size=2", "checkpoint.every_n_steps=1"]
TWO = ["trainer=ddp_cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "trainer.check_val_every_n_epoch=1"]
PLACE = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_NTASKS", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


pytestmark = pytest.mark.usefixtures("threads_as_before")


def start(folder, script, *overrides, before=(), **environment):
    """Start one process."""
    outside = {name: value for name, value in os.environ.items() if name not in PLACE}
    output = folder / "output.txt"
    command = [*before, ROOT / script, *overrides]
    return commands.start(*command, cwd=folder, stdout=output, stderr=output, environment=outside | {"PYTHONPATH": str(ROOT)} | environment)


def start_by_slurm(folder, script, *overrides, processes=2, before=()):
    """Start the processes that `srun` would: the same command, each with its rank in the environment."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "test", "SLURM_NTASKS": str(processes)}
    job |= {"SLURM_NTASKS_PER_NODE": str(processes), "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1"}
    places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(processes)]
    return [start(folder, script, *overrides, before=before, **job, **place) for place in places]


def exit_codes(*processes):
    """Wait for the processes and return their exit codes."""
    for process in processes:
        process.join(timeout=1800)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "set"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A run of two processes, the second of which Lightning starts."""
    folder = tmp_path_factory.mktemp("trained")
    command = ["train.py", *SHORT, *TWO, "cross=[pool]", f"data.root={data}", "hydra.run.dir=run"]
    assert exit_codes(start(folder, *command)) == [0], (folder / "output.txt").read_text()
    return folder / "run"


def evaluation(run):
    return {name: (run / name).read_bytes() for name in ("results.json", "metrics.json")}


def test_one_process_evaluates_what_two_have_trained_to_the_same_results(trained, tmp_path):
    assert len(json.loads((trained / "results.json").read_text())) == 5 * 100, "detections_per_image of each of five images"
    run_eval(trained / "best.ckpt", tmp_path / "one")
    assert evaluation(tmp_path / "one") == evaluation(trained)
    run_eval(trained / "best.ckpt", tmp_path / "pool", "roi=pool")
    assert json.loads((tmp_path / "pool/metrics.json").read_text()) == json.loads((trained / "cross.json").read_text())["pool"]


def test_two_processes_that_slurm_starts_evaluate_to_the_same_results(trained, tmp_path):
    command = ["eval.py", f"ckpt={trained / 'best.ckpt'}", *TWO, "threads=1", "hydra.run.dir=run"]
    assert exit_codes(*start_by_slurm(tmp_path, *command)) == [0, 0], (tmp_path / "output.txt").read_text()
    assert evaluation(tmp_path / "run") == evaluation(trained)
    assert (tmp_path / "output.txt").read_text().count("The run folder:") == 1, "rank zero prints"


@pytest.mark.slow
def test_four_processes_evaluate_to_the_same_results(trained, tmp_path):
    """More than there are batches."""
    command = ["eval.py", f"ckpt={trained / 'best.ckpt'}", *TWO, "trainer.devices=4", "threads=1", "hydra.run.dir=run"]
    assert exit_codes(start(tmp_path, *command)) == [0], (tmp_path / "output.txt").read_text()
    assert evaluation(tmp_path / "run") == evaluation(trained)


@pytest.mark.slow
def test_two_processes_that_torchrun_starts_train_and_evaluate_to_the_same_results(trained, data, tmp_path):
    command = ["train.py", *SHORT, *TWO, "cross=[pool]", f"data.root={data}", "hydra.run.dir=run"]
    assert exit_codes(start(tmp_path, *command, before=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])) == [0], (
        tmp_path / "output.txt"
    ).read_text()
    assert run_outcome(tmp_path / "run") == run_outcome(trained)
    assert (tmp_path / "run" / "cross.json").read_text() == (trained / "cross.json").read_text()


@pytest.mark.slow
def test_processes_stop_together_and_go_on_to_the_same_end(trained, data, tmp_path):
    """The second one alone is told, in the middle of a step; and the run that goes on is one that Lightning starts."""
    command = ["train.py", *SHORT, *TWO, "cross=[pool]", f"data.root={data}", "checkpoint.every_n_steps=100"]
    run, aside = tmp_path / "runs" / "run", tmp_path / "aside"
    stopped = start_by_slurm(tmp_path, *command, "hydra.run.dir=runs/run", before=in_the_third_step("os.kill(os.getpid(), signal.SIGUSR1)"))
    assert exit_codes(*stopped) == [128 + signal.SIGTERM, 0], (tmp_path / "output.txt").read_text()
    assert [path.name for path in periodic_checkpoints(run)] == ["step_0000003.ckpt"]
    shutil.copytree(run, aside)

    assert exit_codes(start(tmp_path, *command, "resume=auto")) == [0], (tmp_path / "output.txt").read_text()
    assert list((tmp_path / "runs").iterdir()) == [run], "no process makes a folder of its own"
    assert run_outcome(run) == run_outcome(trained)

    shutil.rmtree(run)
    aside.rename(run)
    by_name = start_by_slurm(tmp_path, *command, "hydra.run.dir=runs/run", "resume=runs/run")
    assert exit_codes(*by_name) == [0, 0], (tmp_path / "output.txt").read_text()
    assert run_outcome(run) == run_outcome(trained)


THIRD_STEP = """
import os, runpy, signal, sys
from roi_quantization.detection.model.fast_rcnn import FastRCNN

forward, steps = FastRCNN.forward, 0

def watched(self, *args):
    global steps
    steps += self.training
    detections, losses = forward(self, *args)
    if self.training and steps == 3 and os.environ["SLURM_PROCID"] == "1":
        WHAT
    return detections, losses

FastRCNN.forward = watched
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def in_the_third_step(what):
    """What to put before a script, for this to happen in the second of the processes that SLURM starts, in the middle of that step."""
    return ["-c", THIRD_STEP.replace("WHAT", what)]


@pytest.mark.slow
def test_a_non_finite_loss_on_one_rank_ends_both_and_loses_no_checkpoint(trained, data, tmp_path):
    command = ["train.py", *SHORT, *TWO, "cross=[pool]", f"data.root={data}", "hydra.run.dir=run"]
    assert exit_codes(
        *start_by_slurm(
            tmp_path, *command, before=in_the_third_step('losses = {name: loss * float("nan") for name, loss in losses.items()}')
        )
    ) == [1, 1]
    output = (tmp_path / "output.txt").read_text()
    assert "the loss is nan in step 2 (epoch 1, batch 0" in output
    assert "the loss of another rank is not finite in step 2." in output
    found = json.loads((tmp_path / "run" / "nan_loss.json").read_text())
    assert (found["rank"], found["step"]) == (1, 2)
    assert [path.name for path in periodic_checkpoints(tmp_path / "run")] == ["step_0000002.ckpt", "step_0000001.ckpt"]
    assert exit_codes(start(tmp_path, *command, "resume=run")) == [0], (tmp_path / "output.txt").read_text()
    assert run_outcome(tmp_path / "run") == run_outcome(trained)


@pytest.mark.slow
def test_a_step_of_two_processes_is_the_step_of_one_with_twice_the_batch(data, tmp_path):
    """Where nothing looks at a whole batch: no batch norm, and as many RoIs sampled of each image."""
    alike = ["backbone.norm=none", "optim=sgd", "head.rois_per_image=16"]
    command = ["train.py", *SHORT, *TWO, *alike, f"data.root={data}", "hydra.run.dir=two"]
    assert exit_codes(start(tmp_path, *command)) == [0], (tmp_path / "output.txt").read_text()
    (tmp_path / "data").symlink_to(data)
    run_train(tmp_path, *SHORT[len(TINY) :], *alike, "data.batch_size=4")
    one, two = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("run", "two"))
    assert one["global_step"] == two["global_step"] == 6
    for name, weights in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weights, rtol=1e-4, atol=1e-6, msg=name)


PLACES = {
    "alone": ({}, True),
    "first of torchrun": ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, True),
    "second of torchrun": ({"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, False),
    "second of SLURM": ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, False),
    "second of Lightning": ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, False),
    "first on the second machine": ({"NODE_RANK": "1"}, False),
}


@pytest.fixture
def place(monkeypatch):
    def put(environment):
        for name in PLACE:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(("environment", "first"), PLACES.values(), ids=PLACES)
def test_one_process_is_rank_zero_whoever_starts_them(place, environment, first):
    place(environment)
    assert is_rank_zero() == first


def test_processes_of_srun_and_torchrun_need_a_named_folder(place):
    for alone in ({}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_NTASKS": "1"}):
        place(alone)
        assert new_folder("runs/now") == "runs/now"
    for name in ("first of torchrun", "second of torchrun", "second of SLURM", "first on the second machine"):
        place(PLACES[name][0])
        with pytest.raises(SystemExit, match=r"Set one with hydra\.run\.dir=runs/<name>"):
            new_folder("runs/now")


def test_is_running_does_not_release_the_lock_of_this_process(tmp_path):
    ask = "import sys; from roi_quantization.detection.runs.lock import is_running; sys.exit(is_running(sys.argv[1]))"
    with exclusive_run_folder(tmp_path):
        assert not is_running(tmp_path), "this is no other process"
        assert commands.run("-c", ask, tmp_path, cwd=ROOT).returncode == 1
    assert commands.run("-c", ask, tmp_path, cwd=ROOT).returncode == 0


def test_a_sweep_starts_no_processes_within_a_run(tmp_path):
    """Lightning would start the whole sweep once more."""
    command = ["train.py", "-m", *SHORT, *TWO, "roi=align,pool", f"data.root={tmp_path / 'data'}", "hydra.sweep.dir=sweep"]
    assert exit_codes(start(tmp_path, *command)) == [1]
    assert "each run of this sweep needs 2 processes" in (tmp_path / "output.txt").read_text()
    assert not list(tmp_path.glob("sweep/*/*.ckpt"))
    assert OmegaConf.load(tmp_path / "sweep" / "multirun.yaml").hydra.mode == "MULTIRUN"
