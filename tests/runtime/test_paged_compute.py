"""A node with room for some of its weights computes what one with all of them does, to the last bit."""

import asyncio
import contextlib
import math
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.engine.weights import FileWeights
from dairllm.errors import EngineError, LimitError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import build_graph
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType
from dairllm.paging.mapping import BufferedMapping
from dairllm.paging.needs import IoMode, PagingSettings, weights_needs
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import LocalNode, default_sync
from tests.patience import until

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

DATA = Path(__file__).parent.parent / "data" / "dllama"
BLOCK = 4 << 10
PROMPT = [5, 1, 7, 3, 2, 9, 11, 4, 8, 6, 10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]  # more than a tile


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(2) as started:
        yield started


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each architecture and type of weights; matrices that are cut into pieces, and blocks that several tensors share."""
    folder = tmp_path_factory.mktemp("models")
    found = {name: DATA / f"{name}.m" for name in ("llama_q40", "llama_f32", "qwen3_q40", "qwen3_moe_q40")}
    for weight_type in (FloatType.Q40, FloatType.Q80, FloatType.F32):
        name = f"wide_{weight_type.name}"
        spec = small_spec(Architecture.LLAMA, weight_type, dim=256, hidden_dim=704, n_heads=8, n_kv_heads=2, n_layers=3, vocab_size=1000)
        found[name] = folder / f"{name}.m"
        write_random_model(found[name], spec)
    found["experts"] = folder / "experts.m"
    spec = small_spec(Architecture.QWEN3_MOE, FloatType.Q80, dim=128, n_experts=16, n_active_experts=4, moe_hidden_dim=96, n_layers=3)
    write_random_model(found["experts"], spec)
    return found


@contextlib.asynccontextmanager
async def opened(path: Path, executor: Executor, paging: PagingSettings | None, brief: float = math.inf) -> AsyncIterator[LocalNode]:
    compute: Compute[Program] = Compute(executor, brief)
    with ModelFile.open(path) as model:
        compute.open()
        node = LocalNode(model, compute, n_threads=executor.n_threads, paging=paging)
        try:
            await node.open()
            yield node
        finally:
            await node.close()
            compute.close()


async def answer(node: LocalNode) -> bytes:
    """The logits after a prompt, after its first part alone, and after each of some tokens that follow: the cycle is entered anywhere."""
    found = []
    await node.feed(PROMPT[:5], 0, logits=False)
    found.append(await node.feed(PROMPT[5:], 5, logits=True))
    for place in range(4):
        found[-1] = np.array(found[-1])
        found.append(await node.feed([int(found[-1].argmax())], len(PROMPT) + place, logits=True))
    await node.feed(PROMPT[:3], 0, logits=False)
    found[-1] = np.array(found[-1])
    found.append(await node.feed(PROMPT[3:4], 3, logits=True))
    return b"".join(np.array(logits).tobytes() for logits in found)


def needs_of(path: Path, block_bytes: int = BLOCK) -> tuple[int, int]:
    """(least room, room for all)."""
    with ModelFile.open(path) as model:
        network, (node,) = build_graph(model.spec, 1, default_sync(model.spec.weight_type), 256)
        needs = weights_needs(network, node, FileWeights(model), block_bytes=block_bytes)
        assert needs.block_bytes == block_bytes
    return needs.streaming_blocks_min, needs.blocks_total


def size_of(path: Path) -> int:
    return path.stat().st_size


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large a part of these matrices as the usual pieces are of large ones."""
    for place in ("dairllm.paging.needs.PIECE_BYTES", "dairllm.runtime.paged_compute.PIECE_BYTES", "dairllm.paging.schedule.UNIT_BYTES"):
        monkeypatch.setattr(place, 2 * BLOCK)
    monkeypatch.setattr("dairllm.paging.needs.STREAMING_BYTES", 6 * BLOCK)


NAMES = ("llama_q40", "llama_f32", "qwen3_q40", "qwen3_moe_q40", "wide_Q40", "wide_Q80", "wide_F32", "experts")


@pytest.mark.parametrize("name", NAMES)
async def test_paged_is_resident_in_every_room(name: str, models: dict[str, Path], executor: Executor) -> None:
    async with opened(models[name], executor, None) as node:
        expected = await answer(node)
        assert node.paging is None
    least, total = needs_of(models[name])
    assert least < total
    rooms = sorted(
        {least, least + 1, least + 3, (2 * least + total) // 3, (least + 2 * total) // 3, total - 2, total - 1, total, total + 9}
    )
    read = []
    for number, room in enumerate(room for room in rooms if room >= least):
        io_mode: IoMode = ("mmap", "buffered", "direct")[number % 3]
        settings = PagingSettings(room, io_mode=io_mode, readers=1 + number % 2, block_bytes=BLOCK)
        async with opened(models[name], executor, settings, brief=(math.inf, 0.0)[number // 2 % 2]) as node:
            assert await answer(node) == expected, (room, io_mode)
            assert node.paging is not None
            read.append(node.paging.metrics.bytes)
    assert read[0] > read[-1], "what stays is not read again"
    assert read[-1] == read[-2], "with room for all, each block is read once"


@pytest.mark.parametrize("name", ["wide_Q40", "experts"])
async def test_the_least_recently_used_may_go_as_well(name: str, models: dict[str, Path], executor: Executor) -> None:
    async with opened(models[name], executor, None) as node:
        expected = await answer(node)
    least, total = needs_of(models[name])
    for room in (least, (least + total) // 2, total):
        settings = PagingSettings(room, policy="lru", io_mode="buffered", readers=2, block_bytes=BLOCK)
        async with opened(models[name], executor, settings) as node:
            assert await answer(node) == expected, room


async def test_what_is_kept_is_not_read_again(models: dict[str, Path], executor: Executor) -> None:
    """A token reads the blocks that do not stay, each once, and one row of the embedding."""
    least, total = needs_of(models["wide_Q40"])
    for room in (least + 4, total // 2, total * 3 // 4):
        settings = PagingSettings(room, io_mode="buffered", readers=1, block_bytes=BLOCK)
        async with opened(models["wide_Q40"], executor, settings) as node:
            assert node.paging is not None
            for place in range(3):
                await node.feed([place], place, logits=True)
            before = node.paging.metrics.bytes
            for place in range(3, 13):
                await node.feed([place], place, logits=True)
            read = (node.paging.metrics.bytes - before) / 10
        streaming = min(6, room)
        again = total - (room - streaming)
        # blocks that two matrices share and that lie farther apart in the pass than the streaming buffer is long are read twice
        assert again * 0.9 * BLOCK <= read <= (again * 1.2 + 2) * BLOCK, (room, total)


async def test_threads_are_tried_without_a_changed_bit(models: dict[str, Path], executor: Executor) -> None:
    async def tokens(paging: PagingSettings | None) -> tuple[list[bytes], set[tuple[int, int]]]:
        found, configurations = [], set()
        async with opened(models["wide_Q40"], executor, paging) as node:
            await node.feed(PROMPT, 0, logits=False)
            for place in range(60):
                found.append(np.array(await node.feed([place], len(PROMPT) + place, logits=True)).tobytes())
                configurations.add((executor.n_threads, 0 if node.paging is None else node.paging.configuration.readers))
        return found, configurations

    want, _ = await tokens(None)
    with ModelFile.open(models["wide_Q40"]) as model:
        network, (own,) = build_graph(model.spec, 1, default_sync(model.spec.weight_type), 32)
        needs = weights_needs(network, own, FileWeights(model), block_bytes=BLOCK)
    got, configurations = await tokens(PagingSettings(needs.streaming_blocks_min + 8, "pinned", "mmap", None, BLOCK))
    assert got == want
    assert configurations == {(2, 1), (2, 2), (1, 1), (1, 2)}
    assert executor.n_threads == 2  # as it was found


async def test_less_room_than_a_step_needs_is_refused(models: dict[str, Path], executor: Executor) -> None:
    least, _ = needs_of(models["wide_Q40"])
    with pytest.raises(LimitError, match=rf"room for {least - 1} blocks of {BLOCK} bytes; .* needs {least} at least"):
        async with opened(models["wide_Q40"], executor, PagingSettings(least - 1, block_bytes=BLOCK)):
            pass


@pytest.fixture
def copy(models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(models["wide_Q40"], tmp_path / "model.m"))


@pytest.mark.parametrize("io_mode", ["mmap", "buffered", "direct"])
async def test_a_file_cut_short_fails_the_request_and_says_so(io_mode: IoMode, copy: Path, executor: Executor) -> None:
    least, _ = needs_of(copy)
    size = size_of(copy)
    async with opened(copy, executor, PagingSettings(least, io_mode=io_mode, readers=1, block_bytes=BLOCK)) as node:
        await node.feed([1], 0, logits=True)
        os.truncate(copy, size - 5 * BLOCK)
        for _ in range(2):
            with pytest.raises(EngineError, match=rf"model\.m had {size} bytes when it was opened and has {size - 5 * BLOCK} now"):
                await node.feed([1], 1, logits=True)


async def test_a_file_written_to_fails_the_request(copy: Path, executor: Executor) -> None:
    least, _ = needs_of(copy)
    async with opened(copy, executor, PagingSettings(least, io_mode="mmap", readers=1, block_bytes=BLOCK)) as node:
        await node.feed([1], 0, logits=True)
        with copy.open("r+b") as file:
            file.seek(-10, os.SEEK_END)
            file.write(b"changed")
        with pytest.raises(EngineError, match=r"model\.m has been written to since it was opened"):
            await node.feed([1], 1, logits=True)


async def test_a_file_put_in_its_place_before_it_is_opened_is_refused(copy: Path, executor: Executor) -> None:
    least, _ = needs_of(copy)
    compute: Compute[Program] = Compute(executor)
    with ModelFile.open(copy) as model:
        other = shutil.copy(copy, copy.with_name("other.m"))
        os.replace(other, copy)
        node = LocalNode(model, compute, n_threads=2, paging=PagingSettings(least, io_mode="mmap", readers=1, block_bytes=BLOCK))
        with pytest.raises(EngineError, match=r"model\.m has been replaced since it was opened"):
            await node.open()


async def test_a_file_replaced_while_it_is_used_changes_nothing(copy: Path, executor: Executor) -> None:
    """Whoever has it open reads the old one to the end."""
    least, _ = needs_of(copy)
    async with opened(copy, executor, PagingSettings(least, io_mode="buffered", readers=1, block_bytes=BLOCK)) as node:
        expected = await answer(node)
        write_random_model(copy.with_name("other.m"), small_spec(), seed=1)
        os.replace(copy.with_name("other.m"), copy)
        assert await answer(node) == expected


async def test_a_disk_that_fails_fails_the_request_and_the_next_one_may_succeed(
    copy: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    least, total = needs_of(copy)
    failing: list[int] = []
    load = BufferedMapping._load

    def broken(mapping: BufferedMapping, offset: int, nbytes: int) -> None:
        if failing and offset <= failing[0] * BLOCK < offset + nbytes:
            raise OSError(5, "Input/output error")
        load(mapping, offset, nbytes)

    monkeypatch.setattr(BufferedMapping, "_load", broken)
    for room in (least, (least + total) // 2, total):
        failing.clear()
        async with opened(copy, executor, None) as resident:
            expected = await answer(resident)
        async with opened(copy, executor, PagingSettings(room, io_mode="buffered", readers=2, block_bytes=BLOCK)) as node:
            failing.append(size_of(copy) // BLOCK - 8)  # of the classifier
            for _ in range(2):
                with pytest.raises(EngineError, match=r"model\.m, bytes \d+ to \d+ cannot be read: Input/output error"):
                    await node.feed([1], 0, logits=True)
            failing.clear()
            assert await answer(node) == expected


async def test_a_pass_that_is_cancelled_leaves_all_in_order(models: dict[str, Path], executor: Executor) -> None:
    least, _ = needs_of(models["wide_Q40"])
    async with opened(models["wide_Q40"], executor, None) as node:
        expected = await answer(node)
    settings = PagingSettings(least, io_mode="direct", readers=2, block_bytes=BLOCK)
    async with opened(models["wide_Q40"], executor, settings, brief=0.0) as node:
        for turns in range(0, 60, 4):
            task = asyncio.ensure_future(node.feed(PROMPT, 0, logits=True))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert await answer(node) == expected


async def test_an_opening_that_is_cancelled_gives_back_what_comes_after_all(models: dict[str, Path], executor: Executor) -> None:
    """A thread is at it, and goes on: file, readers and memory come when nobody waits for them any more."""

    def held() -> tuple[int, set[str]]:
        return len(os.listdir("/proc/self/fd")), {thread.name for thread in threading.enumerate() if thread.name.startswith("reader")}

    least, _ = needs_of(models["wide_Q40"])
    settings = PagingSettings(least, io_mode="direct", readers=2, block_bytes=BLOCK)
    compute: Compute[Program] = Compute(executor)
    with ModelFile.open(models["wide_Q40"]) as model:
        compute.open()
        before = held()
        for turns in range(6):
            opening = asyncio.ensure_future(LocalNode(model, compute, n_threads=2, paging=settings).open())
            for _ in range(turns):
                await asyncio.sleep(0)
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await opening
            await until(lambda: not any("prepare" in thread.name or thread.name == "drop" for thread in threading.enumerate()))
            await asyncio.sleep(0.01)  # what the thread has handed over
        await until(lambda: held() == before)
        compute.close()


async def test_only_experts_that_rows_are_routed_to_are_read(models: dict[str, Path], executor: Executor) -> None:
    """In the least room about what a row goes through; with more the others stay, then experts do."""
    with ModelFile.open(models["experts"]) as model:
        spec = model.spec
        tensors = [tensor for tensor in model.tensors if tensor.name in ("block_matmul_w1", "block_matmul_w2", "block_matmul_w3")]
    all_experts = sum(tensor.nbytes for tensor in tensors)
    of_experts = all_experts * spec.n_active_experts / spec.n_experts
    least, total = needs_of(models["experts"])
    others = total * BLOCK - all_experts
    read = []
    for room in (least, int(others + of_experts) // BLOCK, int(others + 2 * of_experts) // BLOCK, total):
        async with opened(models["experts"], executor, PagingSettings(room, io_mode="buffered", readers=2, block_bytes=BLOCK)) as node:
            assert node.paging is not None
            for place in range(3):
                await node.feed([place], place, logits=True)
            before = node.paging.metrics.bytes
            for place in range(3, 23):
                await node.feed([7 * place], place, logits=True)
            read.append((node.paging.metrics.bytes - before) / 20)
    assert 0 < read[0] <= 1.3 * (others + of_experts)
    assert read[1] <= 1.3 * of_experts  # neighbouring experts share blocks: each is read with a block more than it fills
    assert read == sorted(read, reverse=True)
    assert read[3] < 0.5 * read[1]
