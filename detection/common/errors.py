"""Errors that the user can do something about. Scripts print their message alone; the traceback goes to the log file."""

from collections.abc import Iterator
from contextlib import contextmanager


class ExpectedError(Exception):
    """The message says what is wrong, where (file, key, value) and what to do. Any other exception is a mistake in the code."""


class InputError(ExpectedError, ValueError):
    """A setting or the content of a file is wrong."""


class MissingPackageError(ExpectedError, ImportError):
    """A Python package that a setting needs is not installed."""


class MissingFileError(ExpectedError, FileNotFoundError):
    """A file or folder that the user named, or that a folder should contain, does not exist."""


@contextmanager
def named_setting(key: str) -> Iterator[None]:
    """Raise the ValueError or TypeError of a library, whose argument is the setting `key` or below it, as an InputError that names it."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, ExpectedError):
            raise
        raise InputError(f"{key}: {error}") from error
