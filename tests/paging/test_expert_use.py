"""Experts that are used often stay; what goes, goes whole; memory of small blocks."""

import ctypes
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from dairllm.engine import system
from dairllm.formats.file_stamp import FileStamp
from dairllm.paging.expert_use import ExpertUse
from dairllm.paging.mapping import FileMapping, open_mapping
from dairllm.paging.needs import PagingNeeds, PagingSettings, Policy
from dairllm.paging.pager import Pager
from dairllm.paging.policy import divide
from dairllm.paging.schedule import Block, ScheduleUnit
from dairllm.paging.slots import Slots
from tests.patience import PATIENCE

BLOCK = 64 << 10
LAYERS, EXPERTS, LONG = 4, 8, 3


class Counting(FileMapping):
    """Keeps count of what is read."""

    io_mode = "counting"

    def __init__(self) -> None:
        self.block_bytes, self.path = BLOCK, Path("counted")
        self.held: set[Block] = set()
        self.loads: list[tuple[Block, int]] = []
        self._lock = threading.Lock()

    def load(self, block: Block, count: int = 1) -> int:
        with self._lock:
            self.loads.append((block, count))
            self.held |= set(range(block, block + count))
        return count * BLOCK

    def _load(self, offset: int, nbytes: int) -> None:
        raise AssertionError("nothing is read")

    def release(self, block: Block, count: int = 1) -> None:
        with self._lock:
            self.held -= set(range(block, block + count))


def layers() -> list[ScheduleUnit]:
    """Of each layer a block that all rows read, and experts of three blocks, of which neighbours share one."""
    units = []
    for layer in range(LAYERS):
        base = layer * (2 * EXPERTS + 3)
        units.append(ScheduleUnit(2 * layer, 2 * layer + 1, (base,)))
        experts = tuple(tuple(range(base + 2 + 2 * expert, base + 2 + 2 * expert + LONG)) for expert in range(EXPERTS))
        units.append(ScheduleUnit(2 * layer + 1, 2 * layer + 2, (), experts, 0))
    return units


def read(policy: Policy, routing: list[list[set[int]]], room: int) -> list[int]:
    """Blocks read in each pass."""
    units, mapping = layers(), Counting()
    needs = PagingNeeds(LAYERS * (2 * EXPERTS + 2), 2 * LONG + 1, 2 * LONG + 1, BLOCK, 0)
    pager = Pager(mapping, units, divide(units, needs, PagingSettings(room, policy=policy)), 2)
    event, found = threading.Event(), []
    try:
        for chosen in routing:
            before = sum(count for _, count in mapping.loads)
            for number, unit in enumerate(units):
                experts = chosen[number // 2] if unit.experts else set()
                needed = pager.needed(number, experts)
                pager.look_ahead(number)
                pager.demand(number, experts)
                while pager.blocks.missing(needed, event.set):
                    assert event.wait(PATIENCE)
                    event.clear()
                assert set(needed) <= mapping.held
                assert len(mapping.held) <= room
                pager.computed(number, experts)
            found.append(sum(count for _, count in mapping.loads) - before)
    finally:
        pager.close()
    return found


def test_experts_that_are_used_often_stay() -> None:
    """Half of each pass' experts are always the same, the others any: there is room for the former and a few."""
    dice = random.Random(3)  # noqa: S311  # not for secrets
    routing = [[{0, 2 + dice.randrange(EXPERTS - 2)} for _ in range(LAYERS)] for _ in range(80)]
    room = LAYERS + LAYERS * LONG + 2 * LONG + 2
    often, longest_ago = (sum(read(policy, routing, room)[20:]) / 60 for policy in ("pinned", "lru"))
    assert often < 0.75 * longest_ago
    assert often <= 1.1 * LAYERS * LONG


@pytest.mark.parametrize("policy", ["pinned", "lru"])
def test_with_room_for_all_nothing_is_read_twice(policy: Policy) -> None:
    dice = random.Random(4)  # noqa: S311  # not for secrets
    routing = [[set(dice.sample(range(EXPERTS), 2)) for _ in range(LAYERS)] for _ in range(60)]
    total = LAYERS * (2 * EXPERTS + 2)
    assert sum(read(policy, routing, total + 1)) == total


def test_an_expert_is_worth_what_it_is_used() -> None:
    units = layers()
    use = ExpertUse(units)
    for turn in range(40):
        for number in range(1, 2 * LAYERS, 2):
            use.used(number, {0, 3} if turn % 2 else {0, 5})
    experts = units[1].experts
    order = use.order(dict.fromkeys(block for blocks in (*experts, units[0].blocks) for block in blocks))
    assert set(order[-3:]) == set(experts[0])
    assert set(order[-6:-3]) == set(experts[3])  # came last; one of its blocks is shared with 2, which nobody wants
    assert set(order[-9:-6]) == set(experts[5])
    assert use.order([*experts[3][:2], *experts[5]]) == [*experts[3][:2], *experts[5]], "a part of an expert is worth nothing"


# ------------------------------------------------------------------------------------------------------------------------------- slots
def test_slots_come_go_and_keep_what_is_written() -> None:
    """At random, against a model of it; what is given back is free for others, and addresses without memory read as zeros."""
    dice = random.Random(5)  # noqa: S311  # not for secrets
    blocks = 100
    address, *region = system.reserve(blocks * BLOCK)
    slots = Slots(BLOCK, 40)
    held: dict[int, int] = {}
    try:
        for turn in range(400):
            block, count = dice.randrange(blocks - 8), dice.randrange(1, 8)
            place = range(block, block + count)
            if not any(number in held for number in place) and len(held) + count <= 40:
                slots.bring(address + block * BLOCK, count)
                for number in place:
                    held[number] = turn % 255 + 1
                    ctypes.memset(address + number * BLOCK, held[number], BLOCK)
            elif all(number in held for number in place):
                slots.take_back(address + block * BLOCK, count)
                for number in place:
                    del held[number]
            elif held and dice.random() < 0.5:
                number = dice.choice(list(held))
                slots.take_back(address + number * BLOCK, 1)
                del held[number]
            for number, value in held.items():
                begin = address + number * BLOCK
                assert ctypes.string_at(begin, 1) == ctypes.string_at(begin + BLOCK - 1, 1) == bytes([value])
    finally:
        system.unmap(*region)
        slots.close()


def test_more_blocks_than_slots_lie_in_ordinary_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dairllm.paging.slots._MOST", 5)
    address, *region = system.reserve(20 * BLOCK)
    slots = Slots(BLOCK, 20)
    slots.bring(address, 12)
    ctypes.memset(address, 7, 12 * BLOCK)
    assert ctypes.string_at(address, 12 * BLOCK) == bytes([7]) * 12 * BLOCK
    slots.take_back(address, 12)
    slots.bring(address + 13 * BLOCK, 5)
    assert ctypes.string_at(address, 12 * BLOCK) == bytes(12 * BLOCK)
    system.unmap(*region)
    slots.close()


@pytest.mark.parametrize("io_mode", ["buffered", "direct"])
def test_small_blocks_take_no_more_mappings_than_they_are_apart(io_mode: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = np.random.default_rng(1).bytes(300 * BLOCK + 77)
    path.write_bytes(content)
    mapping = open_mapping(io_mode, path, FileStamp.of(path), BLOCK)
    dice = random.Random(6)  # noqa: S311  # not for secrets
    before = len(Path("/proc/self/maps").read_text().splitlines())
    held: list[Block] = []
    for _ in range(600):
        block = dice.randrange(0, 300, 3)
        if block in held:
            continue
        mapping.load(block, 3)
        held.append(block)
        begin = mapping.address + block * BLOCK
        assert ctypes.string_at(begin, 3 * BLOCK) == content[block * BLOCK : (block + 3) * BLOCK]
        if len(held) > 8:
            mapping.release(held.pop(dice.randrange(8)), 3)
    assert len(Path("/proc/self/maps").read_text().splitlines()) - before <= 4 * 3 * 8 + 8
    mapping.load(300)
    assert ctypes.string_at(mapping.address + 300 * BLOCK, 77) == content[-77:]
    mapping.close()
