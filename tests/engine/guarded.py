"""Random graphs are compiled and run, each of their areas between pages that nobody may touch: who does ends with a signal.

    python -m tests.engine.guarded FIRST COUNT SEEDS_FILE [THREADS]

SEEDS_FILE always holds the seed that is being run, for whoever finds this process dead. Prints what became of all as JSON. Areas lie before
a guard with their last byte, and of some graphs once more behind one with their first.
"""

import ctypes
import json
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dairllm.engine import program, tables
from dairllm.engine.executor import Executor
from dairllm.engine.memory import Layout
from dairllm.engine.program import Program, compile_program, memory_needs
from dairllm.engine.rope import rope_table
from dairllm.engine.weights import WireWeights
from dairllm.errors import EngineError, GraphError
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig
from tests.engine.extents import extents
from tests.engine.random_graphs import random_graph

__all__ = ["counts_of", "outside"]

PAGE = mmap.PAGESIZE
ENOUGH = 8 << 20
"""Bytes that a graph may take, guards aside."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

NUMBERS = np.random.default_rng(0).standard_normal(4096, np.float32).view(np.uint8)
GARBAGE = np.random.default_rng(0).integers(0, 256, 16411, np.uint8)
BEGINS = 4
"""One graph of so many is also run with areas that begin behind a guard: a kernel goes on too far rather than begins too early."""

at_end = True
"""Whether areas end at a guard; else they begin behind one."""


def pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def placed(offset: int, nbytes: int) -> tuple[int, int]:
    """Where an area lies behind a guard that begins at `offset`, and where the next guard begins."""
    end = offset + PAGE + pages(nbytes)
    return end - nbytes if at_end else offset + PAGE, end


def guarded(nbytes: int, guards: Iterable[int]) -> npt.NDArray[np.uint8]:
    """Zeroed memory with such guards in it."""
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint8, nbytes)
    for offset in guards:
        if _libc.mprotect(array.ctypes.data + offset, PAGE, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return array


def guarded_alone(nbytes: int) -> npt.NDArray[np.uint8]:
    """An area with its two guards."""
    start, end = placed(0, nbytes)
    return guarded(end + PAGE, (0, end))[start : start + nbytes]


def guarded_table(*config: Any) -> npt.NDArray[np.float32]:
    table = rope_table(*config)
    copy = guarded_alone(table.nbytes).view(np.float32).reshape(table.shape)
    copy[:] = table
    return copy


class GuardedLayout(Layout):
    """A guard before each area, and one behind the last."""

    def place(self, kind: str, index: int, nbytes: int) -> None:
        start, end = placed(self.nbytes - PAGE if self.nbytes else 0, nbytes)
        self._places[kind, index] = start, nbytes
        self.nbytes = end + PAGE

    def allocate(self) -> None:
        super().allocate()
        starts = [start // PAGE * PAGE - PAGE for start, _ in self._places.values()]
        self._memory = guarded(self.nbytes, (*starts, self.nbytes - PAGE))
        self._whole = self._whole._replace(address=self._memory.ctypes.data)


class GuardedWeights(WireWeights):
    """The same of weights."""

    def __init__(self, node: NodeConfig) -> None:
        super().__init__(node)
        offset = 0
        for key, (_, nbytes) in self._places.items():
            start, offset = placed(offset, nbytes)
            self._places[key] = start, nbytes
        self.nbytes = offset + PAGE
        self._area = self._area._replace(nbytes=self.nbytes)

    def allocate(self) -> None:
        starts = [start // PAGE * PAGE - PAGE for start, _ in self._places.values()]
        self._memory = guarded(self.nbytes, (*starts, self.nbytes - PAGE))
        self._area = self._area._replace(address=self._memory.ctypes.data)


def compiled(network: NetworkConfig, node: NodeConfig, kv_cache: FloatType, n_threads: int) -> Program | None:
    """As a worker does it: None where the graph asks for more than it may hold."""
    weights = WireWeights(node)
    if weights.nbytes + sum(memory_needs(network, node, n_threads=n_threads, kv_cache=kv_cache)) > ENOUGH:
        return None
    program.Layout = GuardedLayout
    try:
        weights = GuardedWeights(node)
        weights.allocate()
        return compile_program(network, node, weights, n_threads=n_threads, kv_cache=kv_cache)
    finally:
        program.Layout = Layout


def memory_of(made: Program) -> list[tuple[int, int]]:
    """(first address, end address) of each area that a program may touch; of threads' memory, the first one's."""
    layout, (weights, rope) = made._layout, made._kept
    assert layout._memory is not None
    assert isinstance(weights, WireWeights)
    found = [(made.scratch.ctypes.data, made.scratch_stride)]
    for memory, places in ((layout._memory, layout._places), (weights._memory, weights._places)):
        found += [(memory.ctypes.data + start, nbytes) for start, nbytes in places.values()]
    found += [(table.ctypes.data, table.nbytes) for table in rope._tables.values()]
    return [(address, address + nbytes) for address, nbytes in found]


def outside(made: Program) -> list[str]:
    """What of a program's instructions touches more than one area."""
    areas = memory_of(made)
    return [what for what, first, end in extents(made) if not any(low <= first and end <= high for low, high in areas)]


def fill(made: Program) -> None:
    """With numbers, wherever they are read as such; weights with garbage."""
    layout, (weights, _) = made._layout, made._kept
    assert layout._memory is not None
    assert isinstance(weights, WireWeights)
    for memory, places, filling in ((layout._memory, layout._places, NUMBERS), (weights._memory, weights._places, GARBAGE)):
        for start, nbytes in places.values():
            for first in range(start, start + nbytes, len(filling)):
                count = min(len(filling), start + nbytes - first)
                memory[first : first + count] = filling[:count]


def run(made: Program, executor: Executor, seed: int) -> int:
    """One row, all of them, and some between, at the first positions and the last. Returns how many runs failed."""
    fill(made)
    most, failed = min(made.n_batches, made.seq_len), 0
    for rows in sorted({1, 1 + seed % most, most}):
        last = made.seq_len - rows
        for position, first_row in ((0, 0), (last, rows - 1), (last, (rows - 1) // 16 * 16)):
            for segment in range(made.n_segments):
                try:
                    executor.run(made, segment, segment + 1, position, rows, first_row)
                except EngineError:
                    failed += 1
    return failed


def counts_of(first: int, count: int, seeds_file: Path, n_threads: int = 1) -> dict[str, Any]:
    """What became of so many graphs: refused, too large, compiled, run; seeds whose instructions would leave their areas."""
    global at_end
    program.aligned, tables.rope_table = guarded_alone, guarded_table
    counts: dict[str, Any] = dict.fromkeys(("refused", "too_large", "compiled", "run", "runs_failed"), 0) | {"outside": [], "bugs": []}
    with seeds_file.open("wb", buffering=0) as file, Executor(n_threads) as executor:
        for seed in range(first, first + count):
            os.pwrite(file.fileno(), b"%-20d" % seed, 0)
            network, node, kv_cache = random_graph(seed)
            for at_end in (True, False)[: 1 if seed % BEGINS else 2]:
                try:
                    made = compiled(network, node, kv_cache, n_threads)
                except GraphError:
                    counts["refused"] += 1
                    break
                except Exception as error:
                    counts["bugs"].append((seed, repr(error)))
                    break
                if made is None:
                    counts["too_large"] += 1
                    break
                counts["compiled"] += at_end
                if beyond := outside(made):
                    counts["outside"].append((seed, beyond))
                counts["runs_failed"] += run(made, executor, seed)
                counts["run"] += at_end
    return counts


if __name__ == "__main__":
    arguments = sys.argv[1:]
    print(json.dumps(counts_of(int(arguments[0]), int(arguments[1]), Path(arguments[2]), *map(int, arguments[3:]))))  # noqa: T201
