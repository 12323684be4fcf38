"""Several sets of KV caches for one program: the same bits whichever is used, and none touches another."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dairllm import machine
from dairllm.engine.executor import Executor
from dairllm.engine.program import Program, compile_program
from dairllm.engine.weights import FileWeights
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import LOGITS_PIPE, TOKEN_PIPE, build_graph
from dairllm.graph.types import FloatType

SEQ_LEN, BATCH = 200, 32
TEXTS = [[(7 * place + 3 * number) % 300 for place in range(150)] for number in range(3)]


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(2) as started:
        yield started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFile]:
    path = tmp_path_factory.mktemp("caches") / "m.m"
    write_random_model(
        path, small_spec(weight_type=FloatType.Q40, dim=128, n_heads=4, n_kv_heads=2, hidden_dim=256, n_layers=3, seq_len=SEQ_LEN)
    )
    with ModelFile.open(path) as opened:
        yield opened


def program(model: ModelFile, kind: FloatType) -> Program:
    network, (node,) = build_graph(model.spec, 1, FloatType.Q80, BATCH)
    return compile_program(network, node, FileWeights(model), n_threads=2, kv_cache=kind)


def feed(executor: Executor, program: Program, tokens: list[int], position: int) -> NDArray[np.float32]:
    """The logits after each batch of at most BATCH tokens."""
    found = []
    for first in range(0, len(tokens), BATCH):
        part = tokens[first : first + BATCH]
        program.values(TOKEN_PIPE)[: len(part), 0] = part
        executor.submit(program, 0, program.n_segments, position + first, len(part))
        executor.wait()
        found.append(program.values(LOGITS_PIPE)[len(part) - 1].copy())
    return np.array(found)


@pytest.mark.parametrize("kind", [FloatType.F32, FloatType.F16, FloatType.Q80])
def test_texts_in_turn_in_caches_of_their_own(model: ModelFile, executor: Executor, kind: FloatType) -> None:
    plain = program(model, kind)
    expected = [feed(executor, plain, text, 0) for text in TEXTS]
    shared = program(model, kind)
    caches = shared.keep_caches(3)
    found: list[list[NDArray[np.float32]]] = [[], [], []]
    for first in range(0, len(TEXTS[0]), BATCH):
        for number in (2, 0, 1):
            caches.use(number)
            found[number].append(feed(executor, shared, TEXTS[number][first : first + BATCH], first))
    for number in range(3):
        assert np.array_equal(np.concatenate(found[number]).view(np.int32), expected[number].view(np.int32))


@pytest.mark.parametrize("kind", [FloatType.F32, FloatType.F16, FloatType.Q80])
@pytest.mark.parametrize("count", [1, 63, 64, 96])
def test_a_copied_beginning_is_as_good_as_a_computed_one(model: ModelFile, executor: Executor, kind: FloatType, count: int) -> None:
    plain = program(model, kind)
    shared = program(model, kind)
    caches = shared.keep_caches(2)
    expected_of_first = feed(executor, shared, TEXTS[0], 0)[-1:]
    text = [*TEXTS[0][:count], *TEXTS[1][:32]]
    feed(executor, plain, text[:count], 0)
    expected = feed(executor, plain, text[count:], count)
    caches.use(1)
    feed(executor, shared, TEXTS[2], 0)  # what is behind the copy is another text
    assert len(list(caches.copy(0, 1, count))) == 6, "a piece for K and V of each layer"
    assert np.array_equal(feed(executor, shared, text[count:], count).view(np.int32), expected.view(np.int32))
    caches.use(0)
    last = len(TEXTS[0]) - 1
    again = feed(executor, shared, TEXTS[0][last:], last)
    assert np.array_equal(again.view(np.int32), expected_of_first.view(np.int32)), "what was copied is still there"
    caches.use(1)
    for _ in caches.copy(1, 0, count):
        pass
    caches.use(0)
    assert np.array_equal(feed(executor, shared, text[count:], count).view(np.int32), expected.view(np.int32)), "and back"


def test_a_copy_goes_in_pieces(model: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dairllm.engine.kv_caches._COPY_BYTES", 32 * 4 * 10)
    caches = program(model, FloatType.F32).keep_caches(2)
    assert len(list(caches.copy(0, 1, 25))) == 6 * (2 * 2 + 1)


def test_memory_is_taken_when_a_cache_is_used(tmp_path: Path, executor: Executor) -> None:
    path = tmp_path / "m.m"
    write_random_model(path, small_spec(dim=512, n_heads=8, n_kv_heads=8, hidden_dim=64, n_layers=4, seq_len=8192))
    with ModelFile.open(path) as model:
        network, (node,) = build_graph(model.spec, 1, FloatType.F32, BATCH)
        made = compile_program(network, node, FileWeights(model), n_threads=2)
        before = machine.rss_bytes()
        caches = made.keep_caches(8)
        for number in range(8):
            caches.use(number)
        assert machine.rss_bytes() < before + (8 << 20), "of 1 GiB"
