"""Where configurations are composed from: this project's folder, those of installed packages, and those that the user names.

A user names a folder with `--config-dir`, with `hydra.searchpath`, or in Python with `config_dir`. That is the consent to call the
`_target_`s in it for a checkpoint. A package names one by a plugin in `hydra_plugins` (a `SearchPathPlugin`).
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from omegaconf import DictConfig

from roi_quantization.detection.common.configuration import CONFIGS
from roi_quantization.detection.common.errors import InputError, MissingFileError

_FOREIGN = ("hydra", "schema")  # providers of Hydra's own configurations
_named: list[str] = []  # entries of Hydra's search path, such as file:///folder


def name_config_folder(folder: str | Path) -> None:
    """Compose from this folder too, in this process.

    Raises:
        MissingFileError: there is no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise MissingFileError(
            f"there is no folder of configurations {folder}. It holds files <group>/<choice>.yaml, such as roi/mine.yaml"
        )
    _name(f"file://{folder.resolve()}")


def name_folders_of_command(arguments: Sequence[str]) -> None:
    """Compose from the folders on a command line too: those of `--config-dir` and `hydra.searchpath`."""
    options = get_args_parser().parse_args(arguments)
    if options.config_dir and Path(options.config_dir).is_dir():  # Hydra says where it is not
        name_config_folder(options.config_dir)
    name_folders_of_overrides(options.overrides)


def name_folders_of_overrides(overrides: Iterable[str]) -> None:
    """Compose from the folders of an override `hydra.searchpath` too.

    Raises:
        InputError: the overrides are one text, or a folder is not written as Hydra's grammar has it.
    """
    if isinstance(overrides, str):
        raise InputError(f"overrides={overrides!r}: expected a list of them, such as ['{overrides}']")
    for text in overrides:
        if text.lstrip("+").startswith("hydra.searchpath="):
            try:
                entries = OverridesParser.create().parse_override(text).value()
            except HydraException as error:
                raise InputError(f"{text} is not valid in Hydra's grammar ({error}). Write 'hydra.searchpath=[file:///folder]'") from error
            for entry in entries if isinstance(entries, list) else []:
                _name(str(entry))


def _name(entry: str) -> None:
    if entry not in _named:
        _named.append(entry)


def search_entries() -> list[str]:
    """Return the entries of Hydra's search path beside this project's own: of packages, of the command of this process, of `config_dir`."""
    entries = [element.path for element in create_config_search_path(None).get_path() if element.provider not in _FOREIGN]
    entries += _named
    if HydraConfig.initialized():  # in the processes of a launcher too
        sources = HydraConfig.get().runtime.config_sources
        entries += [f"{source.schema}://{source.path}" for source in sources if source.provider not in _FOREIGN and source.schema]
    return [entry for entry in dict.fromkeys(entries) if CONFIGS not in _folders(entry)]


def config_folders() -> list[Path]:
    """Return the folders that configurations are composed from, this project's first."""
    return [CONFIGS, *(folder for entry in search_entries() for folder in _folders(entry) if folder.is_dir())]


def _folders(entry: str) -> list[Path]:
    """Return the folders of an entry of the search path; several for a namespace package, none for what is not on disk."""
    schema, _, path = entry.rpartition("://")
    if schema == "pkg":
        try:
            spec = find_spec(path.replace("/", "."))
        except ImportError:  # Hydra warns of a package that is not there
            spec = None
        return [Path(folder).resolve() for folder in (spec and spec.submodule_search_locations) or []]
    return [Path(path).resolve()] if schema in ("file", "") else []


def choices(group: str) -> list[str]:
    """Return the names of the files of a group, in all folders."""
    return sorted({path.stem for folder in config_folders() for path in (folder / group).glob("*.yaml")})


def override_values(text: str) -> list[Any]:
    """Parse the value of one of Hydra's overrides, as Hydra does; several in a sweep.

    Raises:
        hydra.errors.HydraException: it is not valid in Hydra's grammar, or a `glob`, whose values are files.
    """
    parser = OverridesParser.create()
    override = parser.parse_override(text)
    if not override.is_sweep_override():
        return [override.value()]
    return [parser.parse_override(f"{override.key_or_group}={value}").value() for value in override.sweep_string_iterator()]


def check_choices(overrides: Iterable[str], groups: Container[str]) -> None:
    """Check that what overrides choose of these groups, such as `roi=pool`, is there. Hydra ignores what is not where a group is optional.

    Raises:
        InputError: there is no such choice; the message lists those that there are.
    """
    for text in overrides:
        group = text.lstrip("+").partition("=")[0]
        if group not in groups:
            continue
        try:
            values = override_values(text)
        except HydraException:  # composition raises it too
            continue
        for name in [name for value in values for name in (value if isinstance(value, list) else [value])]:
            if isinstance(name, str) and "${" not in name and not _is_choice(group, name.removesuffix(".yaml")):
                raise InputError(
                    f"{group}={name}: there is no such choice. Choose from {', '.join(choices(group))} (configs/{group}), or name your "
                    "folder of configurations: --config-dir <folder>, in Python config_dir=<folder>"
                )


def _is_choice(group: str, name: str) -> bool:
    file = f"{name}.yaml"
    return file in ConfigStore.instance().repo.get(group, {}) or any((folder / group / file).is_file() for folder in config_folders())


def compose_from_all(name: str, overrides: Sequence[str] = (), return_hydra_config: bool = False) -> DictConfig:
    """Compose `<name>.yaml` from all folders; inside a script that Hydra started, too."""
    others = [text for text in overrides if not text.lstrip("+").startswith("hydra.searchpath=")]
    with _all_sources():
        return compose(name, others, return_hydra_config=return_hydra_config)


@contextmanager
def _all_sources() -> Iterator[None]:
    """Let Hydra compose from all folders, as `--config-dir` does."""
    application = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None  # in a script that Hydra started nothing else can be composed
    job_name = JobRuntime.instance().get("name")
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3", job_name=job_name):
            search_path = create_config_search_path(str(CONFIGS))
            schema = search_path.get_path().pop()  # the last one
            for entry in search_entries():
                search_path.append("named", entry)
            search_path.get_path().append(schema)
            GlobalHydra.instance().hydra = None
            Hydra.create_main_hydra2(job_name, search_path)
            yield
    finally:
        GlobalHydra.instance().hydra = application
