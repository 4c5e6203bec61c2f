"""The same command is the same run, bit for bit; and a run that was killed goes on and ends as if it had not been."""

import csv
import hashlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.loggers import CSVLogger

from detection.checkpoint import load_checkpoint
from detection.evaluation import files
from detection.evaluation.files import NotWrittenError
from detection.lock import only_process
from detection.module import DetectionModule
from detection.recent import recent_checkpoints
from detection.resume import checkpoint_to_resume, run_folder
from detection.stop import FiniteLoss
from tests.faults import full_disk
from tests.test_train_and_eval import ROOT, TINY, composed
from train import train

# six steps in three epochs with a validation each; the loss decides which is the best, since the AP of so short a training is always 0
SHORT = [*TINY, "threads=1", "trainer.max_epochs=3", "optimized_metric=val/loss", "head.box_head.dropout=0.5", "checkpoint.every_n_steps=1"]


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """What is left of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(configuration(run, data))
    assert torch.are_deterministic_algorithms_enabled()
    return remains(run)


def configuration(run, data, *overrides):
    return composed("train", *SHORT, f"run_dir={run}", f"data.root={data}", *overrides)


def remains(run):
    """Hashes of the weights, the best ones too, and what is written of the results and the way there, times aside."""
    files = {name: (run / name).read_text() for name in ("results.json", "metrics.json")}
    with open(run / "metrics.csv", newline="") as file:
        files["metrics.csv"] = [{name: cell for name, cell in row.items() if name != "train/waiting"} for row in csv.DictReader(file)]
    assert json.loads(files["results.json"]), "something was found"
    return {name: weights_hash(run / name) for name in ("last.ckpt", "best.ckpt")} | files


def weights_hash(path):
    weights = torch.load(path, weights_only=True)["state_dict"]
    return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in weights.values())).hexdigest()


@pytest.fixture
def accident(monkeypatch):
    """A function that lets something happen in the middle of a step: `accident(step, what)`, steps counted from 0."""
    training_step = DetectionModule.training_step

    def arrange(step, what):
        def watched(self, batch, batch_idx):
            if self.global_step == step:
                monkeypatch.setattr(DetectionModule, "training_step", training_step)
                what()
            return training_step(self, batch, batch_idx)

        monkeypatch.setattr(DetectionModule, "training_step", watched)

    return arrange


def power_cut():
    raise RuntimeError("as good as a power cut: nothing is saved after it")


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_the_same_command_is_the_same_run_with_any_number_of_workers(whole, data, tmp_path, num_workers):
    train(configuration(tmp_path, data, f"data.num_workers={num_workers}"))
    assert remains(tmp_path) == whole


KILLED = """
import os, random, runpy, signal, sys
from detection.detector import FastRCNN
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


def test_killed_at_any_moment_a_run_goes_on_to_the_same_end(whole, data, tmp_path):
    """Through the command line, by SIGKILL, at a moment drawn anew each time."""
    moment = random.choice(["forward pass", "validation", "optimizer's step", "writing of a checkpoint"])
    count = random.randrange(2, 3 if moment == "validation" else 5)
    print(f"killed in: {moment}, after {count} of them")
    command = [str(ROOT / "train.py"), *SHORT, f"data.root={data}"]
    process = [sys.executable, "-c", KILLED, moment, str(count), *command]
    killed = subprocess.run(process, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert recent_checkpoints(run) and not (run / "metrics.json").exists()

    resumed = subprocess.run([sys.executable, *command, "resume=auto"], cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Goes on from {run}" in resumed.stdout
    assert list((tmp_path / "runs").iterdir()) == [run], "it goes on in its own folder"
    assert remains(run) == whole
    assert not recent_checkpoints(run) and not list(run.glob(".*.tmp")), "nothing is left behind"


def test_a_truncated_checkpoint_is_noticed_and_the_one_before_it_is_used(whole, data, tmp_path, accident, caplog):
    accident(4, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(configuration(tmp_path, data))
    newest, before = recent_checkpoints(tmp_path)
    assert (newest.name, before.name) == ("step_0000004.ckpt", "step_0000003.ckpt"), "two are kept"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])

    with caplog.at_level(logging.INFO):
        train(configuration(tmp_path, data, "resume=auto"))
    assert f"{newest} is no whole checkpoint" in caplog.text
    assert f"Goes on from {before}: step 3, in epoch 1" in caplog.text
    assert remains(tmp_path) == whole


@pytest.mark.parametrize(
    "knobs", [["average=ema"], ["data.batch_size=2", "trainer.accumulate_grad_batches=2"]], ids=["averaged", "accumulated"]
)
def test_what_a_step_leaves_behind_goes_on_in_the_middle_of_an_epoch(data, tmp_path, accident, knobs):
    """Step 3 is the second of two in its epoch."""
    train(configuration(tmp_path / "whole", data, *knobs))
    accident(3, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(configuration(tmp_path / "killed", data, *knobs))
    assert recent_checkpoints(tmp_path / "killed")[0].name == "step_0000003.ckpt"
    train(configuration(tmp_path / "killed", data, *knobs, f"resume={tmp_path / 'killed'}"))
    assert remains(tmp_path / "killed") == remains(tmp_path / "whole")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [2, 3, 5])
def test_sigterm_and_ctrl_c_leave_a_checkpoint(whole, data, tmp_path, accident, number, status, step):
    """Step 2 is the first of its epoch; step 3 the last, so that its validation is run before the run ends; step 5 the last of all."""
    accident(step, lambda: signal.raise_signal(number))
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        train(configuration(tmp_path, data, "checkpoint.every_n_steps=100"))
    assert ended.value.code == status
    assert signal.getsignal(number) == handler
    assert [path.name for path in recent_checkpoints(tmp_path)] == [f"step_{step + 1:07d}.ckpt"], "the step is done, then it ends"
    train(configuration(tmp_path, data, "checkpoint.every_n_steps=100", f"resume={tmp_path}"))
    assert remains(tmp_path) == whole


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_batch(data, tmp_path):
    message = r"the loss is nan in step \d \(epoch \d, batch \d, images \[.*the largest weight .*e\+\d\d.*resume="
    with pytest.raises(FloatingPointError, match=message):
        train(configuration(tmp_path, data, "optim.groups.lr=1e20"))
    found = json.loads((tmp_path / "nan_loss.json").read_text())
    assert len(found["image_ids"]) == 4 and found["seed"] == 0
    assert recent_checkpoints(tmp_path), "no checkpoint is lost"

    (tmp_path / "nan_loss.json").unlink()
    with pytest.raises(FloatingPointError, match=f"step {found['step']} "):
        train(configuration(tmp_path, data, "optim.groups.lr=1e20", f"resume={tmp_path}"))
    assert json.loads((tmp_path / "nan_loss.json").read_text()) == found, "it comes to the same batch again"


def test_where_nothing_is_saved_yet_the_command_itself_is_the_way_back(tmp_path):
    model, trainer = torch.nn.Linear(1, 1), SimpleNamespace(global_step=0, current_epoch=0, global_rank=0, optimizers=[])
    trainer.optimizers.append(torch.optim.SGD(model.parameters(), lr=0.1))
    watch = FiniteLoss(tmp_path, seed=0)
    watch.on_train_batch_start(trainer, model, ([], [{"image_id": 7}]), 0)
    with pytest.raises(FloatingPointError, match=r"images \[7\]\).* and the same command comes to this batch again\. If"):
        watch.on_before_backward(trainer, model, torch.tensor(float("nan")))


@pytest.mark.parametrize("file", ["step_0000003.ckpt", "best.ckpt", "metrics.csv", "last.ckpt", "results.json"])
def test_a_full_disk_loses_nothing_and_the_run_goes_on(whole, data, tmp_path, monkeypatch, file):
    """The disk is full while this file is written; metrics.csv is Lightning's, the others are written whole."""
    folder = tmp_path / "run"
    real, happened = files.whole_file, []

    @contextmanager
    def whole_file(path):
        now = os.path.basename(path) == file and not happened and (file != "best.ckpt" or recent_checkpoints(folder))
        with full_disk(1) if now else nullcontext():
            happened.extend([path] * bool(now))
            with real(path) as opened:
                yield opened

    def save(self):
        now = file == "metrics.csv" and not happened and recent_checkpoints(folder)
        with full_disk(1) if now else nullcontext():
            happened.extend([file] * bool(now))
            written(self)

    written = CSVLogger.save
    monkeypatch.setattr(CSVLogger, "save", save)
    monkeypatch.setattr(files, "whole_file", whole_file)
    with pytest.raises(NotWrittenError, match=rf"{tmp_path}.* could not be written: File too large.*Make room there.*resume=auto"):
        train(configuration(folder, data))
    assert happened and not (folder / "metrics.json").exists() and not list(folder.glob(".*.tmp"))
    for path in folder.glob("*.ckpt"):
        load_checkpoint(path)
    train(configuration(folder, data, f"resume={folder}"))
    assert remains(folder) == whole


def test_a_run_folder_that_is_moved_away_is_not_begun_anew(whole, data, tmp_path, accident):
    run, moved = tmp_path / "run", tmp_path / "moved"
    accident(3, lambda: run.rename(moved))
    with pytest.raises(FileNotFoundError, match=rf"the run folder {run} is gone since this began.*resume=<that folder>"):
        train(configuration(run, data))
    assert [path.name for path in recent_checkpoints(moved)] == ["step_0000003.ckpt", "step_0000002.ckpt"]
    assert not list(tmp_path.glob("run/*.ckpt")), "no second half of a run"
    train(configuration(moved, data, f"resume={moved}"))
    assert remains(moved) == whole


def test_a_loading_process_that_is_killed_says_why_and_how_to_go_on(whole, data, tmp_path, accident):
    """As the system kills one when memory runs out."""
    accident(3, lambda: [os.kill(process.pid, signal.SIGKILL) for process in multiprocessing.active_children()])
    message = r"a process that loads images died: .*pid.*memory has run out.*data\.num_workers.*resume=auto"
    with pytest.raises(RuntimeError, match=message):
        train(configuration(tmp_path, data, "data.num_workers=1"))
    assert [path.name for path in recent_checkpoints(tmp_path)] == ["step_0000003.ckpt", "step_0000002.ckpt"]
    train(configuration(tmp_path, data, f"resume={tmp_path}"))
    assert remains(tmp_path) == whole


def test_data_that_changed_are_refused_unless_told_otherwise(data, tmp_path, accident):
    root, run = shutil.copytree(data, tmp_path / "data"), tmp_path / "run"
    accident(3, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(configuration(run, root))
    path = root / "annotations/instances_train.json"
    instances = json.loads(path.read_text())
    instances["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(instances))
    message = r"the data are not those that this run began with: 1 images of train have other annotations \(the first is \d+\)"
    with pytest.raises(ValueError, match=message):
        train(configuration(run, root, f"resume={run}"))
    assert [path.name for path in recent_checkpoints(run)] == ["step_0000003.ckpt", "step_0000002.ckpt"]
    train(configuration(run, root, f"resume={run}", "checkpoint.same_data=false"))
    assert (run / "metrics.json").is_file()


def test_a_run_that_begins_anew_in_its_folder_removes_what_it_replaces(data, tmp_path, accident):
    for name in ("step_0000005.ckpt", "step_0000006.ckpt", "last.ckpt"):
        (tmp_path / name).touch()
    accident(2, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(configuration(tmp_path, data))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["best.ckpt", "step_0000001.ckpt", "step_0000002.ckpt"]


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

        hold = "import sys; from detection.lock import only_process\nwith only_process(sys.argv[1]): print('holds', flush=True); input()"
        command = [sys.executable, "-c", hold, str(newest)]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "holds\n"
            assert run_folder(new, _root_=cfg) == str(tmp_path / "older"), "one that is running is left alone"
            with pytest.raises(ValueError, match="another process is at work"), only_process(newest):
                pass
            process.communicate("\n")
        assert run_folder(new, _root_=cfg) == str(newest)

    def test_what_decides_no_result_may_differ(self, tmp_path):
        run = self.run(tmp_path / "run", configuration("somewhere", "data", "data.num_workers=2"), "step_0000001.ckpt")
        new = str(tmp_path / "new")
        assert run_folder(new, _root_=configuration("elsewhere", "data", "resume=auto")) == str(run)
        assert run_folder(new, _root_=configuration("elsewhere", "other data", "resume=auto")) == new, "other images are another run"

    @pytest.mark.parametrize(
        ("seed", "files", "message"),
        [
            (0, ["metrics.json"], r"this run is finished\. To train on, take resume=.*last\.ckpt"),
            (1, ["step_0000001.ckpt"], r"another configuration: seed was 1 and is 0"),
            (0, [], r"there is no whole checkpoint\. It was killed before step 1 "),
            (0, ["step_0000001.ckpt"], "there is no whole checkpoint"),
        ],
    )
    def test_a_run_that_cannot_go_on_says_why(self, tmp_path, seed, files, message):
        run = self.run(tmp_path / "run", configuration("somewhere", "data", f"seed={seed}"), *files)
        with pytest.raises(ValueError, match=message):
            checkpoint_to_resume(configuration(run, "data", f"resume={run}", "seed=0"))

    def test_a_wrong_path_says_what_is_expected(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such run folder or checkpoint; resume=auto"):
            checkpoint_to_resume(configuration(tmp_path, "data", f"resume={tmp_path / 'nowhere'}"))
        with pytest.raises(SystemExit, match=r"train\.py: resume=.*nowhere"):
            run_folder("new", _root_=configuration(tmp_path, "data", f"resume={tmp_path / 'nowhere'}"))


def default_training(*overrides):
    return [
        sys.executable,
        str(ROOT / "train.py"),
        "trainer=cpu",
        "trainer.enable_progress_bar=false",
        "checkpoint.every_n_steps=20",
        *overrides,
    ]


@pytest.mark.slow
def test_the_default_training_survives_kills_at_random_moments(tmp_path):
    """20 of them, or as many as ROI_KILLS says: each some moments after the checkpoint of a step drawn at random."""
    kills = int(os.environ.get("ROI_KILLS", 20))
    options = {"cwd": tmp_path, "stdout": subprocess.DEVNULL}
    subprocess.run(default_training("hydra.run.dir=whole"), check=True, **options)
    steps = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["global_step"]
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
    assert remains(run) == remains(tmp_path / "whole")


@pytest.mark.slow
def test_ten_runs_of_one_command_are_one_run(tmp_path):
    """One epoch of the default training each, or as many runs as ROI_RERUNS says."""
    found = []
    for index in range(int(os.environ.get("ROI_RERUNS", 10))):
        command = default_training("trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", f"hydra.run.dir=run{index}")
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        found.append(remains(tmp_path / f"run{index}"))
    assert all(one == found[0] for one in found)
