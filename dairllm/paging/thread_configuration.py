"""How many threads compute and how many read while a node pages: found by trying (dairllm.runtime.autotuner), while tokens are generated.

Reading takes processor time, so beside it fewer compute threads may be faster: where disk and arithmetic take about as long, on few
processors, by a tenth. What is best depends on the processors, the disk, the room and on what else the machine does, so it is measured
where it matters: over the passes of one row that are computed anyway. Threads change no bit of the result.
"""

from typing import NamedTuple

__all__ = ["ThreadConfiguration", "thread_configurations"]


class ThreadConfiguration(NamedTuple):
    """Attributes:
    threads: that compute.
    readers: that read.
    """

    threads: int
    readers: int


def thread_configurations(threads: int | None, readers: int | None, *, most_threads: int, first_readers: int) -> list[ThreadConfiguration]:
    """Configurations worth a trial, the first to be had until another proves better.

    Args:
        threads: as somebody wants it; None: any.
        readers: likewise.
        most_threads: that can compute.
        first_readers: that reading alone was fastest with, of 1 and 2.
    """
    computing = [most_threads, most_threads - 1, most_threads // 2] if threads is None else [min(threads, most_threads)]
    reading = [first_readers, 3 - first_readers] if readers is None else [readers]
    return list(dict.fromkeys(ThreadConfiguration(max(t, 1), r) for t in computing for r in reading))
