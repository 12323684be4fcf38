"""The block cache, one call at a time: whatever is asked for, read, evicted or fails, what it knows fits together and to memory."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dairllm.errors import EngineError
from dairllm.paging.block_cache import BlockCache
from dairllm.paging.mapping import FileMapping

BLOCKS = 12


class Memory:
    """A file mapping without a file: it knows which blocks are in memory."""

    path, block_bytes = Path("a file"), 1 << 20

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.fails = False

    def load(self, first: int, count: int) -> int:
        blocks = set(range(first, first + count))
        assert not blocks & self.held, "in memory already"
        if self.fails:
            raise EngineError("a file cannot be read")
        self.held |= blocks
        return count * self.block_bytes

    def release(self, first: int, count: int) -> None:
        blocks = set(range(first, first + count))
        assert blocks <= self.held, "not in memory"
        self.held -= blocks


class OneByOne:
    """Readers that read when they are told to."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], None]] = deque()

    def submit(self, work: Iterable[Callable[[], None]], *, urgent: bool = False) -> None:
        self.waiting.extendleft(reversed(list(work))) if urgent else self.waiting.extend(work)

    def close(self) -> None:
        self.waiting.clear()


class Cache(RuleBasedStateMachine):
    @initialize(pinned=st.frozensets(st.integers(0, BLOCKS - 1), max_size=5), streaming=st.integers(1, 6), newest_first=st.booleans())
    def begin(self, pinned: frozenset[int], streaming: int, newest_first: bool) -> None:
        self.memory, self.readers = Memory(), OneByOne()
        order = (lambda blocks: list(blocks)[::-1]) if newest_first else None
        self.cache = BlockCache(cast(FileMapping, self.memory), pinned, streaming, 0, order)
        self.cache._readers = cast(Any, self.readers)
        self.streaming, self.told = streaming, 0

    @rule(
        blocks=st.lists(st.integers(0, BLOCKS - 1), unique=True), protected=st.frozensets(st.integers(0, BLOCKS - 1)), urgent=st.booleans()
    )
    def ask(self, blocks: list[int], protected: frozenset[int], urgent: bool) -> None:
        missing = [block for block in blocks if not self.cache.asked(block)]
        ready = [block for block in protected if self.cache.all_ready([block])]
        self.cache.ask(missing, protected | set(blocks), urgent=urgent)
        assert self.cache.all_ready(ready), "what is protected stays"

    @precondition(lambda self: self.readers.waiting)
    @rule(fails=st.sampled_from([False, False, False, True]))
    def read(self, fails: bool) -> None:
        self.memory.fails = fails
        self.readers.waiting.popleft()()

    @rule(blocks=st.lists(st.integers(0, BLOCKS - 1), unique=True))
    def use(self, blocks: Sequence[int]) -> None:
        self.cache.used(block for block in blocks if self.cache.all_ready([block]))

    @rule(blocks=st.frozensets(st.integers(0, BLOCKS - 1), min_size=1))
    def wait(self, blocks: frozenset[int]) -> None:
        def told() -> None:
            self.told += 1

        if self.cache._failed.keys() & blocks:
            with pytest.raises(EngineError, match=r"^a file cannot be read$"):
                self.cache.missing(blocks, told)
        else:
            assert self.cache.missing(blocks, told) == sum(not self.cache.all_ready([block]) for block in blocks)

    @invariant()
    def fits(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        assert self.cache._ready <= self.memory.held
        assert len(self.memory.held - self.cache.pinned) <= self.streaming
        if not self.readers.waiting:
            assert len(self.memory.held - self.cache.pinned) == self.cache._occupied, "at rest, each place holds a block"


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_cache_that_contradicts_itself_says_how() -> None:
    cache = BlockCache(cast(FileMapping, Memory()), frozenset({1}), 2, 0)
    cache._ready.add(3)
    with pytest.raises(
        EngineError, match=r"^the block cache contradicts itself; it should be that what is ready was asked for; that what "
    ):
        cache.check()
    cache.close()
