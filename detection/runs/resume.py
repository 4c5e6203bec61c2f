"""Which run goes on, and from which checkpoint: `resume=auto`, `resume=<run folder>`, `resume=<checkpoint>`."""

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from roi_quantization.detection.configuration import differences, shorten
from roi_quantization.detection.runs.checkpoint import load_checkpoint
from roi_quantization.detection.runs.lock import is_running
from roi_quantization.detection.runs.training_checkpoints import FINISHED, periodic_checkpoints

log = logging.getLogger(__name__)


def run_folder(new: str, *, _root_: DictConfig) -> str:
    """The OmegaConf resolver `run_folder`: where a run writes, which is a run that goes on or else `new`.

    `resume=auto` is the newest unfinished run of this very configuration beside `new`, `resume=<run folder>` that one. It ends the program,
    before anything is written, where that run cannot go on.
    """
    resume = _root_.resume
    if resume is None or Path(resume).is_file():
        return new
    config = _resolved(_root_, new)
    if resume == "auto":
        return str(next(iter(unfinished_runs(Path(new).parent, config)), new))
    try:
        check_unfinished(Path(resume), config)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"train.py: {error}")  # OmegaConf would wrap any other exception
    return str(resume)


OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)


def unfinished_runs(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Run folders in `folder` with a checkpoint to go on from, neither finished nor running, of this configuration; newest first."""
    found = [run for run in folder.glob("*/") if _checkpoints(run) and not (run / FINISHED).is_file() and not is_running(run)]
    same = [run for run in found if (before := _read_config(run)) is not None and _same(before, config)]
    return sorted(same, key=lambda run: _checkpoints(run)[0].stat().st_mtime, reverse=True)


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Nobody has named the run here, so it must have had the very data as well."""
    return not differences(before, now) and before["data"]["root"] == now["data"]["root"]


def check_unfinished(run: Path, config: dict[str, Any]) -> None:
    """Raises FileNotFoundError or ValueError where `run` is no run folder, is finished, or has another configuration than `config`."""
    if not run.is_dir():
        raise FileNotFoundError(f"resume={run}: there is no such run folder or checkpoint; resume=auto looks for the newest unfinished run")
    if is_running(run):
        raise ValueError(f"resume={run}: another process is at work there")
    if (run / FINISHED).is_file():
        raise ValueError(f"resume={run}: this run is finished. To train on, take resume={run}/last.ckpt and a larger trainer.max_epochs")
    before = _read_config(run)
    if before is None:
        raise ValueError(f"resume={run}: there is no readable config.yaml, so this is no run folder of train.py")
    if differ := differences(before, config):
        raise ValueError(
            f"resume={run}: that run had another configuration: {shorten(differ)}. Repeat its command ({run}/config.yaml says which), "
            "or start a new run from there with resume=<checkpoint>"
        )


def check_no_other(run: Path, config: dict[str, Any]) -> None:
    """Raises ValueError where `run` holds a run of another configuration than `config`, finished or with checkpoints to go on from."""
    before, finished = _read_config(run), (run / FINISHED).is_file()
    if (finished or _checkpoints(run)) and before is not None and (differ := differences(before, config)):
        to_go_on = f"take resume={run}/last.ckpt and another folder" if finished else f"repeat its command ({run}/config.yaml says which)"
        raise ValueError(
            f"resume=auto: {run} holds {'a finished' if finished else 'an unfinished'} run of another configuration: {shorten(differ)}. To "
            f"go on from it {to_go_on}; to begin anew choose another folder, or remove that run"
        )


def checkpoint_to_resume(cfg: DictConfig) -> Path | None:
    """The checkpoint that training goes on from, and says so in the log; None: it begins.

    Raises:
        FileNotFoundError: `cfg.resume` is neither `auto`, a run folder, nor a checkpoint.
        ValueError: it names a run or a checkpoint from which nothing can go on; or `auto` would begin anew in the folder of another run,
            which would be lost.
    """
    if cfg.resume is None:
        return None
    if cfg.resume == "auto":
        check_no_other(Path(cfg.run_dir), _resolved(cfg, cfg.run_dir))
        chosen = _newest_whole(Path(cfg.run_dir), cfg)
        if chosen is None:
            log.info("resume=auto: there is no unfinished run of this configuration with a checkpoint. This is a new one: %s", cfg.run_dir)
        return chosen
    given = Path(cfg.resume)
    if given.is_file():
        checkpoint = load_checkpoint(given)
        if "optimizer_states" not in checkpoint:
            raise ValueError(f"resume={given}: it holds weights alone; last.ckpt and step_*.ckpt hold what training needs to go on")
        if differ := differences(checkpoint["config"], OmegaConf.to_container(cfg)):
            log.warning("%s had another configuration: %s. The rates of its optimizer are kept", given, shorten(differ))
        return given
    check_unfinished(given, _resolved(cfg, cfg.run_dir))
    chosen = _newest_whole(given, cfg)
    if chosen is None:
        raise ValueError(
            f"resume={given}: there is no whole checkpoint. It was killed before step {cfg.checkpoint.every_n_steps} "
            "(checkpoint.every_n_steps) perhaps; begin anew, without resume"
        )
    return chosen


def _newest_whole(run: Path, cfg: DictConfig) -> Path | None:
    """The newest checkpoint in `run` that is whole and of this configuration; why others are passed over is said in the log."""
    for path in _checkpoints(run):
        try:
            checkpoint = load_checkpoint(path)
        except ValueError as error:
            log.warning("%s. The checkpoint before it is tried", error)
            continue
        if differ := differences(checkpoint["config"], OmegaConf.to_container(cfg)):
            log.warning("%s is of another configuration and not used: %s", path, shorten(differ))
            continue
        log.info("Goes on from %s: step %d, in epoch %d", path, checkpoint["global_step"], checkpoint["epoch"])
        return path
    return None


def _checkpoints(run: Path) -> list[Path]:
    """From which a run may go on, newest first. With last.ckpt, written when training is over, only the evaluation is missing."""
    return [path for path in (run / "last.ckpt",) if path.is_file()] + periodic_checkpoints(run)


def _read_config(run: Path) -> dict[str, Any] | None:
    try:
        config = yaml.safe_load((run / "config.yaml").read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None


def _resolved(cfg: DictConfig, run_dir: str) -> dict[str, Any]:
    """As config.yaml has it: without Hydra's own part, and with a run folder, which Hydra does not know yet when it asks for one."""
    plain = copy.deepcopy(cfg)
    with open_dict(plain):
        plain.pop("hydra", None)
        plain.run_dir = str(run_dir)
    return OmegaConf.to_container(plain, resolve=True)
