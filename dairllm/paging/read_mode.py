"""Which I/O mode is the fastest for a file on this machine: measured, since it depends on disk, file system and kernel."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dairllm.errors import EngineError
from dairllm.formats.file_stamp import FileStamp
from dairllm.paging.block_cache import runs
from dairllm.paging.mapping import FileMapping, open_mapping
from dairllm.paging.needs import IO_MODES, IoMode
from dairllm.paging.readers import Readers

__all__ = ["ReadMode", "probe_read_mode"]

_SAMPLE_BYTES = 48 << 20
_SAMPLE_SECONDS = 0.25
_CLEARLY = 1.15
"""A mode that costs more processor time must be so much faster to be taken."""
_SECOND_READER = 0.9
"""A second reader is taken unless it makes reading slower than this: while one gives up blocks or waits to be woken, the other reads."""


@dataclass(frozen=True, slots=True)
class ReadMode:
    """How a file is read.

    Attributes:
        io_mode: one of IO_MODES.
        readers: threads that read.
        rates: what was measured: ((I/O mode, readers), bytes a second); empty where nothing was.
    """

    io_mode: str
    readers: int
    rates: tuple[tuple[tuple[str, int], float], ...] = ()

    @property
    def bytes_per_second(self) -> float:
        """Of the chosen; 0 where nothing was measured."""
        return dict(self.rates).get((self.io_mode, self.readers), 0.0)


def probe_read_mode(
    path: Path,
    stamp: FileStamp,
    block_bytes: int,
    io_mode: IoMode = "auto",
    readers: int | None = None,
    *,
    sample_bytes: int = _SAMPLE_BYTES,
) -> ReadMode:
    """Measure what is not given, for a second or two at most: parts of the file are read, and leave the page cache again.

    Args:
        stamp: which file it is.
        io_mode: "auto", or the one to take.
        readers: how many are to read, or None.

    Raises:
        EngineError: the file cannot be read in the mode that is asked for, or in none.
    """
    if io_mode != "auto" and readers is not None:
        return ReadMode(io_mode, readers)
    rates: dict[tuple[str, int], float] = {}
    reason: EngineError | None = None
    for kind in IO_MODES if io_mode == "auto" else (io_mode,):
        try:
            mapping = open_mapping(kind, path, stamp, block_bytes)
        except EngineError as error:
            reason = error
            continue
        try:
            blocks = _sample(stamp.nbytes, block_bytes, sample_bytes)
            _rate(mapping, blocks[: len(blocks) // 4 + 1], 1)  # the first touch of memory is slow on a virtual machine
            for count in (1, 2) if readers is None else (readers,):
                rates[kind, count] = _rate(mapping, blocks, count)
        except EngineError as error:
            reason = error
            rates = {key: rate for key, rate in rates.items() if key[0] != kind}
        finally:
            mapping.close()
    if not rates:
        raise reason or EngineError(f"{path} cannot be paged")
    fastest: dict[str, float] = {}
    for (name, _), rate in rates.items():
        fastest[name] = max(rate, fastest.get(name, 0.0))
    best = next(iter(fastest))  # in the order of their costs
    for name, rate in fastest.items():
        if rate > _CLEARLY * fastest[best]:
            best = name
    counts = {count: rate for (name, count), rate in rates.items() if name == best}
    taken = max(count for count, rate in counts.items() if rate >= _SECOND_READER * fastest[best])
    return ReadMode(best, taken, tuple(rates.items()))


def _sample(nbytes: int, block_bytes: int, sample_bytes: int) -> list[int]:
    """Blocks in a few extents, evenly over the file."""
    total = -(-nbytes // block_bytes)
    wanted = min(max(sample_bytes // block_bytes, 1), total)
    extents = min(4, wanted)
    length = wanted // extents
    return [total * part // extents + place for part in range(extents) for place in range(length)]


def _rate(mapping: FileMapping, blocks: Sequence[int], readers: int) -> float:
    """Bytes a second for reading blocks, released behind; those read before the time was up count."""
    for block in blocks:
        mapping.forget(block)
    pieces = runs(blocks, max(1, (2 << 20) // mapping.block_bytes))
    done: list[int] = []
    failed: list[EngineError] = []
    end = time.perf_counter() + _SAMPLE_SECONDS

    def read(first: int, count: int) -> None:
        if time.perf_counter() > end and done:
            return
        try:
            done.append(mapping.load(first, count))
        except EngineError as error:
            failed.append(error)
        mapping.release(first, count)

    begun = time.perf_counter()
    threads = Readers(readers)
    threads.submit([partial(read, first, count) for first, count in pieces])
    threads.finish()
    if failed:
        raise failed[0]
    return sum(done) / (time.perf_counter() - begun)
