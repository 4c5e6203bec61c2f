"""Check of the keys beside a `_target_` and of their values, before it is called."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra._internal.utils import _locate
from omegaconf import OmegaConf

from roi_quantization.detection.common.errors import InputError

SPECIAL = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")  # Hydra's own
ANNOTATED = ("roi_quantization.", "pytorch_lightning.")
NUMBERS = {bool, int, float}
LISTS = {list, tuple, Sequence, Iterable}


def check_settings(node: Any) -> None:
    """Check that each `_target_` in a configuration is there and takes the settings beside it.

    Of this project and of Lightning numbers, true or false, and lists are checked as well, where the annotation of a parameter allows
    nothing else. Annotations of others may say less than their code takes.

    Args:
        node: of a configuration. Anything else passes.

    Raises:
        InputError: a `_target_` cannot be imported or called, has no parameter of that name, or takes no such value; the message has
            the dotted key.
    """
    if OmegaConf.is_dict(node):
        if isinstance(node.get("_target_"), str):
            _check_keys(node)
            if not node.get("_recursive_", True):
                return
        children = [node[key] for key in node if not OmegaConf.is_missing(node, key)]
    else:
        children = list(node) if OmegaConf.is_list(node) else []
    for child in children:
        check_settings(child)


def _check_keys(node: Any) -> None:
    name = node["_target_"]
    target = _find(name, node._get_full_key("_target_"))
    parameters = named_parameters(target)
    if parameters is None:
        return
    keys = [key for key in node if key not in SPECIAL]
    for key in keys:
        if key not in parameters:
            given = [known for known, has_default in parameters.items() if has_default or known in keys]  # the code gives the others
            raise InputError(f"{node._get_full_key(key)}: {name} has no such setting. It has {', '.join(given) or 'none'}")
    for key, (allowed, default) in _annotations(target).items() if name.startswith(ANNOTATED) else ():
        if key not in keys or OmegaConf.is_missing(node, key):
            continue
        wanted = _wanted_instead(node[key], allowed)
        if wanted and not (node[key] is None and default is None):
            raise InputError(f"{node._get_full_key(key)}={node[key]}: expected {wanted}")


def _annotations(target: Callable) -> dict[str, tuple[set, Any]]:
    """Return the types that the annotation of a parameter allows, without their arguments, and its default."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    except NameError:  # of a type that is imported for type checkers alone
        return {}
    members = {key: get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,) for key, hint in hints.items()}
    return {
        key: ({get_origin(member) or member for member in members[key]}, parameter.default)
        for key, parameter in parameters.items()
        if key in members
    }


def _wanted_instead(value: Any, allowed: set) -> str | None:
    """Return what is allowed, in words, where it is numbers or lists alone and the value is something else."""
    types = allowed - {NoneType}
    if not types or (value is None and NoneType in allowed) or (OmegaConf.is_dict(value) and "_target_" in value):
        return None
    if types <= NUMBERS:
        is_number = type(value) in (int, float) and types != {bool} and (float in types or float(value).is_integer())
        if is_number or (bool in types and value in (False, True)):
            return None
        words = ["a number"] if float in types else ["a whole number"] if int in types else []
        words += ["true or false"] if bool in types else []
    elif types <= LISTS:
        if OmegaConf.is_list(value):
            return None
        words = ["a list"]
    else:
        return None
    return " or ".join(words + (["null"] if NoneType in allowed else []))


def _find(name: str, key: str) -> Callable:
    try:
        target = _locate(name)
    except (ImportError, ValueError) as error:
        cause = error.__cause__
        if cause is not None and not isinstance(cause, ImportError | AttributeError):
            raise  # the module itself fails: its traceback says where
        raise InputError(f"{key}={name}: {cause or error}. Check the name, and that its module is installed or in PYTHONPATH") from error
    if not callable(target):
        raise InputError(f"{key}={name} is a {type(target).__name__}. Expected a function or a class")
    return target


def named_parameters(target: Callable) -> dict[str, bool] | None:
    """Return the parameters that can be given by name, and whether each has a default; None where any name can be."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter.default is not parameter.empty for parameter in parameters if parameter.kind in by_name}
