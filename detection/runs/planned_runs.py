"""The runs of a sweep before the first one starts: their folders, and whether the runs and data that are there go with them."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from roi_quantization.detection.common.configuration import (
    differences,
    differences_beside_seeds,
    path_setting,
    read_configuration,
    shorten,
    sweep_lines,
)
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.renamed_targets import upgrade_config
from roi_quantization.detection.data.data_fingerprint import changed_splits, digest, recorded_digest
from roi_quantization.detection.data.module import DetectionData, describe
from roi_quantization.detection.model.build import instantiate
from roi_quantization.detection.report.origin import add_origin
from roi_quantization.detection.runs.composition import hydra_config
from roi_quantization.detection.runs.training_checkpoints import FINISHED

log = logging.getLogger(__name__)


def planned_runs(config: DictConfig) -> dict[Path, dict]:
    """List the run folders that a Hydra sweep is going to fill, each with its resolved configuration.

    Args:
        config: of the sweep, with `hydra`, as Hydra's callbacks get it.

    Raises:
        InputError: two runs would fill the same folder, or an `arm` is no name of a folder.
    """
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(loader).parse_overrides(sweep_lines(config))
    ((*jobs,),) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    runs = {}
    for job in jobs:
        cfg = loader.load_sweep_config(config, job)
        with hydra_config(cfg), open_dict(cfg):
            run_dir = Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir
            cfg.run_dir = str(run_dir)
            del cfg["hydra"]
            run = OmegaConf.to_container(cfg, resolve=True)
        if "/" in str(run.get("arm")) or os.sep in str(run.get("arm")):
            raise InputError(f"arm={run['arm']} is a part of the name of a folder. Write another character in the place of {os.sep}")
        if run_dir in runs:
            differ = shorten(differences(runs[run_dir], run)) or "they are the same"
            raise InputError(
                f"two runs of this sweep have the folder {run_dir}: {differ}. It is named by `arm` and `seed`: set `arm` to what differs, "
                "such as 'arm=${hydra:runtime.choices.roi}_${roi.sampling_ratio}'"
            )
        runs[run_dir] = run
    return runs


def sweep_folders(runs: Mapping[Path, dict]) -> list[Path]:
    """List the folders that contain the runs: one, or several where its name contains what is swept, such as the stride."""
    return list(dict.fromkeys(run_dir.parent for run_dir in runs))


def check_configuration(run_dir: Path, config: dict) -> None:
    """Check that the finished run in `run_dir` has the resolved configuration `config`.

    Raises:
        InputError: it has another; the message lists the differences.
    """
    differ = differences(_read_configuration(run_dir), config)
    if differ:
        raise InputError(
            f"{run_dir} contains a finished run of another configuration: {shorten(differ)}. Choose another folder for this sweep with "
            "hydra.sweep.dir=runs/<name>, or remove that run"
        )


def _read_configuration(run_dir: Path) -> dict:
    return upgrade_config(OmegaConf.to_container(read_configuration(run_dir / "config.yaml")))


def check_arms(runs: Mapping[Path, dict]) -> None:
    """Check that runs of one arm, which a report averages, differ in seeds alone, those that an earlier sweep left in the folder included.

    Args:
        runs: folder of each run of this sweep -> its resolved configuration.

    Raises:
        InputError: two differ in something else; the message lists it.
    """
    known: dict[tuple[Path, str], tuple[Path, dict]] = {}
    for folder in sweep_folders(runs):
        for path in sorted(folder.glob(f"*_seed*/{FINISHED}")):
            if path.parent not in runs and (path.parent / "config.yaml").is_file():
                config = _read_configuration(path.parent)
                known.setdefault((folder, str(config.get("arm"))), (path.parent, config))
    for run_dir, run in runs.items():
        other, config = known.setdefault((run_dir.parent, str(run["arm"])), (run_dir, run))
        if differ := differences_beside_seeds(config, run):
            raise InputError(
                f"{other} and {run_dir} are runs of one arm, of which the report gives the mean, and differ in more than their seeds: "
                f"{shorten(differ)}. Set `arm` to what differs, or choose another folder with hydra.sweep.dir=runs/<name>"
            )


def earlier_runs(runs: Mapping[Path, dict]) -> dict[Path, dict]:
    """List the finished runs that an earlier sweep left in the folders of this one and that a report compares with its runs.

    Args:
        runs: folder of each run of this sweep -> its resolved configuration.

    Returns:
        Folder of each -> the configuration of a run of this sweep with the same settings of the data. Those with other settings are meant
        to have other data.
    """
    found = {}
    for folder in sweep_folders(runs):
        for path in sorted(folder.glob(f"*_seed*/{FINISHED}")):
            if path.parent not in runs and (path.parent / "config.yaml").is_file():
                data = {"data": _read_configuration(path.parent)["data"]}
                own = (run for run_dir, run in runs.items() if run_dir.parent == folder)
                if same := next((run for run in own if not differences_beside_seeds(data, {"data": run["data"]})), None):
                    found[path.parent] = same
    return found


def check_data(runs: Mapping[Path, dict], complete: bool) -> None:
    """Check that finished runs had the data of this sweep, as they are now.

    Where a run of an earlier version did not record its data, and `data.root` is another folder than it was, a warning names both.

    Args:
        runs: folder of each finished run -> its resolved configuration in this sweep.
        complete: whether no other run remains, so that nothing is trained on the data; then they are compared only where they have moved.

    Raises:
        InputError: the data are others; the message names both folders.
    """
    digests, warned = {}, set()
    for run_dir, run in runs.items():
        roots = [config["data"].get("root") for config in (read_configuration(run_dir / "config.yaml"), run)]
        before, now = (Path(path_setting(root, "data.root")) for root in roots)
        moved = before.resolve() != now.resolve()
        if complete and not moved:
            continue
        said = f"{run_dir} contains a finished run with data.root={before}, and this sweep has data.root={now}"
        if (recorded := recorded_digest(run_dir)) is None:
            if moved and (before, now) not in warned:
                log.warning("%s. Whether these are the same data is not known: earlier versions did not record it", said)
            warned.add((before, now))
            continue
        key = _data_key(run)
        if key not in digests:
            digests[key] = digest(_set_up(run["data"]))
        if others := changed_splits(recorded, digests[key]):
            what = f"other images, annotations or proposals ({', '.join(others)})"
            raise InputError(
                (f"{said}, which has {what}. " if moved else f"{now} has {what} than when {run_dir} was trained. ")
                + "Choose another folder for this sweep with hydra.sweep.dir=runs/<name>, or remove that run"
            )


def record_origin(runs: Mapping[Path, dict]) -> None:
    """Prepare the data of all runs, which computes what they lack, and write each sweep folder's origin with a description of its data.

    Args:
        runs: folder of each run -> its resolved configuration.
    """
    described = {key: _describe(settings) for key, settings in {_data_key(run): run["data"] for run in runs.values()}.items()}
    for folder in sweep_folders(runs):
        own = [run for run_dir, run in runs.items() if run_dir.parent == folder]
        words: dict[str, dict[str, None]] = {}  # split -> its descriptions
        for run in own:
            for split, text in described[_data_key(run)].items():
                words.setdefault(split, {})[text] = None
        data = {split: " or ".join(texts) for split, texts in words.items()}
        add_origin(folder, data, [(str(run["arm"]), run["seed"]) for run in own])


def _describe(settings: dict) -> dict[str, str]:
    data = _set_up(settings)
    return {name: describe(split) for name in ("train", "val", "test") if (split := getattr(data, name)) is not None}


def _data_key(run: Mapping) -> str:
    return json.dumps({**run["data"], "seed": None})  # runs that differ in their seed have the same images


def _set_up(settings: dict) -> DetectionData:
    data = instantiate(OmegaConf.create({"data": settings}).data)  # an error names data.<key>
    data.prepare_data()
    data.setup()
    return data
