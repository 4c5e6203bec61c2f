"""A sweep of two tiny runs, through the command line: one fails, the sweep goes on without it and is completed by the same command."""

import json
import multiprocessing
import os
import shutil
import subprocess
import time

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.runs.planned_runs import earlier_runs, planned_runs
from roi_quantization.detection.runs.sweep import SWEEP as SWEEP_PROCESS
from roi_quantization.detection.runs.sweep import SweepCallback, _exit_with_sweep, run_in_sweep
from roi_quantization.detection.runs.sweep_progress import SweepProgress
from tests import commands
from tests.configuration import ROOT
from tests.fake_slurm import install
from tests.trainings import TINY

SWEEP = ["-m", "experiment=quantization_core", "roi=align,pool", "seed=5", "cross=[align,warp]", *TINY, "trainer.max_epochs=2"]


def sweep(folder, *overrides):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs hydra-joblib-launcher")
    return commands.run(ROOT / "train.py", *SWEEP, *overrides, cwd=folder)


@pytest.mark.slow
def test_a_sweep_outlives_a_failure_goes_on_where_it_stopped_and_is_not_mixed_with_another(tmp_path):
    folder = tmp_path / "runs" / "quantization_embedded_stride16"
    align, pool = folder / "align_seed5", folder / "pool_seed5"
    (pool / "results.json").mkdir(parents=True)  # so that this run cannot write its results

    first = sweep(tmp_path)
    assert first.returncode == 1 and "1 of 2 runs failed" in first.stderr
    assert "IsADirectoryError" in (pool / "failed.txt").read_text()
    assert not (pool / "metrics.json").exists()
    metrics = json.loads((align / "metrics.json").read_text())
    cross = json.loads((align / "cross.json").read_text())
    assert list(cross) == ["align", "warp"] and cross["align"] == metrics
    assert OmegaConf.load(align / "config.yaml").arm == "align"
    assert "average precision" in (align / "train.log").read_text() and "average precision" not in first.stdout
    assert (folder / "report" / "report.html").is_file()

    (pool / "results.json").rmdir()
    before = {path: path.stat().st_mtime_ns for path in align.iterdir()}
    second = sweep(tmp_path, "hydra/launcher=basic")
    assert second.returncode == 0, second.stderr
    assert (pool / "metrics.json").is_file() and not (pool / "failed.txt").exists()
    assert {path: path.stat().st_mtime_ns for path in align.iterdir()} == before, "a finished run is left alone"

    matrix = ["-m", "roi_quantization.detection.runs.cross_evaluation", folder, "--operators", "align", "warp", "prroi"]
    commands.run(*matrix, cwd=tmp_path).check_returncode()
    completed = json.loads((align / "cross.json").read_text())
    assert list(completed) == ["align", "warp", "prroi"]
    assert {name: completed[name] for name in cross} == cross, "what was there is left alone"

    third = sweep(tmp_path, "optim.groups.lr=0.5")
    assert third.returncode == 1
    assert "optim.groups.lr was 0.003 and is 0.5" in third.stderr and "hydra.sweep.dir=runs/<name>" in third.stderr


def test_runs_that_would_share_a_folder_are_refused(tmp_path):
    ended = sweep(tmp_path, "roi.sampling_ratio=1,2")
    assert ended.returncode == 1
    assert "have the folder runs/quantization_embedded_stride16/align_seed5: roi.sampling_ratio was 1 and is 2" in ended.stderr
    assert not list(tmp_path.glob("runs/*/align_seed5"))


@pytest.mark.slow
def test_a_sweep_that_fills_two_folders_writes_two_reports(tmp_path):
    ended = sweep(tmp_path, "backbone.stride=16,32", "trainer.max_epochs=1", "cross=[]")
    assert ended.returncode == 0, ended.stderr
    for stride in (16, 32):
        report = (tmp_path / f"runs/quantization_embedded_stride{stride}" / "report" / "report.md").read_text()
        assert f"{stride} pixels per cell" in report and "2 operators, 1 seed, 2 finished runs" in report
        assert "not finished" not in report


@pytest.mark.slow  # the sweep above starts with joblib and goes on with the basic launcher
@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_other_launchers_run_the_same_sweep(tmp_path, launcher):
    if launcher != "basic":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher: the extra `slurm`")
    folder = tmp_path / "runs" / "quantization_embedded_stride16"
    (folder / "pool_seed5" / "results.json").mkdir(parents=True)  # so that this run cannot write its results
    ended = sweep(tmp_path, f"hydra/launcher={launcher}", "trainer.max_epochs=1", "cross=[]")
    assert ended.returncode == 1 and "1 of 2 runs failed" in ended.stderr, ended.stderr
    assert (folder / "align_seed5" / "metrics.json").is_file()
    assert "IsADirectoryError" in (folder / "pool_seed5" / "failed.txt").read_text()
    assert (folder / "report" / "report.html").is_file()


@pytest.mark.slow
def test_on_slurm_a_run_that_has_to_leave_saves_is_queued_again_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher: the extra `slurm`")
    bin = install(tmp_path / "bin")
    folder = tmp_path / "runs" / "quantization_embedded_stride16"
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM_PREEMPT", str(folder / "align_seed5" / "step_*.ckpt"))
    slurm = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=null", "trainer.max_epochs=4"]
    ended = sweep(tmp_path, *slurm, "checkpoint.every_n_steps=3")
    assert ended.returncode == 0, ended.stderr + "".join(path.read_text() for path in folder.glob(".submitit/*/*.err"))
    script = (bin / "script.sh").read_text()
    assert all(f"#SBATCH --{flag}\n" in script for flag in ("partition=gpu", "requeue", "signal=USR2@120", "time=240", "mem=32GB"))

    output = (folder / "align_seed5" / "train.log").read_text()
    assert (bin / "0.told").exists() and "Stopped by SIGUSR2 after step" in output
    assert f"Goes on from {folder / 'align_seed5' / 'step_'}" in output
    assert all((folder / run / "metrics.json").is_file() for run in ("align_seed5", "pool_seed5"))
    assert (folder / "report" / "report.html").is_file()


@pytest.fixture
def in_sweep(monkeypatch):
    monkeypatch.setattr("roi_quantization.detection.runs.sweep.is_in_sweep", lambda: True)


def test_a_run_that_another_process_is_at_is_left_alone(tmp_path, caplog, in_sweep):
    with commands.another_process_in(tmp_path):
        result = run_in_sweep(lambda cfg: {"val/AP": 1.0}, config_of(tmp_path))
    assert result["val/AP"] != result["val/AP"], "not a number"
    assert f"another process is running in {tmp_path}" in caplog.text
    assert not (tmp_path / "failed.txt").exists() and not (tmp_path / "train.log").exists()


def at_work():
    _exit_with_sweep(every=0.05)
    time.sleep(60)


@pytest.mark.slow
def test_a_worker_whose_sweep_was_gone_before_it_asked_ends(monkeypatch):
    """Its parent is then another process, which adopted it, and stays."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setenv(SWEEP_PROCESS, str(gone.pid))
    worker = multiprocessing.get_context("spawn").Process(target=at_work)
    worker.start()
    worker.join(50)
    assert worker.exitcode == 1


def config_of(folder):
    return OmegaConf.create({"run_dir": str(folder), "optimized_metric": "val/AP", "optim": {"lr": 0.1}})


def test_a_sweep_over_other_data_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # the callback sets it
    overrides = ["experiment=quantization_core", "roi=align", "seed=5", *TINY, "data.root=ships"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = GlobalHydra.instance().config_loader().load_configuration("train", overrides, RunMode.MULTIRUN)
        ((run_dir, run),) = planned_runs(config).items()
        run_dir.mkdir(parents=True)
        OmegaConf.save({**run, "data": run["data"] | {"root": "cats"}}, run_dir / "config.yaml")
        (run_dir / "metrics.json").touch()
        (run_dir / "data.json").write_text('{"train": "0", "val": "0", "test": "0"}')
        with pytest.raises(SystemExit, match=r"data\.root=cats, and this sweep has data\.root=ships, .* \(train, val, test\)\. Choose"):
            SweepCallback().on_multirun_start(config)
        shutil.move(run_dir, earlier := run_dir.with_name("pool_seed0"))  # which this sweep does not have, and its report does
        OmegaConf.save(run | {"arm": "pool", "seed": 0}, earlier / "config.yaml")
        with pytest.raises(SystemExit, match=r"ships has other .* \(train, val, test\) than when .*pool_seed0 was trained\. Choose"):
            SweepCallback().on_multirun_start(config)
        OmegaConf.save(run | {"arm": "pool", "seed": 0, "data": run["data"] | {"subset": 2}}, earlier / "config.yaml")
        assert earlier_runs({run_dir: run}) == {}, "other data are meant to be"


def test_a_run_with_an_arm_that_is_in_no_sweep_raises_what_it_fails_with(tmp_path):
    """Nothing else would set the exit status."""

    def fail(cfg):
        raise InputError("no such data")

    with pytest.raises(InputError, match="no such data"):
        run_in_sweep(fail, config_of(tmp_path))
    assert "InputError: no such data" in (tmp_path / "failed.txt").read_text()
    with commands.another_process_in(tmp_path), pytest.raises(InputError, match="another process is running"):
        run_in_sweep(fail, config_of(tmp_path))


def test_a_run_with_an_arm_that_is_finished_says_that_nothing_was_trained(tmp_path, caplog):
    config = config_of(tmp_path)
    OmegaConf.save(config, tmp_path / "config.yaml", resolve=True)
    (tmp_path / "metrics.json").write_text("{}")
    run_in_sweep(lambda cfg: {"val/AP": 1.0}, config)
    assert f"Nothing was trained: {tmp_path} contains this run, finished" in caplog.text


def test_a_single_run_with_an_arm_that_fails_ends_with_an_error(tmp_path):
    words = ["experiment=quantization", "hydra.mode=RUN", "hydra.run.dir=run", f"data.root={tmp_path / 'data'}", "optimized_metric=nope"]
    ended = commands.run(ROOT / "train.py", *TINY, *words, cwd=tmp_path)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].startswith("train.py: optimized_metric=nope")
    assert "Traceback" not in ended.stderr


def test_a_run_that_fails_says_why_and_raises_nothing(tmp_path, capsys, in_sweep):
    def fail(cfg):
        print("begun")
        raise RuntimeError("no memory left")

    result = run_in_sweep(fail, config_of(tmp_path))
    assert result["val/AP"] != result["val/AP"], "not a number"
    assert "RuntimeError: no memory left" in (tmp_path / "failed.txt").read_text()
    assert (tmp_path / "train.log").read_text().startswith("begun") and capsys.readouterr().out == ""

    assert run_in_sweep(lambda cfg: {"val/AP": 1.0}, config_of(tmp_path)) == {"val/AP": 1.0}
    assert not (tmp_path / "failed.txt").exists(), "it was tried again"


@pytest.mark.parametrize("finished", [False, True], ids=["all failed", "one finished"])
def test_the_end_of_a_sweep_counts_failed_runs_and_reports_finished_ones(tmp_path, monkeypatch, capsys, finished):
    runs = {tmp_path / name: {"trainer": {}} for name in ("align_seed0", "pool_seed0")}
    callback = SweepCallback()
    callback.progress = SweepProgress(runs)
    callback.progress.start()
    for run_dir in runs:
        run_dir.mkdir()
        (run_dir / ("metrics.json" if finished and "align" in run_dir.name else "failed.txt")).touch()
    monkeypatch.setattr("roi_quantization.detection.runs.sweep.write_report", lambda folder, _: folder / "report.html")
    with pytest.raises(
        SystemExit, match=rf"^{2 - finished} of 2 runs failed; .*_seed0/failed\.txt says why\. The same command repeats them$"
    ):
        callback.on_multirun_end(None)
    assert ("The report: " in capsys.readouterr().out) == finished


def test_a_report_that_fails_does_not_hide_the_runs_that_failed(tmp_path, monkeypatch):
    runs = {tmp_path / name: {"trainer": {}} for name in ("align_seed0", "pool_seed0")}
    callback = SweepCallback()
    callback.progress = SweepProgress(runs)
    callback.progress.start()
    for run_dir, name in zip(runs, ("metrics.json", "failed.txt"), strict=True):
        run_dir.mkdir()
        (run_dir / name).touch()
    with pytest.raises(SystemExit, match=r"^1 of 2 runs failed; .*\. Their report failed\. Repeat it with: python -m "):
        callback.on_multirun_end(None)
