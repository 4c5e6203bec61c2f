"""The files of an earlier run in a run folder: only the same script replaces them, before it writes its own configuration.

Otherwise config.yaml would describe other results than those beside it.
"""

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.runs.distributed import is_rank_zero
from roi_quantization.detection.runs.training_checkpoints import RESULTS

CONFIG = "config.yaml"
KEYS = {"train.py": "optim", "eval.py": "split", "predict.py": "image"}  # by which a configuration is that of a script
FILES = {  # what a script writes once it has its results; a training removes its checkpoints when it takes its first step
    "train.py": RESULTS,
    "eval.py": (*RESULTS, "results_*.json", "differences.json", "detections.png"),
    "predict.py": ("results.json", "instances.json", "pictures/**/*.png"),
}


def check_run_folder(run_dir: str | Path, script: str) -> None:
    """Check that a run folder has no files but those that `script` may replace: its own. A checkpoint may lie there.

    Raises:
        InputError: it has a configuration or results of another script, or files of the same names from elsewhere.
    """
    run_dir = Path(run_dir)
    keys = _top_level_keys(run_dir / CONFIG)
    owner = next((name for name, key in KEYS.items() if key in keys), None)
    found = [path for path in (run_dir / CONFIG, *_results(run_dir, script)) if path.is_file()]
    if found and owner != script:
        what = f"{found[0].name}, which {script} has not written" if owner is None else f"a run of {owner}, which {script} would overwrite"
        raise InputError(f"run_dir={run_dir} contains {what}. Choose another folder with run_dir=runs/<name>")


def replace_results(cfg: DictConfig, run_dir: Path, script: str) -> None:
    """Remove the results of an earlier run of `script` from its folder, and write the configuration of this one."""
    if is_rank_zero():
        for path in _results(run_dir, script):
            path.unlink(missing_ok=True)
        write_config(cfg, run_dir)


def write_config(cfg: DictConfig, run_dir: Path) -> None:
    """Write config.yaml, with all interpolations resolved."""
    if is_rank_zero():
        atomic_write(run_dir / CONFIG, OmegaConf.to_yaml(cfg, resolve=True).encode())


def _results(run_dir: Path, script: str) -> list[Path]:
    return [path for pattern in FILES[script] for path in run_dir.glob(pattern)]


def _top_level_keys(path: Path) -> set[str]:
    try:
        config = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return set()
    return set(config) if isinstance(config, dict) else set()
