"""Large pages for large tensors: the system clears each new page before it hands it out, and small ones one by one."""

import ctypes
import sys

from torch import Tensor

LEAST = 2**25  # bytes: smaller blocks are reused, with their pages
PAGE = 2**21
MADV_HUGEPAGE = 14


def ask_for_large_pages(tensor: Tensor) -> Tensor:
    """Give a new tensor back, whose memory Linux is asked to lay out in pages of 2 MiB. Advice: nothing fails where it is not taken."""
    if _LIBC is not None and tensor.nbytes >= LEAST:
        start = -(-tensor.data_ptr() // PAGE) * PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
    return tensor


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
