"""A message for what the user can correct, a traceback for every other exception, and the traceback in the log file for both."""

import json
import logging
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.runs.errors import FailedRunsCallback, handle_errors
from tests import commands
from tests.configuration import ROOT


def test_an_expected_error_ends_the_program_with_its_message():
    with pytest.raises(SystemExit, match=r"^train\.py: seed=x: expected a number$"), handle_errors("train.py"):
        raise InputError("seed=x: expected a number")
    with pytest.raises(SystemExit, match=r"^eval\.py: .*No such file or directory: '/nowhere'$"), handle_errors("eval.py"):
        Path("/nowhere").read_bytes()


def test_any_other_exception_keeps_its_traceback(monkeypatch):
    """Also a ValueError of a file in this checkout, such as somebody's own operator."""
    with pytest.raises(json.JSONDecodeError), handle_errors("train.py"):
        json.loads("{")
    with pytest.raises(ValueError, match="a mistake"), handle_errors("train.py"):
        raise ValueError("a mistake")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InputError, match="with its traceback"), handle_errors("train.py"):
        raise InputError("with its traceback")


@pytest.mark.parametrize("error", [InputError("seed=x"), ValueError("a mistake")])
def test_the_log_file_has_the_traceback(tmp_path, error, capsys):
    handler = logging.FileHandler(tmp_path / "train.log")
    logging.getLogger().addHandler(handler)
    try:
        with pytest.raises((SystemExit, ValueError)), handle_errors("train.py"):
            raise error
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    written = (tmp_path / "train.log").read_text()
    assert "Traceback" in written and f"{type(error).__name__}: {error}" in written and "test_errors.py" in written
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["recall.py", "split=nope,never"],
        pytest.param(["explain.py", "stride=0,-1"], marks=pytest.mark.slow),
        pytest.param(["predict_cost.py", "split=nope,never"], marks=pytest.mark.slow),
    ],
)
def test_a_sweep_of_any_script_tries_all_runs_and_ends_with_an_error(command, tmp_path):
    script, *overrides = command
    ended = commands.run(ROOT / script, "-m", f"hydra.sweep.dir={tmp_path / 'sweep'}", *overrides, cwd=tmp_path)
    assert ended.returncode == 1 and "2 runs failed" in ended.stderr
    assert len(list((tmp_path / "sweep").rglob("failed.txt"))) == 2


@pytest.mark.parametrize(
    ("script", "overrides", "given"),
    [
        ("train", ["roi=align,pool", "run_dir=runs/cmp"], "run_dir=runs/cmp"),
        ("eval", ["detector=torchvision", "roi=align,pool", "run_dir=runs/cmp"], "run_dir=runs/cmp"),
        ("predict", ["seed=0,1", "++run_dir=runs/cmp"], r"\+\+run_dir=runs/cmp"),
        ("train", ["run_dir=a,b"], "run_dir=a,b"),
        ("train", ["experiment=quantization_core", "+hydra.sweeper.params.run_dir=a"], "run_dir=a"),
    ],
)
def test_a_sweep_with_one_folder_for_all_runs_does_not_begin(script, overrides, given):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = GlobalHydra.instance().config_loader().load_configuration(script, overrides, RunMode.MULTIRUN)
    with pytest.raises(SystemExit, match=rf"^{script}\.py: {given}: runs of a sweep would overwrite .* Set hydra\.sweep\.dir=runs/<name>"):
        FailedRunsCallback().on_multirun_start(config)


def test_a_sweep_with_one_folder_in_a_file_does_not_begin():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = GlobalHydra.instance().config_loader().load_configuration("train", ["roi=align,pool"], RunMode.MULTIRUN)
    FailedRunsCallback().on_multirun_start(config)
    config.run_dir = "runs/${seed}"
    with pytest.raises(SystemExit, match=r"^train\.py: run_dir=runs/\$\{seed\}: runs of a sweep"):
        FailedRunsCallback().on_multirun_start(config)


def test_a_sweep_by_its_configuration_is_refused_one_folder_too(tmp_path):
    ended = commands.run(ROOT / "train.py", "experiment=quantization_core", "run_dir=here", f"data.root={tmp_path / 'data'}", cwd=tmp_path)
    assert ended.returncode == 1 and "train.py: run_dir=here: runs of a sweep would overwrite" in ended.stderr
    assert not list(tmp_path.iterdir())
