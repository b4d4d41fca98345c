"""Large pages of memory on hosts: reading a pool's pages at random then seldom misses the TLB."""

import ctypes
import functools
import mmap

from torch import Tensor

__all__ = ["use"]

HUGE_PAGE_BYTES = 2 << 20
"""Size on x86-64, and on 64-bit Arm with base pages of 4 KiB."""

MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
MADV_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def use(buffer: Tensor) -> None:
    """Ask the system to back a buffer, whose contents are lost, with huge pages.

    Memory that small pages hold already is given back, so that it comes anew as huge ones when it is
    first touched. A system without huge pages, or told never to use them, keeps what there is.

    Args:
        buffer: contiguous; on another device than a host nothing is done.
    """
    if buffer.device.type != "cpu" or MADV_HUGEPAGE is None or MADV_DONTNEED is None:
        return
    start = -(-buffer.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = buffer.data_ptr() + buffer.numel() * buffer.element_size()
    num_bytes = (end - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if num_bytes > 0 and _libc().madvise(start, num_bytes, MADV_HUGEPAGE) == 0:
        _libc().madvise(start, num_bytes, MADV_DONTNEED)
