"""Memory of the system's own, for what is large: it goes back the moment that it is given up.

The C library keeps what was freed: once a block of some megabytes has been freed it takes blocks of that
size from its heap, and the process stays as large as it was, though nothing is in it. A node that served
a share of 24 MiB was 24 MiB larger for the next root, which was then refused.
"""

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

__all__ = ["aligned", "sparse"]

_LINE = 64
_LEAST = 64 << 10
"""Bytes from which on memory is mapped: less takes a page and a map for little."""
_HUGE = 4 << 20
"""Bytes from which on huge pages are asked for, as numpy does."""


def aligned(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed bytes at an address that is a multiple of 64; the kernel gives the pages when they are
    first touched, and takes them back with the last view.

    Raises:
        MemoryError: the system has no room.
    """
    if nbytes >= _LEAST:
        return _mapped(nbytes, mmap.MADV_HUGEPAGE if nbytes >= _HUGE else None)
    raw = np.zeros(nbytes + _LINE, np.uint8)
    offset = -raw.ctypes.data % _LINE
    return raw[offset : offset + nbytes]


def sparse(nbytes: int) -> NDArray[np.uint8]:
    """As `aligned`, in small pages.

    A cache keeps its positions head by head, megabytes apart. In huge pages the first token would take
    all of them.

    Raises:
        MemoryError: the system has no room.
    """
    return _mapped(nbytes, mmap.MADV_NOHUGEPAGE)


def _mapped(nbytes: int, advice: int | None) -> NDArray[np.uint8]:
    try:
        memory = mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"the system has no {nbytes} bytes of memory: {error}") from None
    if advice is not None:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(advice)
    return np.frombuffer(memory, np.uint8)[:nbytes]
