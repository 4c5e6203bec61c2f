"""What a configuration that came with a checkpoint may call.

A `_target_` is called with the arguments beside it, so a checkpoint's configuration is a program, and its author may be a stranger.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from roi_quantization.detection.configuration import CONFIGS

MOST, DEEPEST = 10_000, 50  # settings, and how far inside one another; those of this project are about 100, and 5

# a reference to another setting, or one of these resolvers with plain arguments: others, such as oc.create, can make a `_target_`
INTERPOLATION = re.compile(r"\$\{(?:[\w.]+|(?:oc\.env|hydra|now):[^${}\[\]'\"]*)\}")


def check_targets_allowed(config: Any, source: str | Path) -> None:
    """Lets pass what can call nothing but the `_target_`s that files in `configs/` name.

    Names are compared whole, not by their package: `roi_quantization.detection.runs.lock.os.system` is in this one.

    Args:
        config: plain containers, or a part of them.
        source: the file it is from, for the message.

    Raises:
        ValueError: anything else; it names the setting.
    """
    for key, value in _settings(config, source):
        name = key.rpartition(".")[2]
        if name == "_target_" and (not isinstance(value, str) or value not in allowed_targets()):
            raise ValueError(
                f"{source}: its configuration would call {value} ({key}), and nothing but what files in configs/ name is called for a "
                "checkpoint. If you know what that does, and who made this file, name it there yourself: in a file of its own, in the "
                "folder of its group"
            )
        if name == "defaults":
            raise ValueError(f"{source}: its configuration has {key}, which would have Hydra add others to it: not written by train.py")
        if isinstance(value, str) and "${" in INTERPOLATION.sub("", value):
            raise ValueError(
                f"{source}: its configuration has {key}={value}; expected no interpolation but other settings, oc.env, hydra and now"
            )


@cache
def allowed_targets() -> frozenset[str]:
    """Every `_target_` in `configs/`."""
    texts = [path.read_text() for path in CONFIGS.rglob("*.yaml")]
    return frozenset(name for text in texts for name in re.findall(r"^\s*_target_:\s*([\w.]+)", text, re.MULTILINE))


def _settings(config: Any, source: str | Path) -> Iterator[tuple[str, Any]]:
    """Dotted key -> value of everything inside, containers included. Not recursive, and it ends: a file can hold itself."""
    left, count = [("", config, 0)], 0
    while left:
        prefix, node, depth = left.pop()
        entries = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
        for key, value in entries:
            count += 1
            if count > MOST or depth > DEEPEST:
                raise ValueError(f"{source}: its configuration has more than {MOST} settings, or is nested deeper than {DEEPEST}")
            if not isinstance(value, str | int | float | None | Mapping | list | tuple):
                raise ValueError(f"{source}: its configuration has a {type(value).__name__} ({prefix}{key}); expected plain values")
            yield f"{prefix}{key}", value
            left.append((f"{prefix}{key}.", value, depth + 1))
