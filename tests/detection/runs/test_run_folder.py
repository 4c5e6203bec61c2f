"""A run folder has one configuration and the results of that configuration."""

import pytest
from omegaconf import OmegaConf

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.runs.run_folder import check_run_folder, replace_results
from roi_quantization.scripts.eval import evaluate
from roi_quantization.scripts.predict import predict
from roi_quantization.scripts.train import train
from tests import commands
from tests.trainings import run_train

CONFIGS = {"train.py": {"optim": {}, "roi": {}}, "eval.py": {"ckpt": "a", "split": "test"}, "predict.py": {"ckpt": "a", "image": "b"}}
FILES = ["results.json", "results_pool.json", "metrics.json", "cross.json", "differences.json", "instances.json", "pictures/a/b.png"]
OTHERS = ["best.ckpt", "metrics.csv", "notes.json", "pictures/a/b.txt"]


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def contents(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("owner", CONFIGS)
@pytest.mark.parametrize("script", CONFIGS)
def test_a_script_replaces_its_own_runs_only(tmp_path, owner, script):
    OmegaConf.save(CONFIGS[owner], tmp_path / "config.yaml")
    if script == owner:
        check_run_folder(tmp_path, script)
    else:
        with pytest.raises(InputError, match=rf"^run_dir={tmp_path} contains a run of {owner}, which {script} would overwrite\. Choose"):
            check_run_folder(tmp_path, script)


@pytest.mark.parametrize("script", CONFIGS)
@pytest.mark.parametrize("name", ["config.yaml", "results.json"])
def test_a_file_from_elsewhere_is_not_replaced(tmp_path, script, name):
    (tmp_path / name).write_text("{half")
    with pytest.raises(InputError, match=rf"contains {name}, which {script} has not written"):
        check_run_folder(tmp_path, script)


@pytest.mark.parametrize("script", CONFIGS)
def test_a_new_folder_and_one_with_a_checkpoint_are_free(tmp_path, script):
    check_run_folder(tmp_path / "new", script)
    fill(tmp_path, *OTHERS)
    check_run_folder(tmp_path, script)


@pytest.mark.parametrize(
    ("script", "left"),
    [
        ("train.py", {"results_pool.json", "differences.json", "instances.json", "pictures/a/b.png"}),
        ("eval.py", {"instances.json", "pictures/a/b.png"}),
        ("predict.py", {"results_pool.json", "metrics.json", "cross.json", "differences.json"}),
    ],
)
def test_what_a_script_has_written_goes_and_the_rest_stays(tmp_path, script, left):
    fill(tmp_path, *FILES, *OTHERS)
    replace_results(OmegaConf.create({**CONFIGS[script], "seed": 1, "other": "${seed}"}), tmp_path, script)
    assert contents(tmp_path) == {"config.yaml", *left, *OTHERS}
    assert OmegaConf.load(tmp_path / "config.yaml").other == 1


@pytest.mark.parametrize(("run", "owner"), [(train, "eval.py"), (evaluate, "train.py"), (predict, "train.py")])
def test_the_folder_of_another_script_or_process_is_left_alone(tmp_path, run, owner):
    cfg = OmegaConf.create({"run_dir": str(tmp_path), "cross": [], "image": "any"})
    OmegaConf.save(CONFIGS[owner], tmp_path / "config.yaml")
    with pytest.raises(InputError, match=rf"contains a run of {owner}, which .* would overwrite"):
        run(cfg)
    assert OmegaConf.load(tmp_path / "config.yaml") == CONFIGS[owner]
    with commands.another_process_in(tmp_path), pytest.raises(InputError, match=f"another process is running in {tmp_path}"):
        run(cfg)


def test_a_training_that_cannot_begin_leaves_the_one_before(tmp_path):
    fill(tmp_path / "run", "results.json", "metrics.json", "cross.json")
    OmegaConf.save(CONFIGS["train.py"], tmp_path / "run/config.yaml")
    with pytest.raises(InputError, match="optimized_metric=nope"):
        run_train(tmp_path, "optimized_metric=nope")
    assert contents(tmp_path / "run") - {".lock"} == {"config.yaml", "results.json", "metrics.json", "cross.json"}
    assert OmegaConf.load(tmp_path / "run/config.yaml") == CONFIGS["train.py"]
