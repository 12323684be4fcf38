"""System calls that paging is made of, called so that other threads run meanwhile (`mmap.madvise` holds the interpreter lock), and where
a thread runs.
"""

import ctypes
import os

__all__ = ["HUGE_PAGE", "PAGE", "advise", "map_file", "move", "processor", "read_into", "release_file", "renew", "reserve", "unmap"]

PAGE = 4096
HUGE_PAGE = 2 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap, _mremap, _madvise, _pread = _libc.mmap, _libc.munmap, _libc.mremap, _libc.madvise, _libc.pread
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_mmap.restype = ctypes.c_void_p
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_mremap.restype = ctypes.c_void_p
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_pread.restype = ctypes.c_ssize_t

_processor = ctypes.PyDLL(None).sched_getcpu
_processor.argtypes, _processor.restype = [], ctypes.c_int

_READ, _WRITE = 1, 2
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE = 1, 2, 0x10, 0x20, 0x4000
_MAY_MOVE, _TO_FIXED, _KEEP_SOURCE = 1, 2, 4
_FAILED = ctypes.c_void_p(-1).value

_ADVICE = {"random": 1, "dontneed": 4, "hugepage": 14, "nohugepage": 15, "populate_read": 22, "populate_write": 23}


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def reserve(nbytes: int) -> tuple[int, int, int]:
    """Addresses for nbytes, of which none takes memory before it is written: (address, a multiple of HUGE_PAGE; region, its length).

    Raises:
        OSError: there are not so many addresses, or the system promises no memory that it has not.
    """
    length = -(-nbytes // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
    region = _mmap(None, length, _READ | _WRITE, _PRIVATE | _ANONYMOUS | _NORESERVE, -1, 0)
    if region == _FAILED or region is None:
        raise _error()
    return -(-region // HUGE_PAGE) * HUGE_PAGE, region, length


def map_file(address: int, nbytes: int, fd: int) -> None:
    """Map a file from its begin on, for reading, in the place of what was reserved there.

    Raises:
        OSError: the file system cannot.
    """
    if _mmap(address, nbytes, _READ, _SHARED | _FIXED, fd, 0) == _FAILED:
        raise _error()


def move(source: int, nbytes: int, destination: int) -> None:
    """Move memory of one mapping to addresses that are reserved, in the place of what is there. Those it leaves stay reserved.

    Raises:
        OSError: the source is several mappings, or the process has too many.
    """
    if _mremap(source, nbytes, nbytes, _MAY_MOVE | _TO_FIXED | _KEEP_SOURCE, destination) == _FAILED:
        raise _error()


def renew(address: int, nbytes: int) -> None:
    """Make reserved addresses like new, whatever is there: without memory, and no mapping apart from their neighbours. No huge pages.

    Raises:
        OSError: the process has too many mappings.
    """
    if _mmap(address, nbytes, _READ | _WRITE, _PRIVATE | _FIXED | _ANONYMOUS | _NORESERVE, -1, 0) == _FAILED:
        raise _error()
    advise(address, nbytes, "nohugepage")


def unmap(region: int, length: int) -> None:
    """Give addresses back."""
    _munmap(region, length)


def advise(address: int, nbytes: int, advice: str) -> None:
    """madvise: "random", "dontneed", "hugepage", "nohugepage", "populate_read" or "populate_write".

    Raises:
        OSError: the kernel does not know it, or a page cannot be read.
    """
    if _madvise(address, nbytes, _ADVICE[advice]):
        raise _error()


def read_into(fd: int, address: int, nbytes: int, offset: int) -> int:
    """Read bytes of a file to an address until nbytes have come or the file ends; how many came.

    Raises:
        OSError: the disk fails.
    """
    done = 0
    while done < nbytes:
        count = _pread(fd, address + done, nbytes - done, offset + done)
        if count < 0:
            raise _error()
        if count == 0:
            break
        done += count
    return done


def release_file(fd: int, offset: int, nbytes: int) -> None:
    """Let the page cache forget part of a file; where nbytes is 0, all from `offset` on."""
    os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def processor() -> int:
    """The number of the processor that the calling thread is on at this moment; negative where that cannot be told."""
    return int(_processor())
