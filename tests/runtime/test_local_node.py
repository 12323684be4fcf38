"""One node against the C++ program's recorded ids and logits."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.errors import EngineError, GraphError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.model import Architecture, HiddenAct
from dairllm.graph.types import FloatType
from dairllm.runtime.compute import BRIEF_SECONDS, Compute
from dairllm.runtime.local_node import LocalNode
from dairllm.runtime.node_status import NodeStatus
from dairllm.serving.generation import Generation
from dairllm.serving.sampler import Sampler

DATA = Path(__file__).parent.parent / "data" / "dllama"
GOLDEN = json.loads((DATA / "golden.json").read_text())["models"]
NEAR_TIE = 0.15


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(2) as started:
        yield started


@contextlib.asynccontextmanager
async def opened(path: Path, executor: Executor, *, sync: FloatType | None = None, brief: float = math.inf) -> AsyncIterator[LocalNode]:
    compute: Compute[Program] = Compute(executor, brief)
    with ModelFile.open(path) as model:
        compute.open()
        node = LocalNode(model, compute, n_threads=executor.n_threads, sync=sync)
        await node.open()
        try:
            yield node
        finally:
            await node.close()
            compute.close()


async def fed(node: LocalNode, tokens: list[int], position: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A copy of the logits after the last of them."""
    logits = await node.feed(tokens, position, logits=True)
    assert logits is not None
    return logits.copy()


@pytest.mark.parametrize("brief", [math.inf, BRIEF_SECONDS, 0.0], ids=["here", "either", "beside"])
@pytest.mark.parametrize("name", GOLDEN)
async def test_logits_and_ids_are_the_cpp_programs(name: str, brief: float, executor: Executor) -> None:
    """Fed the golden ids, logits within 3 % at every position (F32: 0.01 %), and the same greedy id up to a near tie."""
    prompt, ids = GOLDEN[name]["prompt_ids"], GOLDEN[name]["generated_ids_1_node"]
    expected = np.load(DATA / f"{name}.logits-1-node.npy")
    async with opened(DATA / f"{name}.m", executor, brief=brief) as node:
        found = [await fed(node, prompt)]
        for place, token in enumerate(ids[:-1]):
            found.append(await fed(node, [token], len(prompt) + place))
    error = np.linalg.norm(np.array(found) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < (0.0001 if name == "llama_f32" else 0.03)
    for logits, token in zip(found, ids, strict=True):
        assert int(logits.argmax()) == token or logits.max() - logits[token] < NEAR_TIE


async def test_generation_gives_the_golden_ids(executor: Executor) -> None:
    golden = GOLDEN["llama_f32"]
    async with opened(DATA / "llama_f32.m", executor) as node:
        generation = Generation(node, Sampler(0.0, 1.0, 0), golden["prompt_ids"], 26)
        assert [token async for token in generation.run()] == golden["generated_ids_1_node"]
        again = Generation(node, Sampler(0.0, 1.0, 0), golden["prompt_ids"], 26, held=len(golden["prompt_ids"]) - 2)
        assert [token async for token in again.run()] == golden["generated_ids_1_node"], "what it holds need not be fed"
        assert node.nodes == (NodeStatus(0, "", "dairllm", 4, 2, 128),)


async def test_a_prompt_longer_than_a_batch_is_the_same_in_pieces(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_model(tmp_path / "m.m", small_spec(seq_len=512))
    tokens = [(5 * i) % 320 for i in range(300)]
    results: list[bytes] = []
    for rows in (256, 40):
        monkeypatch.setattr("dairllm.runtime.local_node.PROMPT_ROWS", rows)
        async with opened(tmp_path / "m.m", executor) as node:
            assert node.n_batches == rows
            generation = Generation(node, Sampler(), tokens, 1, on_logits=lambda logits: results.append(logits.tobytes()))
            async for _ in generation.run():
                pass
    assert len(results) == 2
    assert results[0] == results[1]


async def test_what_asks_for_no_logits_gets_none(executor: Executor) -> None:
    async with opened(DATA / "llama_f32.m", executor) as node:
        for tokens in ([1], [1, 2, 3]):
            assert await node.feed(tokens, 0, logits=False) is None
        after = await fed(node, [4], 3)
        assert after.tobytes() == (await fed(node, [1, 2, 3, 4])).tobytes()


async def test_others_get_their_turn_between_passes(executor: Executor) -> None:
    """Even where all is computed on the loop's own thread."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with opened(DATA / "llama_f32.m", executor) as node:
        counting = asyncio.create_task(count())
        for position in range(20):
            await node.feed([1], position, logits=True)
        counting.cancel()
    assert turns >= 20


@pytest.mark.parametrize("tokens", [[], [320], [-1], [0] * 17])
async def test_tokens_that_cannot_be_are_refused(tokens: list[int], tmp_path: Path, executor: Executor) -> None:
    write_random_model(tmp_path / "m.m", small_spec(seq_len=16))
    async with opened(tmp_path / "m.m", executor) as node:
        with pytest.raises(EngineError, match=r"expected 1 to 16 tokens with ids in 0\.\.319"):
            await node.feed(tokens, 0, logits=True)
        assert (await fed(node, [1])).shape == (320,)


@pytest.mark.parametrize("position", [-1, 15, 16])
async def test_positions_that_there_are_not_are_refused(position: int, tmp_path: Path, executor: Executor) -> None:
    write_random_model(tmp_path / "m.m", small_spec(seq_len=16))
    async with opened(tmp_path / "m.m", executor) as node:
        with pytest.raises(EngineError, match="the context has room for 16"):
            await node.feed([1, 2], position, logits=True)


async def test_a_node_computes_from_open_to_close(executor: Executor) -> None:
    with ModelFile.open(DATA / "llama_f32.m") as model:
        node = LocalNode(model, Compute(executor), n_threads=2)
        with pytest.raises(EngineError, match="not open"):
            await node.feed([1], 0, logits=True)
        await node.close()  # of no effect
        async with opened(DATA / "llama_f32.m", executor) as node:
            await fed(node, [1])
        await node.close()
        with pytest.raises(EngineError, match="not open"):
            await node.feed([1], 0, logits=True)


async def test_what_cannot_be_computed_is_told_before_anything_is_compiled(tmp_path: Path) -> None:
    with ModelFile.open(DATA / "llama_q40.m") as model:
        idle: Compute[Program] = Compute(Executor(1))
        with pytest.raises(GraphError, match="partial sums cross the wire as F32 or Q80, not Q40"):
            LocalNode(model, idle, n_threads=1, sync=FloatType.Q40)


@pytest.mark.parametrize("sync", [FloatType.F32, FloatType.Q80])
@pytest.mark.parametrize("weights", [FloatType.F32, FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("arch", list(Architecture))
async def test_every_architecture_runs_with_every_type(
    arch: Architecture, weights: FloatType, sync: FloatType, tmp_path: Path, executor: Executor
) -> None:
    """Combinations that the C++ program refuses as well; what the sync rounds away changes the logits by a little."""
    write_random_model(tmp_path / "m.m", small_spec(arch, weights))
    tokens = list(range(40, 60))
    async with opened(tmp_path / "m.m", executor, sync=sync) as node:
        batch = await fed(node, tokens)
        for position, token in enumerate(tokens):
            single = await fed(node, [token], position)
        assert single.tobytes() == batch.tobytes()
    async with opened(tmp_path / "m.m", executor, sync=FloatType.F32) as node:
        exact = await fed(node, tokens)
        assert np.linalg.norm(batch - exact) < 0.1 * np.linalg.norm(exact)


async def test_gelu_is_used_where_the_model_says_so(tmp_path: Path, executor: Executor) -> None:
    results = []
    for act in HiddenAct:
        write_random_model(tmp_path / f"{act.name}.m", small_spec(hidden_act=act))
        async with opened(tmp_path / f"{act.name}.m", executor) as node:
            results.append(await fed(node, [1, 2, 3]))
    assert not np.allclose(results[0], results[1])
