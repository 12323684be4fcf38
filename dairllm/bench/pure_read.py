"""How fast weights can be read at best, by a program that does nothing else: what every token is measured against."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dairllm.formats.model_file import ModelFile
from dairllm.paging.block_cache import runs
from dairllm.paging.mapping import open_mapping
from dairllm.paging.needs import BLOCK_BYTES
from dairllm.paging.read_mode import ReadMode

__all__ = ["forget", "read_file", "read_memory"]

_PIECE = 1 << 20


def forget(path: Path) -> None:
    """Have the page cache forget a file: what others left there is read too fast, and in a control group it is charged to them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_memory(model: ModelFile, n_threads: int) -> float:
    """Bytes a second of the weights in memory, mapped as they are: the better of two passes by so many threads.

    The exclusive or of all words: the library does it as fast as memory gives them.
    """
    weights = [tensor for tensor in model.tensors if tensor.name != "embedding"]
    first, stop = weights[0].offset, weights[-1].offset + weights[-1].nbytes
    words = model.raw[first : stop - (stop - first) % (8 * n_threads)]
    parts = np.array_split(words.view(np.int64), n_threads)

    def read(number: int) -> None:
        part = parts[number]
        for begin in range(0, len(part), _PIECE):
            np.bitwise_xor.reduce(part[begin : begin + _PIECE])

    return max(words.nbytes / _seconds(read, n_threads) for _ in range(2))


def read_file(model: ModelFile, blocks: Sequence[int], mode: ReadMode, block_bytes: int, streaming: int) -> float:
    """Bytes a second of blocks that are not in memory, neighbours at once as when paging, evicted as soon as `streaming` others
    have come."""
    mapping = open_mapping(mode.io_mode, model.path, model.stamp, block_bytes)
    waiting = iter(runs(blocks, max(1, BLOCK_BYTES // block_bytes)))
    lock = threading.Lock()

    def read(_: int) -> None:
        held: list[tuple[int, int]] = []
        while True:
            with lock:
                run = next(waiting, None)
            if run is None:
                break
            mapping.load(*run)
            held.append(run)
            while sum(count for _, count in held) > streaming // mode.readers:
                mapping.release(*held.pop(0))
        for run in held:
            mapping.release(*run)

    took = _seconds(read, mode.readers)
    mapping.close()
    return len(blocks) * block_bytes / took


def _seconds(read: Callable[[int], None], n_threads: int) -> float:
    """From the first thread's start to the last one's end."""
    threads = [threading.Thread(target=read, args=(number,)) for number in range(n_threads)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun
