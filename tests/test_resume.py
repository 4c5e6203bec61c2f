"""The same command gives the same run, bit for bit, and a run that was killed ends like one that was not."""

import logging
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from omegaconf import OmegaConf

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.runs.lock import exclusive_run_folder
from roi_quantization.detection.runs.resume import check_replaceable, checkpoint_to_resume, run_folder
from roi_quantization.detection.runs.training_checkpoints import periodic_checkpoints
from roi_quantization.scripts.train import train
from tests import commands
from tests.configuration import ROOT
from tests.faults import power_cut
from tests.trainings import SHORT, configuration, run_outcome

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_the_same_command_is_the_same_run_with_any_number_of_workers(uninterrupted, data, tmp_path, num_workers):
    train(configuration(tmp_path, data, f"data.num_workers={num_workers}"))
    assert run_outcome(tmp_path) == uninterrupted


KILLED = """
import os, random, runpy, signal, sys
from roi_quantization.detection.model.fast_rcnn import FastRCNN
from torch.optim import AdamW

moment, countdown = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]

def deadly(function, counts):
    def call(*args, **kwargs):
        global countdown
        if counts(*args, **kwargs):
            countdown -= 1
            if countdown < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

if moment == "forward pass":
    FastRCNN.forward = deadly(FastRCNN.forward, lambda self, *_: self.training)
elif moment == "validation":
    FastRCNN.forward = deadly(FastRCNN.forward, lambda self, *_: not self.training)
elif moment == "optimizer's step":
    AdamW.step = deadly(AdamW.step, lambda *_, **__: True)
else:
    os.replace = deadly(os.replace, lambda source, target: "step_" in str(target))
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_killed_at_any_moment_a_run_goes_on_to_the_same_end(uninterrupted, data, tmp_path):
    """Through the command line, by SIGKILL, at a moment drawn anew each time."""
    moment = random.choice(["forward pass", "validation", "optimizer's step", "writing of a checkpoint"])
    count = random.randrange(2, 3 if moment == "validation" else 5)
    print(f"killed in: {moment}, after {count} of them")
    command = [ROOT / "train.py", *SHORT, f"data.root={data}"]
    killed = commands.run("-c", KILLED, moment, count, *command, cwd=tmp_path, environment=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert periodic_checkpoints(run) and not (run / "metrics.json").exists()

    resumed = commands.run(*command, "resume=auto", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Goes on from {run}" in resumed.stdout
    assert list((tmp_path / "runs").iterdir()) == [run], "it goes on in its own folder"
    assert run_outcome(run) == uninterrupted
    assert not periodic_checkpoints(run) and not list(run.glob(".*.tmp")), "nothing is left behind"


def test_a_truncated_checkpoint_is_skipped(uninterrupted, data, tmp_path, inject_fault, caplog):
    inject_fault(4, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(configuration(tmp_path, data))
    newest, before = periodic_checkpoints(tmp_path)
    assert (newest.name, before.name) == ("step_0000004.ckpt", "step_0000003.ckpt"), "two are kept"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])

    with caplog.at_level(logging.INFO):
        train(configuration(tmp_path, data, "resume=auto"))
    assert f"{newest} is not an intact checkpoint" in caplog.text
    assert f"Goes on from {before}: step 3, in epoch 1" in caplog.text
    assert run_outcome(tmp_path) == uninterrupted


def test_a_checkpoint_with_damaged_bytes_is_skipped(uninterrupted, data, tmp_path, inject_fault, caplog):
    """It has its full length, and `torch.load` reads it: only the checksums differ."""
    inject_fault(4, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(configuration(tmp_path, data))
    newest, before = periodic_checkpoints(tmp_path)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    newest.write_bytes(content)
    torch.load(newest, weights_only=True)

    with caplog.at_level(logging.INFO):
        train(configuration(tmp_path, data, "resume=auto"))
    assert f"{newest} is not an intact checkpoint" in caplog.text and f"Goes on from {before}" in caplog.text
    assert run_outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param(["average=ema"], marks=pytest.mark.slow),
        ["data.batch_size=2", "trainer.accumulate_grad_batches=2"],
        pytest.param(["data.batch_size=2", "+trainer.limit_train_batches=2"], marks=pytest.mark.slow),
        pytest.param(["data.batch_size=2", "+trainer.reload_dataloaders_every_n_epochs=1"], marks=pytest.mark.slow),
        ["trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=3"],
    ],
    ids=["averaged", "accumulated", "limited", "reloaded", "validated by steps"],
)
def test_what_a_step_leaves_behind_goes_on_in_the_middle_of_an_epoch(data, tmp_path, inject_fault, knobs):
    """Step 3 is the second of two in its epoch."""
    train(configuration(tmp_path / "uninterrupted", data, *knobs))
    inject_fault(3, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(configuration(tmp_path / "killed", data, *knobs))
    assert periodic_checkpoints(tmp_path / "killed")[0].name == "step_0000003.ckpt"
    train(configuration(tmp_path / "killed", data, *knobs, f"resume={tmp_path / 'killed'}"))
    assert run_outcome(tmp_path / "killed") == run_outcome(tmp_path / "uninterrupted")


@pytest.mark.parametrize(
    ("number", "status", "step"),
    [
        (signal.SIGTERM, 143, 3),
        (signal.SIGINT, 130, 2),
        *(pytest.param(signal.SIGTERM, 143, step, marks=pytest.mark.slow) for step in (2, 5)),
        *(pytest.param(signal.SIGINT, 130, step, marks=pytest.mark.slow) for step in (3, 5)),
    ],
)
def test_sigterm_and_ctrl_c_leave_a_checkpoint(uninterrupted, data, tmp_path, inject_fault, number, status, step):
    """Step 2 is the first of its epoch; step 3 the last, so that its validation is run before the run ends; step 5 the last of all."""
    inject_fault(step, lambda: signal.raise_signal(number))
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        train(configuration(tmp_path, data, "checkpoint.every_n_steps=100"))
    assert ended.value.code == status
    assert signal.getsignal(number) == handler
    assert [path.name for path in periodic_checkpoints(tmp_path)] == [f"step_{step + 1:07d}.ckpt"], "the step is done, then it ends"
    train(configuration(tmp_path, data, "checkpoint.every_n_steps=100", f"resume={tmp_path}"))
    assert run_outcome(tmp_path) == uninterrupted


def test_a_run_that_begins_anew_in_its_folder_removes_what_it_replaces(data, tmp_path, inject_fault):
    for name in ("step_0000005.ckpt", "step_0000006.ckpt", "last.ckpt", "metrics.json", "results.json", "cross.json"):
        (tmp_path / name).touch()
    OmegaConf.save(configuration(tmp_path, data, "seed=1"), tmp_path / "config.yaml", resolve=True)
    inject_fault(2, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(configuration(tmp_path, data))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["best.ckpt", "step_0000001.ckpt", "step_0000002.ckpt"]
    assert not list(tmp_path.glob("*.json")), "it is not taken for a finished run"


def test_a_finished_run_that_is_trained_on_in_its_folder_keeps_its_end_until_there_is_another(data, tmp_path, inject_fault, monkeypatch):
    """Hydra's folder is absolute, what people type is not."""
    monkeypatch.chdir(tmp_path)
    train(configuration(tmp_path / "run", data))
    inject_fault(6, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(configuration(tmp_path / "run", data, "trainer.max_epochs=4", "checkpoint.every_n_steps=100", "resume=run/last.ckpt"))
    assert (tmp_path / "run" / "last.ckpt").is_file()


def test_a_checkpoint_of_another_detector_or_optimizer_says_what_to_do(data, tmp_path):
    run = tmp_path / "run"
    train(configuration(run, data))
    checkpoint = run / "last.ckpt"
    for overrides, message in (
        (["head.box_head.hidden=16"], r"weights differ: .*hidden.* set init_from="),
        (["optim=sgd"], r"optim\.optimizer\._target_ was torch\.optim\.AdamW and is torch\.optim\.SGD.* set init_from="),
        (["data.classes=[disc,ring]"], r"weights differ: .* another number of classes\? .* set init_from="),
    ):
        with pytest.raises(InputError, match=rf"^resume: {checkpoint}: (.|\n)*{message}"):
            train(configuration(tmp_path / "new", data, f"resume={checkpoint}", "trainer.max_epochs=4", *overrides))


class TestWhichRunGoesOn:
    """None of these trains: a run folder is its config.yaml and the names of its checkpoints."""

    def run(self, folder, cfg, *files, age=0):
        folder.mkdir(parents=True)
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        for name in files:
            (folder / name).touch()
            os.utime(folder / name, (time.time() - age,) * 2)
        return folder

    def test_auto_is_the_newest_unfinished_run_of_this_configuration(self, tmp_path):
        cfg, other = (configuration("somewhere", "data", "resume=auto", f"seed={seed}") for seed in (0, 1))
        new = str(tmp_path / "new")
        assert run_folder(new, _root_=cfg) == new, "there is none"
        self.run(tmp_path / "finished", cfg, "metrics.json", "last.ckpt")
        self.run(tmp_path / "other", other, "step_0000001.ckpt")
        self.run(tmp_path / "without", cfg)
        assert run_folder(new, _root_=cfg) == new
        self.run(tmp_path / "older", cfg, "step_0000003.ckpt", age=60)
        newest = self.run(tmp_path / "newest", cfg, "step_0000001.ckpt", age=30)
        (tmp_path / "damaged").mkdir()
        (tmp_path / "damaged" / "config.yaml").write_text("{half")
        (tmp_path / "damaged" / "step_0000001.ckpt").touch()
        assert run_folder(new, _root_=cfg) == str(newest)

        with commands.another_process_in(newest):
            assert run_folder(new, _root_=cfg) == str(tmp_path / "older"), "one that is running is left alone"
            with pytest.raises(ValueError, match="another process is running"), exclusive_run_folder(newest):
                pass
        assert run_folder(new, _root_=cfg) == str(newest)

    def test_settings_that_do_not_change_the_result_may_differ(self, tmp_path):
        run = self.run(tmp_path / "run", configuration("somewhere", "data", "data.num_workers=2"), "step_0000001.ckpt")
        new = str(tmp_path / "new")
        assert run_folder(new, _root_=configuration("elsewhere", "data", "resume=auto")) == str(run)
        assert run_folder(new, _root_=configuration("elsewhere", "other data", "resume=auto")) == new, "other images are another run"

    @pytest.mark.parametrize(
        ("seed", "files", "message"),
        [
            (0, ["metrics.json"], r"this run is finished\. To train on, set resume=.*last\.ckpt"),
            (1, ["step_0000001.ckpt"], r"another configuration: seed was 1 and is 0"),
            (0, [], r"there is no intact checkpoint\. Was it killed before step 1 "),
            (0, ["step_0000001.ckpt"], "there is no intact checkpoint"),
        ],
    )
    def test_a_run_that_cannot_go_on_says_why(self, tmp_path, seed, files, message):
        run = self.run(tmp_path / "run", configuration("somewhere", "data", f"seed={seed}"), *files)
        with pytest.raises(ValueError, match=message):
            checkpoint_to_resume(configuration(run, "data", f"resume={run}", "seed=0"))

    def test_auto_leaves_another_unfinished_run_in_the_named_folder_alone(self, tmp_path):
        run = self.run(tmp_path / "run", configuration("somewhere", "data", "seed=1"), "step_0000001.ckpt", "step_0000002.ckpt")
        with pytest.raises(ValueError, match=r"unfinished run of another configuration: seed was 1 and is 0; .* another folder"):
            train(configuration(run, "data", "resume=auto"))
        assert len(periodic_checkpoints(run)) == 2 and OmegaConf.load(run / "config.yaml").seed == 1
        (run / "metrics.json").touch()
        with pytest.raises(ValueError, match=r"a finished run of another configuration.*resume=.*last\.ckpt and another folder"):
            check_replaceable(run, {"seed": 0})

    def test_a_checkpoint_with_weights_only_is_refused(self, tmp_path):
        torch.save({"state_dict": {}, "config": {}, "categories": []}, tmp_path / "best.ckpt")
        with pytest.raises(ValueError, match=r"it contains weights only\. To go on take a last\.ckpt"):
            checkpoint_to_resume(configuration(tmp_path, "data", f"resume={tmp_path / 'best.ckpt'}"))

    def test_a_wrong_path_says_what_is_expected(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no such run folder or checkpoint\. resume=auto"):
            checkpoint_to_resume(configuration(tmp_path, "data", f"resume={tmp_path / 'nowhere'}"))
        with pytest.raises(SystemExit, match=r"train\.py: resume=.*nowhere"):
            run_folder("new", _root_=configuration(tmp_path, "data", f"resume={tmp_path / 'nowhere'}"))


def default_training(*overrides):
    """On a CPU, or as ROI_TRAINER says: cpu or gpu."""
    return [
        sys.executable,
        str(ROOT / "train.py"),
        f"trainer={os.environ.get('ROI_TRAINER', 'cpu')}",
        "trainer.enable_progress_bar=false",
        "checkpoint.every_n_steps=20",
        *overrides,
    ]


@pytest.mark.slow
def test_the_default_training_survives_kills_at_random_moments(tmp_path):
    """20 of them, or as many as ROI_KILLS says: each some moments after the checkpoint of a step drawn at random."""
    kills = int(os.environ.get("ROI_KILLS", 20))
    options = {"cwd": tmp_path, "stdout": subprocess.DEVNULL}
    subprocess.run(default_training("hydra.run.dir=uninterrupted"), check=True, **options)
    steps = torch.load(tmp_path / "uninterrupted" / "last.ckpt", weights_only=True, map_location="cpu")["global_step"]
    for step in sorted(random.choices(range(20, steps - 40, 20), k=kills)):
        with subprocess.Popen(default_training("resume=auto"), **options) as process:
            while not any(path.name >= f"step_{step:07d}.ckpt" for path in tmp_path.glob("runs/*/step_*.ckpt")) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(random.uniform(0, 2))
            process.kill()
        assert process.returncode == -signal.SIGKILL, "it was killed, it did not end"
    subprocess.run(default_training("resume=auto"), check=True, **options)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "train.log").read_text().count("Goes on from") <= kills, "some are killed before they say so"
    assert run_outcome(run) == run_outcome(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_ten_runs_of_one_command_are_one_run(tmp_path):
    """One epoch of the default training each, or as many runs as ROI_RERUNS says."""
    found = []
    for index in range(int(os.environ.get("ROI_RERUNS", 10))):
        command = default_training("trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", f"hydra.run.dir=run{index}")
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        found.append(run_outcome(tmp_path / f"run{index}"))
    assert all(one == found[0] for one in found)
