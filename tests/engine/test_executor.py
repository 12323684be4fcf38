"""Compute threads that end, or do not come back: the call fails with the reason, the next one computes, and no wait is for ever."""

import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from dairllm.engine import executor as executor_module
from dairllm.engine.executor import Executor
from dairllm.engine.program import Program, compile_program
from dairllm.engine.weights import WireWeights
from dairllm.errors import EngineError
from dairllm.formats.random_model import small_spec
from dairllm.graph.build import TOKEN_PIPE, build_graph
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType
from dairllm.kernels.instructions import CLAIMS
from tests.engine.faulty_threads import RAISED, FaultyThreads
from tests.patience import PATIENCE, comes

NETWORK, (NODE,) = build_graph(small_spec(Architecture.LLAMA, FloatType.Q40, seq_len=64), 1, FloatType.Q80, 8)


@pytest.fixture
def program() -> Program:
    weights = WireWeights(NODE)
    weights.allocate()
    weights._memory[:] = np.random.default_rng(0).integers(0, 60, len(weights._memory), np.uint8)
    made = compile_program(NETWORK, NODE, weights, n_threads=3)
    made.values(TOKEN_PIPE)[:] = 7
    return made


class Faults:
    """Which thread is to have which fault at the next call: once."""

    def __init__(self) -> None:
        self.next: dict[int, str] = {}
        self.threads = FaultyThreads(lambda thread: self.next.pop(thread, None))


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    made = Faults()
    monkeypatch.setattr(executor_module, "load_entry", lambda: made.threads.entry)
    yield made
    made.threads.released.set()


def compute(executor: Executor, program: Program, how: str) -> bytes:
    """The memory of all pipes and buffers after the whole graph, for 5 rows."""
    if how == "run":
        executor.run(program, 0, program.n_segments, 0, 5)
    else:
        executor.submit(program, 0, program.n_segments, 0, 5)
        executor.wait(PATIENCE)
    memory = program._layout._memory
    assert memory is not None
    return memory.tobytes()


def compute_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "compute-" in thread.name]


def let_go(faults: Faults, eventfd: int) -> None:
    """Of what an executor has given up."""
    faults.threads.released.set()
    for thread in compute_threads():
        if thread.name.startswith("abandoned "):
            thread.join(PATIENCE)
    os.close(eventfd)


@pytest.mark.parametrize("how", ["run", "submit"])
@pytest.mark.parametrize(
    ("n_threads", "number", "fault"),
    [(1, 0, "raise"), (2, 0, "raise"), (2, 1, "raise"), (3, 1, "raise"), (3, 2, "leave"), (3, 0, "raise")],
)
def test_a_thread_that_ends_fails_the_call_and_no_other(
    how: str, n_threads: int, number: int, fault: str, faults: Faults, program: Program
) -> None:
    others = len(compute_threads())
    with Executor(n_threads) as executor:
        want = compute(executor, program, how)
        for _ in range(2):
            faults.next[number] = fault
            with pytest.raises(EngineError, match=f"computation failed: .*({RAISED}|it returned)"):
                compute(executor, program, how)
            assert not executor.busy
            assert not program.barrier.any()
            assert not program.instructions[:, CLAIMS].any()
            assert compute(executor, program, how) == want  # the threads meet at barriers again
            assert len(compute_threads()) == others + n_threads
    assert len(compute_threads()) == others


def test_threads_that_end_between_two_calls_are_started_anew(faults: Faults, program: Program) -> None:
    with Executor(3) as executor:
        want = compute(executor, program, "run")
        ended = executor._threads
        assert ended is not None
        ended.others.stop()  # as whatever ends them would leave them
        for thread in ended.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert ended.failure == "compute thread 1 ended: it returned" or ended.failure == "compute thread 2 ended: it returned"
        assert compute(executor, program, "submit") == want


def test_more_threads_than_there_are_is_an_error_that_ends(faults: Faults, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = threading.Thread.start, [1]

    def start(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        real(thread)

    with Executor(2) as executor:
        want = compute(executor, program, "run")
        faults.next[1] = "raise"
        with pytest.raises(EngineError, match=RAISED):
            compute(executor, program, "run")
        monkeypatch.setattr(threading.Thread, "start", start)
        for _ in range(2):
            with pytest.raises(EngineError, match=r"compute thread . of 2 cannot be started: can't start new thread"):
                compute(executor, program, "run")
        monkeypatch.undo()
        assert compute(executor, program, "run") == want


def test_what_is_broken_off_is_left_and_says_why(faults: Faults, program: Program) -> None:
    with Executor(3) as executor:
        want = compute(executor, program, "submit")
        faults.next[2] = "hang"
        executor.submit(program, 0, program.n_segments, 0, 5)
        assert comes(lambda: not faults.next)
        executor.break_off("nobody wants it")
        assert executor.busy  # until the last has left
        faults.threads.released.set()
        with pytest.raises(EngineError, match="computation failed: nobody wants it"):
            executor.wait(PATIENCE)
        executor.break_off("there is nothing to break off")
        assert compute(executor, program, "submit") == want


def test_threads_that_do_not_come_back_are_given_up(faults: Faults, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "LEAVING_SECONDS", 0.1)
    with Executor(2) as executor:
        faults.next[1] = "hang"
        executor.submit(program, 0, program.n_segments, 0, 5)
        assert comes(lambda: not faults.next)
        eventfd = executor.eventfd
        with pytest.raises(EngineError, match="compute threads have not left within 0s: it has not ended within 100ms"):
            executor.wait(0.1)
        assert executor.stuck is not None
        with pytest.raises(EngineError, match="have not left"):
            compute(executor, program, "run")
    assert executor.eventfd < 0
    os.eventfd_write(eventfd, 1)  # it is open: they may still write there
    assert any(thread.name.startswith("abandoned ") for thread in compute_threads())
    let_go(faults, eventfd)


def test_closing_ends_though_a_thread_does_not(faults: Faults, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "LEAVING_SECONDS", 0.1)
    executor = Executor(2).start()
    faults.next[0] = "hang"
    executor.submit(program, 0, program.n_segments, 0, 5)
    assert comes(lambda: not faults.next)
    eventfd, begun = executor.eventfd, time.monotonic()
    executor.close(0.1)
    assert time.monotonic() - begun < PATIENCE
    assert executor.stuck is not None
    let_go(faults, eventfd)


def test_a_guest_does_not_wait_for_ever(faults: Faults, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes in the place of thread 0, so that nothing but another thread can tell it to leave."""
    with Executor(2) as executor:
        want = compute(executor, program, "run")
    monkeypatch.setattr(executor_module, "LONGEST_CALL", 2.0)
    monkeypatch.setattr(executor_module, "LEAVING_SECONDS", 0.1)
    with Executor(2) as executor:
        for _ in range(3):
            assert compute(executor, program, "run") == want
        faults.next[1] = "hang"
        eventfd = executor.eventfd
        with pytest.raises(EngineError, match=r"have not left within .*: it has not ended within 2s"):
            compute(executor, program, "run")
    let_go(faults, eventfd)
