"""Check of what a checkpoint's configuration may call.

A `_target_` is called with the arguments beside it, so the configuration of a checkpoint is a program of whoever made it.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from roi_quantization.detection.common.config_sources import config_folders
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.renamed_targets import RENAMED

log = logging.getLogger(__name__)

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
MAX_SETTINGS, MAX_DEPTH = 10_000, 50  # this project's configurations have about 100 settings, 5 levels deep

# a reference to another setting, or one of these resolvers with plain arguments: others, such as oc.create, can create a `_target_`
INTERPOLATION = re.compile(r"\$\{(?:[\w.]+|(?:oc\.env|oc\.select|hydra|now):[^${}\[\]'\"]*)\}")


def check_targets_allowed(config: Any, source: str | Path) -> None:
    """Check that a configuration can call nothing but the `_target_`s that files in `configs/` or in the user's folders name.

    Whole names are compared, not packages: `roi_quantization.detection.runs.lock.os.system` starts with this one.

    Args:
        config: plain containers, or a part of them.
        source: the file that it is from, for the message.

    Raises:
        InputError: it can call something else; the message names the setting.
    """
    allowed = allowed_targets()
    for key, value in _flatten(config, source):
        name = key.rpartition(".")[2]
        if name == "_target_" and (not isinstance(value, str) or RENAMED.get(value, value) not in allowed):
            raise InputError(
                f"{source}: its configuration would call {value} ({key}). Only targets that a file in configs/ or in your own folder of "
                "configurations names are called for a checkpoint. If you trust that function and the author of this file, name it there "
                "yourself, and name the folder: --config-dir <folder>, in Python config_dir=<folder>"
            )
        if name == "defaults":
            raise InputError(f"{source}: its configuration contains {key}, by which Hydra would add others. train.py writes no such key")
        if isinstance(value, str) and "${" in INTERPOLATION.sub("", value):
            raise InputError(
                f"{source}: its configuration contains {key}={value}. Allowed interpolations are other settings, oc.env, "
                "oc.select, hydra and now"
            )


def allowed_targets() -> frozenset[str]:
    """Return every `_target_` in `configs/` and in the folders of configurations that the user names."""
    found = set()
    for path in [path for folder in config_folders() for path in folder.rglob("*.yaml")]:
        try:
            found |= _targets_of(path.read_bytes())
        except yaml.YAMLError as error:
            log.warning("%s is not YAML, and no _target_ in it is allowed: %s", path, " ".join(str(error).split()))
    return frozenset(found)


@cache
def _targets_of(content: bytes) -> frozenset[str]:
    """Return the names that are a `_target_` anywhere in a YAML file. An interpolation is no name."""
    if b"_target_" not in content:
        return frozenset()
    found, seen, stack = set(), set(), list(yaml.compose_all(content, LOADER))  # nodes: tags of other programs need not be known
    while stack:
        node = stack.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            found |= {value.value for key, value in node.value if key.value == "_target_" and _is_name(value)}
            stack += [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            stack += node.value
    return frozenset(found)


def _is_name(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and re.fullmatch(r"[\w.]+", node.value) is not None


def _flatten(config: Any, source: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of everything inside, containers included. Ends also for a container that contains itself."""
    stack, count = [("", config, 0)], 0
    while stack:
        prefix, node, depth = stack.pop()
        entries = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
        for key, value in entries:
            count += 1
            if count > MAX_SETTINGS or depth > MAX_DEPTH:
                raise InputError(f"{source}: its configuration has more than {MAX_SETTINGS} settings, or is nested deeper than {MAX_DEPTH}")
            if not isinstance(value, str | int | float | None | Mapping | list | tuple):
                raise InputError(f"{source}: its configuration contains a {type(value).__name__} ({prefix}{key}). Expected plain values")
            yield f"{prefix}{key}", value
            stack.append((f"{prefix}{key}.", value, depth + 1))
