"""Suspend Python's cyclic garbage collector while many objects are created."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable the collector for code that creates millions of objects without reference cycles.

    The collector would traverse all of them again and again and find nothing to free.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
