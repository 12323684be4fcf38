"""A program: its life, and the rows and positions that it takes."""

import gc
import itertools
import os
import re
import weakref
from pathlib import Path

import pytest

from dairllm.engine import ops
from dairllm.engine.executor import Executor
from dairllm.engine.program import STACK_BYTES, Program, compile_program, memory_needs
from dairllm.engine.weights import WireWeights
from dairllm.errors import EngineError, GraphError, RemoteProtocolError
from dairllm.formats.random_model import small_spec
from dairllm.graph.build import build_graph
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType
from dairllm.kernels.instructions import Kind

NETWORK, NODES = build_graph(small_spec(Architecture.LLAMA, FloatType.Q40, seq_len=64), 2, FloatType.Q80, 8)


def compiled(n_threads: int = 1) -> tuple[Program, WireWeights]:
    weights = WireWeights(NODES[1])
    weights.allocate()
    return compile_program(NETWORK, NODES[1], weights, n_threads=n_threads), weights


def test_memory_goes_with_the_last_reference() -> None:
    """A worker that serves root after root must not wait for the collector of cycles: it may hold gigabytes."""
    gc.collect()
    gc.disable()
    try:
        program, weights = compiled()
        with Executor(1) as executor:
            executor.run(program, 0, program.n_segments, 0, 1)
        gone = [weakref.ref(x) for x in (program, weights, program._layout)]
        del program, weights
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("claimed", [False, True])
def test_what_any_thread_may_have_computed_is_read_behind_a_barrier(claimed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if claimed:
        monkeypatch.setattr(ops, "CLAIMED_BYTES", 0)
    kinds = [Kind(kind) for kind in compiled()[0].instructions[:, 0]]
    behind = {after for kind, after in itertools.pairwise(kinds) if kind == Kind.MATMUL_Q40}
    dealt_alike = {Kind.ROPE_NEIGHBOURS, Kind.SILU_MUL_PACK, Kind.TO_BLOCKS, Kind.COPY}
    assert behind == {Kind.MATMUL_Q40, *({Kind.BARRIER} if claimed else dealt_alike)}


def test_a_refused_graph_leaves_nothing() -> None:
    gc.collect()
    gc.disable()
    try:
        weights = WireWeights(NODES[1])
        weights.allocate()
        with pytest.raises(GraphError):
            compile_program(NETWORK, NODES[0], weights, n_threads=1)  # the root's ops have weights of their own
        gone = weakref.ref(weights)
        del weights
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_caches_are_in_small_pages() -> None:
    """Else the first position of each head would take two megabytes."""
    program, _ = compiled()
    address = program.values(0).ctypes.data
    regions = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    spans = {tuple(int(end, 16) for end in text.split(" ", 1)[0].split("-")): text for text in regions if text}
    (found,) = [text for (first, end), text in spans.items() if first <= address < end]
    assert re.search(r"^VmFlags:.* nh\b", found, re.MULTILINE)


def test_what_it_needs_is_known_before() -> None:
    program, _ = compiled()
    held = program._layout.nbytes + sum(t.nbytes for t in program._kept[1]._tables.values())
    needs = memory_needs(NETWORK, NODES[1], n_threads=program.n_threads)
    assert sum(needs) == held + program.scratch.nbytes + program.n_threads * STACK_BYTES


@pytest.mark.parametrize(
    ("first", "end", "position", "rows", "first_row"),
    [
        (0, 0, 0, 1, 0),
        (0, 99, 0, 1, 0),
        (-1, 1, 0, 1, 0),
        (0, 1, 0, 0, 0),
        (0, 1, 0, 9, 0),
        (0, 1, -1, 1, 0),
        (0, 1, 64, 1, 0),
        (0, 1, 60, 5, 0),
        (0, 1, 0, 4, 2),
    ],
)
def test_what_it_has_no_room_for_is_refused(first: int, end: int, position: int, rows: int, first_row: int) -> None:
    program, _ = compiled()
    with Executor(1) as executor:
        with pytest.raises(EngineError):
            executor.submit(program, first, end, position, rows, first_row)
        executor.run(program, 0, 1, 63, 1)  # and goes on


def test_an_executor_computes_one_thing_at_a_time_with_no_more_threads_than_the_program_has_room_for() -> None:
    program, _ = compiled()
    with Executor(1) as executor:
        executor.submit(program, 0, program.n_segments, 0, 8)
        with pytest.raises(EngineError, match="already computing"):
            executor.submit(program, 0, 1, 0, 1)
        executor.wait()
        with pytest.raises(EngineError, match="still computing"):
            executor.finish()
        executor.run(compiled(2)[0], 0, 1, 0, 1)
    with pytest.raises(EngineError, match="not running"):
        executor.submit(program, 0, 1, 0, 1)
    with Executor(2) as executor, pytest.raises(EngineError, match="a program for 1 threads at most on an executor of 2"):
        executor.run(program, 0, 1, 0, 1)


@pytest.mark.skipif(not 2 <= len(os.sched_getaffinity(0)) <= 8, reason="of many processors, or of one, threads are not kept off")
def test_threads_keep_off_the_processor_that_the_caller_computes_on() -> None:
    mine = os.sched_getaffinity(0)
    program, _ = compiled(2)
    try:
        with Executor(2) as executor:
            other = executor._threads.threads[1].native_id
            assert other is not None
            for here in sorted(mine)[:2]:
                os.sched_setaffinity(0, {here})
                executor.run(program, 0, program.n_segments, 0, 1)
                assert os.sched_getaffinity(other) == mine - {here}
                assert os.sched_getaffinity(0) == {here}
    finally:
        os.sched_setaffinity(0, mine)


def test_weights_that_nobody_announced_are_refused() -> None:
    weights = WireWeights(NODES[1])
    weights.allocate()
    unknown = ("block_matmul_x", 0, 0, 1), ("block_matmul_q", 9, 0, 1)
    beyond = ("block_norm_0", 0, 256, 1), ("block_norm_0", 0, 0, 257)
    for name, index, offset, nbytes in unknown + beyond:
        with pytest.raises(RemoteProtocolError):
            weights.into(name, index, offset, nbytes)
    assert len(weights.into("block_norm_0", 0, 4, 252)) == 252
    assert any(text.startswith("block_norm_0 of layer 0: 252 of 256 bytes") for text in weights.missing())
