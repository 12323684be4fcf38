"""Memory with the layout of the model file, of which only some blocks are there: a *mapping*.

A byte of the file always has the same address, so a program's instructions never change. Three I/O modes bring a block there:

- `map`: the file is mapped, and a block's pages are asked for at once. With huge pages, a block of 2 MiB is read as one folio and mapped
  by one entry. Nothing is copied. What is given up must be given up twice, from the map and from the page cache.
- `buffered`: the block is read through the page cache to its place in memory of our own, and the page cache forgets it.
- `direct`: the block is read past the page cache.

Memory of our own is huge pages, or parts of them where blocks are smaller (dairllm.paging.slots).

A file that is cut short while it is mapped takes its pages with it, and reading them would end the process (SIGBUS). Asking for a block
does not: it fails. What is left is the moment between asking and computing, a few milliseconds; the other two have no such moment.
"""

import contextlib
import errno
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from dairllm.engine import system
from dairllm.errors import EngineError
from dairllm.formats.file_stamp import FileStamp
from dairllm.paging.schedule import Block
from dairllm.paging.slots import Slots

__all__ = ["MAPPINGS", "BufferedMapping", "DirectMapping", "FileMapping", "MmapMapping", "ReadMapping", "open_mapping"]


class FileMapping(ABC):
    """One I/O mode; blocks are loaded and released by any thread, each block by one at a time.

    Args:
        path: the model file.
        stamp: which file that was when its header was read.
        block_bytes: a power of two from a page on.

    Attributes:
        address: of the file's first byte; a multiple of 2 MiB.

    Raises:
        EngineError: the file is another one by now, or cannot be read in this mode.
    """

    io_mode: ClassVar[str]
    _flags: ClassVar[int] = 0

    def __init__(self, path: Path, stamp: FileStamp, block_bytes: int) -> None:
        if block_bytes < system.PAGE or block_bytes & (block_bytes - 1):
            raise EngineError(f"blocks of {block_bytes} bytes; expected a power of two from {system.PAGE} on")
        self.path, self.block_bytes, self.nbytes, self._stamp = path, block_bytes, stamp.nbytes, stamp
        self._fd, self._region = -1, (0, 0)
        self._huge = block_bytes % system.HUGE_PAGE == 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | self._flags)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing but what is asked for
            self.address, *region = system.reserve(self.nbytes)
            self._region = region[0], region[1]
            self._prepare()
            self.check()
        except OSError as error:
            self.close()
            raise EngineError(f"{path} cannot be paged with the I/O mode {self.io_mode}: {error.strerror or error}") from None
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """Before the first block."""
        system.advise(self.address, self._reserved, "hugepage" if self._huge else "nohugepage")

    @property
    def _reserved(self) -> int:
        return -(-self.nbytes // self.block_bytes) * self.block_bytes

    def load(self, block: Block, count: int = 1) -> int:
        """Bring `count` blocks of the file into memory, from `block` on; how many bytes that are.

        Raises:
            EngineError: the file is shorter than it was, or the disk fails.
        """
        offset = block * self.block_bytes
        nbytes = min(count * self.block_bytes, self.nbytes - offset)
        try:
            self._load(offset, nbytes)
        except OSError as error:
            self.check()
            raise EngineError(f"{self.path}, bytes {offset} to {offset + nbytes} cannot be read: {error.strerror or error}") from None
        return nbytes

    def release(self, block: Block, count: int = 1) -> None:
        """Give blocks up; their memory is free when this returns."""
        offset = block * self.block_bytes
        self._release(offset, min(count * self.block_bytes, self._reserved - offset))

    def forget(self, block: Block) -> None:
        """Have the page cache forget a block that is not in memory here, whoever read it."""
        system.release_file(self._fd, block * self.block_bytes, self.block_bytes)

    @abstractmethod
    def _load(self, offset: int, nbytes: int) -> None:
        """Have a block's bytes in memory at their place; OSError where that fails."""

    def _release(self, offset: int, nbytes: int) -> None:
        system.advise(self.address + offset, nbytes, "dontneed")

    def check(self) -> None:
        """Raise EngineError where the open file was cut, or written to, since its header was read."""
        change = self._stamp.change(self.path, self._fd)
        if change is not None:
            raise EngineError(change)

    def close(self) -> None:
        """Give up all memory. Nobody may be using it."""
        if self._region[1]:
            system.unmap(*self._region)
            self._region = 0, 0
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class MmapMapping(FileMapping):
    io_mode = "mmap"

    def _prepare(self) -> None:
        system.map_file(self.address, self.nbytes, self._fd)
        with contextlib.suppress(OSError):  # a kernel without huge pages: the same bytes, in small ones
            system.advise(self.address, self.nbytes, "hugepage" if self._huge else "nohugepage")
        system.advise(self.address, self.nbytes, "random")

    def _load(self, offset: int, nbytes: int) -> None:
        if not self._huge:  # else page after page would be read by itself
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_WILLNEED)
        try:
            system.advise(self.address + offset, nbytes, "populate_read")
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error  # "bad address" is what a fault says of a disk that fails

    def _release(self, offset: int, nbytes: int) -> None:
        super()._release(offset, nbytes)
        system.release_file(self._fd, offset, nbytes)


class ReadMapping(FileMapping):
    """Of memory of our own, into which blocks are read."""

    _slots: Slots | None = None

    def _prepare(self) -> None:
        super()._prepare()
        if not self._huge:
            self._slots = Slots(self.block_bytes, self._reserved // self.block_bytes)

    def _load(self, offset: int, nbytes: int) -> None:
        if self._slots is None:
            self._read(offset, nbytes)
            return
        address, count = self.address + offset, -(-nbytes // self.block_bytes)
        self._slots.bring(address, count)
        try:
            self._read(offset, nbytes)
        except OSError:
            self._slots.take_back(address, count)
            raise

    @abstractmethod
    def _read(self, offset: int, nbytes: int) -> None:
        """Bytes of the file to their place; OSError where it fails or the file ends before."""

    def _release(self, offset: int, nbytes: int) -> None:
        if self._slots is None:
            super()._release(offset, nbytes)
        else:
            self._slots.take_back(self.address + offset, nbytes // self.block_bytes)

    def close(self) -> None:
        super().close()
        if self._slots is not None:
            self._slots.close()
            self._slots = None


class BufferedMapping(ReadMapping):
    io_mode = "buffered"

    def _read(self, offset: int, nbytes: int) -> None:
        if system.read_into(self._fd, self.address + offset, nbytes, offset) < nbytes:
            raise OSError(0, "the file ends before")
        system.release_file(self._fd, offset, nbytes)


class DirectMapping(ReadMapping):
    io_mode = "direct"
    _flags = os.O_DIRECT

    def _read(self, offset: int, nbytes: int) -> None:
        whole = -(-nbytes // system.PAGE) * system.PAGE  # whole sectors are asked for; the file may end before
        if system.read_into(self._fd, self.address + offset, whole, offset) < nbytes:
            raise OSError(0, "the file ends before")


MAPPINGS: dict[str, type[FileMapping]] = {kind.io_mode: kind for kind in (MmapMapping, BufferedMapping, DirectMapping)}


def open_mapping(io_mode: str, path: Path, stamp: FileStamp, block_bytes: int) -> FileMapping:
    """A mapping on a file, by one of MAPPINGS.

    Raises:
        EngineError: as `FileMapping`.
    """
    return MAPPINGS[io_mode](path, stamp, block_bytes)
