"""The command line, before Hydra reads it."""

from roi_quantization.detection.common.configuration import CONFIGS


def replace_null_choices(arguments: list[str]) -> list[str]:
    """Replace `group=null` by Hydra's form for it, `~group`; Hydra ends with a traceback at the former."""
    return [f"~{text.removesuffix('=null')}" if _is_null_choice(text) else text for text in arguments]


def log_into_run_folder(arguments: list[str]) -> list[str]:
    """Give Hydra the folder of `run_dir=` as its own, so that the log is there too. A sweep refuses it (`check_sweep_folder`)."""
    given = [text for text in arguments if text.startswith("run_dir=")]
    if not given or {"-m", "--multirun"}.intersection(arguments) or any(text.startswith("hydra.run.dir=") for text in arguments):
        return arguments
    place = len(arguments) - arguments[::-1].index(given[-1])  # beside it: options of Hydra do not stand between settings
    return [*arguments[:place], f"hydra.run.dir={given[-1].removeprefix('run_dir=')}", *arguments[place:]]


def _is_null_choice(text: str) -> bool:
    group = text.removesuffix("=null")
    return group != text and group.replace("/", "").isidentifier() and (CONFIGS / group).is_dir()
