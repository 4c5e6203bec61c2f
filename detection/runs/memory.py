"""What a program does with its memory from one step to the next."""

import ctypes
import os
import platform

import torch

# of glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def set_up_memory() -> None:
    """Let the next step of this program use the memory that a step frees, without clearing or filling it.

    glibc returns large blocks, such as the gradients of fully connected layers, to the system as soon as they are freed. The next step gets
    new pages, which Linux clears one by one, and in deterministic mode PyTorch fills them with NaN, for programs that read memory before
    they write it. docs/training.md has the time that this takes.

    The process keeps what it used at its peak until it ends, so this is for programs, not for functions that others call. malloc is left as
    it is with another C library, or where the environment has settings of it (`MALLOC_...` or `GLIBC_TUNABLES`).
    """
    torch.utils.deterministic.fill_uninitialized_memory = False
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if platform.libc_ver()[0] != "glibc" or is_set:
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)  # from the heap, not from blocks of their own
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # and the heap never shrinks
