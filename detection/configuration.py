"""Where configurations lie, and when two of them mean the same training."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# where things lie, what is written down and shown, how many processes load and who computes the same metrics decides no result
NO_RESULT = {"run_dir", "default_root_dir", "save_dir", "root", "cache_dir", "resume", "checkpoint", "logger", "num_workers", "coco_eval"}
NO_RESULT |= {"enable_progress_bar", "enable_model_summary", "log_every_n_steps"}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key was x and is y` for each setting that differs, those aside that decide no result."""
    before, now = dict(_settings(before)), dict(_settings(now))
    differ = [key for key in {**before, **now} if before.get(key, "not there") != now.get(key, "not there")]
    return [f"{key} was {before.get(key, 'not there')} and is {now.get(key, 'not there')}" for key in differ]


def shorten(differing: list[str], most: int = 5) -> str:
    """The first of `differences`, in one line."""
    return "; ".join(differing[:most] + ([f"and {len(differing) - most} more"] if len(differing) > most else []))


def _settings(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value of everything in nested mappings."""
    for key, value in node.items():
        if key in NO_RESULT:
            continue
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
