"""The command line, before Hydra reads it, and what a sweep makes of it."""

import os
import re
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from roi_quantization.detection.common.configuration import CONFIGS, path_setting
from roi_quantization.detection.runs.errors import is_in_sweep

FOLDERS = ("run_dir=", "hydra.run.dir=", "hydra.sweep.dir=")


def replace_null_choices(arguments: list[str]) -> list[str]:
    """Replace `group=null` by Hydra's form for it, `~group`; Hydra ends with a traceback at the former."""
    return [f"~{text.removesuffix('=null')}" if _is_null_choice(text) else text for text in arguments]


def log_into_run_folder(arguments: list[str]) -> list[str]:
    """Give Hydra the folder of `run_dir=` as its own, so that the log is there too. A sweep refuses it (`check_sweep_folder`).

    Hydra creates its folders itself, so a `~` in them is replaced here.
    """
    arguments = [_expand_home(text) if text.startswith(FOLDERS) else text for text in arguments]
    given = [text for text in arguments if text.startswith("run_dir=")]
    if not given or {"-m", "--multirun"}.intersection(arguments) or any(text.startswith("hydra.run.dir=") for text in arguments):
        return arguments
    place = len(arguments) - arguments[::-1].index(given[-1])  # beside it: options of Hydra do not stand between settings
    return [*arguments[:place], f"hydra.run.dir={given[-1].removeprefix('run_dir=')}", *arguments[place:]]


def number_picture(cfg: DictConfig) -> None:
    """Replace a `~` in `cfg.picture`. In a sweep, draw the picture of each job into a file of its own: explain_0.png, explain_1.png, ..."""
    if cfg.picture is not None:
        cfg.picture = path_setting(cfg.picture, "picture")
    if is_in_sweep():
        path = Path(cfg.picture)
        cfg.picture = str(path.with_stem(f"{path.stem}_{HydraConfig.get().job.num}"))


def _expand_home(text: str) -> str:
    """Replace a quoted `~` at the beginning of a value. Hydra's grammar has none without quotes."""
    return re.sub(r"""(?<==)(["'])~(?=/|\1$)""", lambda quote: quote[0][0] + os.path.expanduser("~"), text, count=1)


def _is_null_choice(text: str) -> bool:
    group = text.removesuffix("=null")
    return group != text and group.replace("/", "").isidentifier() and (CONFIGS / group).is_dir()
