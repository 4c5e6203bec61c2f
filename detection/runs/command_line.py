"""The command line, before Hydra reads it."""

from roi_quantization.detection.common.configuration import CONFIGS


def replace_null_choices(arguments: list[str]) -> list[str]:
    """Replace `group=null` by Hydra's form for it, `~group`; Hydra ends with a traceback at the former."""
    return [f"~{text.removesuffix('=null')}" if _is_null_choice(text) else text for text in arguments]


def _is_null_choice(text: str) -> bool:
    group = text.removesuffix("=null")
    return group != text and group.replace("/", "").isidentifier() and (CONFIGS / group).is_dir()
