"""The run and the checkpoint that training goes on from: `resume=auto`, `resume=<run folder>`, `resume=<checkpoint>`."""

import copy
import logging
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from roi_quantization.detection.common.configuration import differences, flatten, shorten
from roi_quantization.detection.common.errors import ExpectedError, InputError, MissingFileError
from roi_quantization.detection.common.renamed_targets import upgrade_config
from roi_quantization.detection.data.data_fingerprint import DataFingerprint
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.runs.checkpoint import check_weights, load_checkpoint
from roi_quantization.detection.runs.lock import is_running
from roi_quantization.detection.runs.training_checkpoints import FINISHED, periodic_checkpoints

log = logging.getLogger(__name__)


def run_folder(new: str, *, _root_: DictConfig) -> str:
    """Return the folder that a run writes to, one that goes on or else `new`: the OmegaConf resolver `run_folder`.

    `resume=auto` is the newest unfinished run of this configuration beside `new`, `resume=<run folder>` is that one. Ends the program,
    before anything is written, where that run cannot go on.
    """
    if _root_.resume is None:
        return new
    resume = os.path.expanduser(str(_root_.resume))
    if Path(resume).is_file():
        return new
    config = _resolve(_root_, new)
    if resume == "auto":
        return str(next(iter(unfinished_runs(Path(new).parent, config)), new))
    try:
        check_unfinished(Path(resume), config)
    except ExpectedError as error:
        sys.exit(f"train.py: {error}")  # OmegaConf would wrap any other exception
    return resume


OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)


def unfinished_runs(folder: Path, config: dict[str, Any]) -> list[Path]:
    """List the run folders in `folder` that have this configuration and a checkpoint and are neither finished nor running, newest first."""
    found = [run for run in folder.glob("*/") if _checkpoints(run) and not (run / FINISHED).is_file() and not is_running(run)]
    same = [run for run in found if (before := _read_config(run)) is not None and _is_same_run(before, config)]
    return sorted(same, key=lambda run: _checkpoints(run)[0].stat().st_mtime, reverse=True)


def _is_same_run(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the data folder is the same as well: nobody has named this run, so it is recognised by its configuration alone."""
    return not differences(before, now) and before["data"]["root"] == now["data"]["root"]


def check_unfinished(run: Path, config: dict[str, Any]) -> None:
    """Check that `run` can go on with `config`.

    Raises:
        MissingFileError: there is no such folder.
        InputError: the run is finished, is running, or has another configuration; or it is no run folder.
    """
    if not run.is_dir():
        raise MissingFileError(f"resume={run}: there is no such run folder or checkpoint. resume=auto finds the newest unfinished run")
    if is_running(run):
        raise InputError(f"resume={run}: another process is running there. Wait for it, or stop it")
    if (run / FINISHED).is_file():
        raise InputError(f"resume={run}: this run is finished. To train on, set resume={run}/last.ckpt and a larger trainer.max_epochs")
    before = _read_config(run)
    if before is None:
        raise InputError(f"resume={run}: it has no readable config.yaml, so it is no run folder of train.py")
    if differ := differences(before, config):
        raise InputError(
            f"resume={run}: that run has another configuration: {shorten(differ)}. Repeat its command (see {run}/config.yaml), or start a "
            "new run from there with resume=<checkpoint>"
        )


def check_replaceable(run: Path, config: dict[str, Any]) -> None:
    """Check that `resume=auto` in the folder `run` would not overwrite another run.

    Raises:
        InputError: it contains a run of another configuration that is finished or has checkpoints.
    """
    before, finished = _read_config(run), (run / FINISHED).is_file()
    if (finished or _checkpoints(run)) and before is not None and (differ := differences(before, config)):
        to_go_on = f"set resume={run}/last.ckpt and another folder" if finished else f"repeat its command (see {run}/config.yaml)"
        raise InputError(
            f"resume=auto: {run} contains {'a finished' if finished else 'an unfinished'} run of another configuration: {shorten(differ)}. "
            f"To go on from it {to_go_on}. To start anew choose another folder, or remove that run"
        )


def checkpoint_to_resume(cfg: DictConfig) -> Path | None:
    """Return the checkpoint that training goes on from, and log it; None where training starts anew.

    Raises:
        MissingFileError: `cfg.resume` is neither `auto`, a run folder, nor a checkpoint.
        InputError: that run or checkpoint cannot go on; or `auto` would overwrite another run in the folder.
    """
    if cfg.resume is None:
        return None
    if cfg.resume == "auto":
        check_replaceable(Path(cfg.run_dir), _resolve(cfg, cfg.run_dir))
        chosen = _newest_intact(Path(cfg.run_dir), cfg)
        if chosen is None:
            log.info("resume=auto: no unfinished run of this configuration has a checkpoint. Starting a new one: %s", cfg.run_dir)
        return chosen
    given = Path(os.path.expanduser(str(cfg.resume)))
    if given.is_file():
        checkpoint = load_checkpoint(given)
        if "optimizer_states" not in checkpoint:
            raise InputError(f"resume={given}: it contains weights only. To go on take a last.ckpt or step_*.ckpt")
        if differ := differences(upgrade_config(checkpoint["config"]), OmegaConf.to_container(cfg)):
            log.warning("%s has another configuration: %s. Of its optimizer rates, decay and momentum are kept", given, shorten(differ))
        return given
    check_unfinished(given, _resolve(cfg, cfg.run_dir))
    chosen = _newest_intact(given, cfg)
    if chosen is None:
        raise InputError(
            f"resume={given}: there is no intact checkpoint. Was it killed before step {cfg.checkpoint.every_n_steps} "
            "(checkpoint.every_n_steps)? Start anew, without resume"
        )
    return chosen


def check_fits(checkpoint: Path, module: DetectionModule, fingerprint: DataFingerprint) -> None:
    """Check that the training of `module` can go on from a checkpoint.

    Raises:
        InputError: its weights are those of another detector, its optimizer or schedule is of another kind, or its data were others and
            `fingerprint` requires the same.
    """
    content = load_checkpoint(checkpoint)
    remedy = f"To train this configuration from its weights set init_from={checkpoint} in the place of resume"
    try:
        check_weights(content["state_dict"], module.state_dict())
    except InputError as error:
        raise InputError(f"resume: {checkpoint}: {error} Or do the data have another number of classes? {remedy}") from error
    before, now = (dict(flatten(config["optim"])) for config in (upgrade_config(content["config"]), module.config))
    for part in ("optimizer._target_", "schedule._target_"):
        if before.get(part) != now.get(part):
            raise InputError(
                f"resume: {checkpoint}: optim.{part} was {before.get(part)} and is {now.get(part)}, which has another state. {remedy}"
            )
    state = content.get("callbacks", {}).get(fingerprint.state_key)
    if fingerprint.required and state is not None:  # else it warns when Lightning restores it
        fingerprint.load_state_dict(state)


def _newest_intact(run: Path, cfg: DictConfig) -> Path | None:
    """Return the newest checkpoint in `run` that is intact and has this configuration; log why others are skipped."""
    for path in _checkpoints(run):
        try:
            checkpoint = load_checkpoint(path)
        except InputError as error:
            log.warning("%s. Trying the checkpoint before it", error)
            continue
        if differ := differences(upgrade_config(checkpoint["config"]), OmegaConf.to_container(cfg)):
            log.warning("%s has another configuration and is not used: %s", path, shorten(differ))
            continue
        log.info("Goes on from %s: step %d, in epoch %d", path, checkpoint["global_step"], checkpoint["epoch"])
        return path
    return None


def _checkpoints(run: Path) -> list[Path]:
    """List the checkpoints that a run may go on from, newest first. After last.ckpt only the evaluation is missing."""
    return [path for path in (run / "last.ckpt",) if path.is_file()] + periodic_checkpoints(run)


def _read_config(run: Path) -> dict[str, Any] | None:
    try:
        config = yaml.safe_load((run / "config.yaml").read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return upgrade_config(config) if isinstance(config, dict) else None


def _resolve(cfg: DictConfig, run_dir: str) -> dict[str, Any]:
    """Resolve the configuration as config.yaml has it: without Hydra's part, and with a run folder, which may not be known to Hydra yet."""
    plain = copy.deepcopy(cfg)
    with open_dict(plain):
        plain.pop("hydra", None)
        plain.run_dir = str(run_dir)
    return OmegaConf.to_container(plain, resolve=True)
