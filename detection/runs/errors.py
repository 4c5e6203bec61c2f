"""Errors as who runs a script reads them: what is wrong and what to do, without the way there through the code."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def exit_with_message(script: str) -> Iterator[None]:
    """Ends the program with the message of an error that this project raised on purpose, and status 1; others keep their traceback.

    With HYDRA_FULL_ERROR in the environment all keep it.
    """
    try:
        yield
    except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") or not _on_purpose(error):
            raise
        sys.exit(f"{script}: {error}")


def _on_purpose(error: BaseException) -> bool:
    """Whether it was raised in a file of this project, or by the system for a file that it names."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).is_relative_to(ROOT)
