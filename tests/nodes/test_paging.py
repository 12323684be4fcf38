"""A node with room for some of its weights computes what one with all of them does, to the last bit."""

import contextlib
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from dairllm.engine.executor import Executor
from dairllm.engine.paging import PagingSettings, Way, paging_needs
from dairllm.engine.program import Program
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import build_graph
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType
from dairllm.net.compute import Compute
from dairllm.nodes.local import LocalNode, default_sync

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
        needs = paging_needs(network, node, model, block_bytes=block_bytes)
        assert needs.block_bytes == block_bytes
    return needs.ring_blocks_min, needs.blocks_total


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large a part of these matrices as the usual pieces are of large ones."""
    for place in ("dairllm.engine.paging.PIECE_BYTES", "dairllm.nodes.prefetch.PIECE_BYTES", "dairllm.engine.paging_steps.STEP_BYTES"):
        monkeypatch.setattr(place, 2 * BLOCK)
    monkeypatch.setattr("dairllm.engine.paging.RING_BYTES", 6 * BLOCK)


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
        way: Way = ("map", "buffered", "direct")[number % 3]
        settings = PagingSettings(room, way=way, readers=1 + number % 2, block_bytes=BLOCK)
        async with opened(models[name], executor, settings, brief=(math.inf, 0.0)[number // 2 % 2]) as node:
            assert await answer(node) == expected, (room, way)
            assert node.paging is not None
            read.append(node.paging.bytes)
    assert read[0] > read[-1], "what stays is not read again"
    assert read[-1] == read[-2], "with room for all, each block is read once"
