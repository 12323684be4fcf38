"""The parts of paging by themselves: mappings, room, blocks that come and go, pieces of matrices."""

import ctypes
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dairllm.engine.area import Area
from dairllm.engine.pieces import matmul_pieces
from dairllm.engine.weights import FileWeights, WeightView
from dairllm.errors import EngineError, LimitError
from dairllm.formats.file_stamp import FileStamp
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import build_graph
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType, MatmulConfig, Op, OpCode, Pointer, PointerSource, PointerType, Size
from dairllm.paging.mapping import MAPPINGS, BufferedMapping, FileMapping, open_mapping
from dairllm.paging.needs import PagingNeeds, PagingSettings, Policy, weights_needs
from dairllm.paging.pager import Pager
from dairllm.paging.policy import Division, divide, spread
from dairllm.paging.read_mode import probe_read_mode
from dairllm.paging.schedule import Block, ScheduleUnit, blocks_of
from tests.patience import PATIENCE

BLOCK = 4096
HUGE = 2 << 20

AREA = Area("weight", 0, 1 << 40)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine blocks and some bytes."""
    path = tmp_path_factory.mktemp("mapping") / "file"
    path.write_bytes(np.random.default_rng(1).bytes(9 * HUGE + 1234))
    return path


@pytest.fixture(params=MAPPINGS)
def mapping(request: pytest.FixtureRequest, file: Path) -> Iterator[FileMapping]:
    mapping = open_mapping(request.param, file, FileStamp.of(file), HUGE)
    yield mapping
    mapping.close()


def in_memory(mapping: FileMapping, block: Block) -> int:
    """Pages of a block that this process has mapped."""
    pages = -(-min(mapping.block_bytes, mapping.nbytes - block * mapping.block_bytes) // 4096)
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek((mapping.address + block * mapping.block_bytes) // 4096 * 8)
        entries = np.frombuffer(pagemap.read(8 * pages), np.uint64)
    return int((entries >> np.uint64(63)).sum())


def test_a_block_is_at_its_place_until_it_is_released(mapping: FileMapping, file: Path) -> None:
    expected = file.read_bytes()
    assert mapping.address % (HUGE) == 0
    for block, count in ((0, 1), (3, 2), (8, 2)):
        nbytes = mapping.load(block, count)
        begin = block * HUGE
        assert nbytes == min(count * HUGE, len(expected) - begin)
        assert ctypes.string_at(mapping.address + begin, nbytes) == expected[begin : begin + nbytes]
        assert in_memory(mapping, block) == HUGE // 4096
    for block, count in ((0, 1), (3, 2), (8, 2)):
        mapping.release(block, count)
    assert [in_memory(mapping, block) for block in range(10)] == [0] * 10


@pytest.mark.parametrize("io_mode", MAPPINGS)
def test_a_mapping_of_a_file_that_is_another_by_now(io_mode: str, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(file.read_bytes())
    stamp = FileStamp.of(path)
    mapping = open_mapping(io_mode, path, stamp, HUGE)
    path.write_bytes(b"short")
    with pytest.raises(EngineError, match=rf"had {9 * HUGE + 1234} bytes when it was opened and has 5 now"):
        mapping.load(4)
    mapping.close()
    with pytest.raises(EngineError, match="had"):
        open_mapping(io_mode, path, stamp, HUGE)
    path.unlink()
    with pytest.raises(EngineError, match=rf"file cannot be paged with the I/O mode {io_mode}: No such file"):
        open_mapping(io_mode, path, stamp, HUGE)
    with pytest.raises(EngineError, match="blocks of 5000 bytes; expected a power of two"):
        open_mapping(io_mode, file, FileStamp.of(file), 5000)


def test_the_io_mode_is_measured_or_as_it_was_set(file: Path) -> None:
    stamp = FileStamp.of(file)
    chosen = probe_read_mode(file, stamp, HUGE)
    assert chosen.io_mode in MAPPINGS
    assert chosen.readers in (1, 2)
    assert dict(chosen.rates).keys() == {(io_mode, readers) for io_mode in MAPPINGS for readers in (1, 2)}
    assert chosen.bytes_per_second == dict(chosen.rates)[chosen.io_mode, chosen.readers] > 0
    direct = probe_read_mode(file, stamp, HUGE, "direct")
    assert direct.io_mode == "direct"
    assert {io_mode for (io_mode, _), _ in direct.rates} == {"direct"}
    assert probe_read_mode(file, stamp, HUGE, "auto", 3).readers == 3
    fixed = probe_read_mode(file, stamp, HUGE, "buffered", 2)
    assert (fixed.io_mode, fixed.readers, fixed.rates, fixed.bytes_per_second) == ("buffered", 2, (), 0)


def test_an_io_mode_that_fails_is_not_taken(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(mapping: FileMapping, offset: int, nbytes: int) -> None:
        raise OSError(5, "Input/output error")

    for io_mode in ("mmap", "direct"):
        monkeypatch.setattr(MAPPINGS[io_mode], "_load", fails)
    assert probe_read_mode(file, FileStamp.of(file), HUGE).io_mode == "buffered"
    monkeypatch.setattr(BufferedMapping, "_load", fails)
    with pytest.raises(EngineError, match="bytes 0 to 2097152 cannot be read: Input/output error"):
        probe_read_mode(file, FileStamp.of(file), HUGE)


# ------------------------------------------------------------------------------------------------------------------------------- room
def needs(total: int, least: int = 3, best: int = 8) -> PagingNeeds:
    return PagingNeeds(total, min(least, total), min(best, total), BLOCK, 0)


def line(total: int) -> list[ScheduleUnit]:
    """Units of one block each."""
    return [ScheduleUnit(number, number + 1, (number,)) for number in range(total)]


@pytest.mark.parametrize("policy", ["pinned", "lru"])
def test_room_is_divided_and_never_exceeded(policy: Policy) -> None:
    for total in (4, 9, 40):
        for room in range(3, total + 3):
            division = divide(line(total), needs(total), PagingSettings(room, policy=policy))
            assert len(division.pinned) + division.streaming <= room
            assert len(division.pinned) + division.streaming == min(room, total) or division.streaming >= 3
            assert division.lookahead <= division.streaming
            assert len(division.pinned) == total or division.lookahead >= min(3, total)
    assert divide(line(40), needs(40), PagingSettings(30, policy="pinned")).streaming == 8
    assert not divide(line(40), needs(40), PagingSettings(30, policy="lru")).pinned
    with pytest.raises(LimitError, match="room for 2 blocks of 4096 bytes; paging this model needs 3 at least"):
        divide(line(40), needs(40), PagingSettings(2, policy=policy))


@pytest.mark.parametrize("count", [0, 1, 7, 20, 39, 40, 50])
def test_what_stays_is_spread_evenly(count: int) -> None:
    pinned = spread(range(40), count)
    assert len(pinned) == min(count, 40)
    for part in (10, 20):
        numbers = [len(pinned & set(range(begin, begin + part))) for begin in range(0, 40, part)]
        assert max(numbers) - min(numbers) <= 1


# ------------------------------------------------------------------------------------------------------------------------ coming and going
class Recording(FileMapping):
    """Keeps count of what is in memory, and takes its time at random."""

    io_mode = "recording"

    def __init__(self, total: int, seed: int) -> None:
        self.block_bytes, self.nbytes, self.path = BLOCK, total * BLOCK, Path("recorded")
        self.held: set[Block] = set()
        self.most, self.loads = 0, 0
        self._random, self._lock = random.Random(seed), threading.Lock()  # noqa: S311  # not for secrets

    def load(self, block: Block, count: int = 1) -> int:
        with self._lock:
            blocks = set(range(block, block + count))
            assert not blocks & self.held, "loaded twice"
            self.held |= blocks
            self.most, self.loads = max(self.most, len(self.held)), self.loads + count
            pause = self._random.random() * 1e-4
        time.sleep(pause)
        return count * BLOCK

    def _load(self, offset: int, nbytes: int) -> None:
        raise AssertionError("nothing is read")

    def release(self, block: Block, count: int = 1) -> None:
        with self._lock:
            pause = self._random.random() * 1e-4
        time.sleep(pause)
        with self._lock:
            blocks = set(range(block, block + count))
            assert blocks <= self.held, "released what was not there"
            self.held -= blocks


def come(pager: Pager, unit: int) -> None:
    """Wait for a unit's blocks as the event loop does."""
    event = threading.Event()
    needed = pager.needed(unit)
    pager.look_ahead(unit)
    while pager.blocks.missing(needed, event.set):
        if not all(pager.blocks.asked(block) for block in needed):
            pager.look_ahead(unit)
        assert event.wait(PATIENCE), "nothing comes"
        event.clear()


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("pinned", [0, 15, 40])
@pytest.mark.parametrize("streaming", [4, 9])
def test_blocks_are_there_when_their_step_comes_wherever_the_pass_goes(readers: int, pinned: int, streaming: int) -> None:
    """In order for two passes, then with jumps; never more blocks than room, never one twice, and none is lost."""
    dice = random.Random(readers + pinned + streaming)  # noqa: S311  # not for secrets
    units = [ScheduleUnit(n, n + 1, tuple(dict.fromkeys([2 * n % 40, (2 * n + 1) % 40, 7 * n % 40]))) for n in range(20)]
    stay = spread(range(40), pinned)
    mapping = Recording(40, readers)
    pager = Pager(mapping, units, Division(stay, 0 if pinned == 40 else streaming, streaming), readers)
    try:
        for number in [*range(20), *range(20), *(dice.randrange(20) for _ in range(150))]:
            come(pager, number)
            assert set(units[number].blocks) <= mapping.held
            pager.blocks.used(units[number].blocks)
    finally:
        pager.close()
    assert mapping.most <= pinned + streaming
    assert pager.blocks.metrics.bytes == mapping.loads * BLOCK


def test_a_pass_reads_what_does_not_stay_once() -> None:
    mapping = Recording(40, 0)
    pager = Pager(mapping, line(40), Division(spread(range(40), 25), 5, 5), 2)
    try:
        for number in [*range(40)] * 3:
            come(pager, number)
    finally:
        pager.close()
    assert 25 + 3 * 15 <= mapping.loads <= 25 + 3 * 15 + 5  # the last ones are of the pass that would come


# ------------------------------------------------------------------------------------------------------------------------------- pieces
def matmul(rows: int, experts: int = 0) -> Op:
    pointer = Pointer(PointerSource.BUFFER, 0, PointerType.BATCH)
    size = Size(FloatType.Q40, max(experts, 1), 64, rows)
    return Op(OpCode.MATMUL, "block_matmul_q", 0, pointer, pointer, size, MatmulConfig(experts, min(experts, 2), 0))


@pytest.mark.parametrize("rows", [8, 31, 32, 33, 64, 100, 512, 1001])
@pytest.mark.parametrize("stride", [36, 72])
def test_pieces_are_all_rows_in_order(rows: int, stride: int) -> None:
    """36 bytes a row; with a larger stride, columns of a larger matrix."""
    for piece_bytes in (None, 1, 36 * 40, 36 * 100, 1 << 20):
        pieces = matmul_pieces(matmul(rows), WeightView(AREA, stride, 0, 5000), piece_bytes)
        assert [piece.first for piece in pieces] == [sum(piece.count for piece in pieces[:k]) for k in range(len(pieces))]
        assert sum(piece.count for piece in pieces) == rows
        for piece in pieces:
            assert piece.spans == ((5000 + piece.first * stride, (piece.count - 1) * stride + 36),)
            assert piece.first % 32 == 0
            assert piece_bytes is None or piece.count <= max(32, piece_bytes // stride)


def test_weights_in_memory_have_no_spans_and_experts_one_each() -> None:
    assert [(piece.count, piece.spans) for piece in matmul_pieces(matmul(500), WeightView(AREA, 36, 0), 1)] == [(500, ())]
    (piece,) = matmul_pieces(matmul(10, experts=3), WeightView(AREA, 36, 1000, 200), 1)
    assert piece.experts
    assert piece.spans == ((200, 360), (1200, 360), (2200, 360))


def test_blocks_of_spans() -> None:
    assert blocks_of([(4095, 1), (4096, 1), (4095, 2), (12288, 8192)], 4096) == (0, 1, 3, 4)
    assert blocks_of([(100, 0)], 4096) == ()


@pytest.mark.parametrize("arch", [Architecture.LLAMA, Architecture.QWEN3_MOE])
def test_needs_are_the_blocks_of_all_matrices(arch: Architecture, tmp_path: Path) -> None:
    write_random_model(tmp_path / "m.m", small_spec(arch, dim=128))
    with ModelFile.open(tmp_path / "m.m") as model:
        network, (node,) = build_graph(model.spec, 1, FloatType.Q80, 32)
        found = weights_needs(network, node, FileWeights(model), block_bytes=BLOCK)
        spans = [(tensor.offset, tensor.nbytes) for tensor in model.tensors if "matmul" in tensor.name or "gate" in tensor.name]
        assert found.blocks_total == len(blocks_of(spans, BLOCK))
        assert 1 < found.streaming_blocks_min <= found.streaming_blocks_best <= found.blocks_total
        layers = model.spec.n_layers if arch is Architecture.QWEN3_MOE else 0
        assert found.active_blocks == layers * (found.streaming_blocks_min - 1), "a row's experts of a layer are what the least room is for"
        others = found.blocks_total - found.expert_blocks
        assert found.missing(0) == others + found.active_blocks
        assert found.missing(found.blocks_total) == (found.active_blocks if layers else min(others, found.streaming_blocks_best))
        norms = sum(-(-tensor.nbytes // 64) * 64 for tensor in model.tensors if "norm" in tensor.name)
        assert found.copied_bytes == norms + 32 * 8192, "and for each row of a batch a row of the embedding, on two pages"
        views = FileWeights(model)
        assert all(views.view(op).offset is not None for segment in node.segments for op in segment.ops if op.weight_size.length)
