import sys

import pytest

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.runs.command_line import log_into_run_folder, replace_null_choices
from roi_quantization.scripts import explain, predict_cost, probe, recall, train
from tests import commands
from tests.configuration import ROOT, composed
from tests.trainings import TINY


def test_null_for_a_group_is_hydras_removal_and_settings_stay():
    given = ["logger=null", "average=null", "hydra/launcher=null", "seed=null", "data.val=null", "-m", "roi=pool", "=null", "../docs=null"]
    expected = ["~logger", "~average", "~hydra/launcher", "seed=null", "data.val=null", "-m", "roi=pool", "=null", "../docs=null"]
    assert replace_null_choices(given) == expected


@pytest.mark.parametrize("group", ["logger", "average", "coco_eval"])
def test_the_group_is_left_out(group):
    assert composed("train", *replace_null_choices([f"{group}=null"])).get(group) is None


@pytest.mark.parametrize("script", [train, explain, recall, predict_cost, probe])
def test_scripts_take_null_for_a_group(script, monkeypatch):
    monkeypatch.setattr(script, "_main", lambda: None)
    monkeypatch.setattr(sys, "argv", ["script.py", "proposals=null", "seed=1"])
    script.main()
    assert sys.argv == ["script.py", "~proposals", "seed=1"]


@pytest.mark.parametrize(
    ("name", "run", "group"),
    [
        ("explain", explain.explain_data, "proposals"),
        ("recall", recall.print_recall, "data"),
        ("recall", recall.print_recall, "proposals"),
        ("predict_cost", predict_cost.predict_cost, "proposals"),
        ("probe", probe.probe_operators, "backbone"),
    ],
)
def test_a_script_names_the_group_that_it_needs(name, run, group):
    data = ["data=embedded"] if name == "explain" else []
    with pytest.raises(InputError, match=rf"^{group}: nothing is chosen\. Choose a file of configs/{group} with {group}=<name>"):
        run(composed(name, *data, f"~{group}"))


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["--config-dir", "c", "run_dir=a", "roi=pool"], ["--config-dir", "c", "run_dir=a", "hydra.run.dir=a", "roi=pool"]),
        (["run_dir='a b'", "--config-dir=c"], ["run_dir='a b'", "hydra.run.dir='a b'", "--config-dir=c"]),
        (["run_dir=a", "run_dir=b"], ["run_dir=a", "run_dir=b", "hydra.run.dir=b"]),
        (["run_dir=a", "hydra.run.dir=b"], None),
        (["-m", "run_dir=a"], None),
        (["roi=pool"], None),
    ],
)
def test_the_run_folder_is_hydras_too(given, added):
    assert log_into_run_folder(given) == (given if added is None else added)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["run_dir='~/a b'"], ["run_dir='/home/me/a b'", "hydra.run.dir='/home/me/a b'"]),
        (['hydra.run.dir="~"'], ['hydra.run.dir="/home/me"']),
        (["-m", "hydra.sweep.dir='~/sweep'"], ["-m", "hydra.sweep.dir='/home/me/sweep'"]),
        (["hydra.run.dir='~a/b'", "data.root='~/x'"], ["hydra.run.dir='~a/b'", "data.root='~/x'"]),
    ],
)
def test_hydra_creates_its_folders_at_home(given, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert log_into_run_folder(given) == expected


def test_the_log_is_in_the_run_folder(tmp_path):
    ended = commands.run(ROOT / "train.py", *TINY, "run_dir=here", "optimized_metric=nope", cwd=tmp_path)
    assert ended.returncode == 1 and "optimized_metric=nope" in ended.stderr
    assert "optimized_metric=nope" in (tmp_path / "here" / "train.log").read_text()
    assert not (tmp_path / "runs").exists()
