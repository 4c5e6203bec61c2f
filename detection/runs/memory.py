"""How the C library treats memory that is freed."""

import ctypes
import os
import platform

# of glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let this process use the memory that it frees again, instead of returning it to the system.

    glibc returns large blocks, such as the gradients of fully connected layers, as soon as they are freed. The next step gets new pages,
    which Linux clears one by one: docs/training.md has the time that it takes. The process then keeps what it used at its peak until it
    ends, so this is for programs, not for functions that others call.

    Nothing is changed with another C library, or where the environment has settings of malloc (`MALLOC_...` or `GLIBC_TUNABLES`).
    """
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if platform.libc_ver()[0] != "glibc" or is_set:
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)  # from the heap, not from blocks of their own
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # and the heap never shrinks
