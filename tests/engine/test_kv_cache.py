"""KV caches of F16 and of Q80: whole graphs with the bits of the definition, half or a quarter of the memory, logits close to F32's."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dairllm.engine.executor import Executor
from dairllm.engine.memory import Layout
from dairllm.engine.program import STACK_BYTES, compile_program, memory_needs
from dairllm.engine.weights import FileWeights, WireWeights
from dairllm.errors import GraphError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import build_graph
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType
from tests.engine.engine_cluster import EngineCluster
from tests.engine.oracle import OracleCluster, file_weights
from tests.kernels import exact

DATA = Path(__file__).parents[1] / "data" / "dllama"
GOLDEN = json.loads((DATA / "golden.json").read_text())
F32, F16, Q40, Q80 = FloatType.F32, FloatType.F16, FloatType.Q40, FloatType.Q80
FIXTURES = ["qwen3_q40", "qwen3_moe_q40"]
"""Those whose heads are whole blocks."""


@pytest.fixture(scope="module")
def executors() -> Iterator[dict[int, Executor]]:
    """Of 1, 2 and 3 threads."""
    started = {n: Executor(n).start() for n in (1, 2, 3)}
    yield started
    for executor in started.values():
        executor.close()


def assert_same_rows(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.flatnonzero((got.view(np.int32) != want.view(np.int32)).any(1)).tolist() == []


def check(
    path: Path, tokens: list[int], executors: dict[int, Executor], n_nodes: int, runs: list[tuple[int, int]], kind: FloatType
) -> None:
    """All rows of a text, for each (threads, rows of a batch)."""
    with ModelFile.open(path) as model:
        network, nodes = build_graph(model.spec, n_nodes, F32 if model.spec.weight_type == F32 else Q80)
        weights = file_weights(model, n_nodes)
        want = OracleCluster(network, nodes, weights, exact, kind).feed(tokens, batch=network.n_batches)
        plain = OracleCluster(network, nodes, weights, exact).feed(tokens, batch=network.n_batches)
        assert (want[1:] != plain[1:]).any(1).all()  # it is not the F32 cache that was compared
        for threads, batch in runs:
            assert_same_rows(EngineCluster(network, nodes, weights, executors[threads], kind).feed(tokens, batch), want)


@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize(("name", "kind"), [("qwen3_q40", Q80), ("qwen3_moe_q40", Q80), ("llama_f32", F16), ("qwen3_moe_q40", F16)])
def test_golden_models_have_the_defined_bits(name: str, kind: FloatType, n_nodes: int, executors: dict[int, Executor]) -> None:
    tokens = GOLDEN["models"][name]["prompt_ids"]
    check(DATA / f"{name}.m", tokens, executors, n_nodes, [(threads, batch) for threads in (1, 2, 3) for batch in (1, 5, 32)], kind)


SHAPES = {
    "heads of one block": {"dim": 96, "n_heads": 3, "n_kv_heads": 1, "head_dim": 32},
    "heads of three blocks": {"dim": 96, "n_heads": 2, "n_kv_heads": 2, "head_dim": 96},
    "a group of seven": {"n_heads": 7, "n_kv_heads": 1, "head_dim": 64},
}


@pytest.mark.parametrize(("weight_type", "kind"), [(F32, Q80), (Q40, Q80), (F32, F16)])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_shapes_have_the_defined_bits(
    shape: str, weight_type: FloatType, kind: FloatType, executors: dict[int, Executor], tmp_path: Path
) -> None:
    spec = small_spec(weight_type=weight_type, **SHAPES[shape])
    write_random_model(tmp_path / "m.m", spec)
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, 70).tolist()  # two chunks
    check(tmp_path / "m.m", tokens, executors, 1, [(2, 1), (1, 7), (3, 32)], kind)


@pytest.mark.parametrize("kind", [F16, Q80])
@pytest.mark.parametrize("name", FIXTURES)
def test_parts_change_no_bit(name: str, kind: FloatType, executors: dict[int, Executor]) -> None:
    with ModelFile.open(DATA / f"{name}.m") as model:
        network, nodes = build_graph(model.spec, 2, Q80, 64)
        whole, parted = (EngineCluster(network, nodes, file_weights(model, 2), executors[2], kind) for _ in range(2))
        tokens = np.random.default_rng(2).integers(0, model.spec.vocab_size, 65).tolist()
        for ends in [(16, 32, 48, 64), (48, 50), (32, 33)]:
            rows = ends[-1]
            assert_same_rows(parted.run(tokens[:rows], 70, ends=ends), whole.run(tokens[:rows], 70))
            assert_same_rows(parted.run(tokens[-1:], 70 + rows), whole.run(tokens[-1:], 70 + rows))


def errors(path: Path, tokens: list[int], executor: Executor, kv_cache: FloatType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits with F32 caches, with others, and how far they are apart, relative to their length."""
    with ModelFile.open(path) as model:
        network, nodes = build_graph(model.spec, 1, F32 if model.spec.weight_type == F32 else Q80)
        weights = file_weights(model, 1)
        plain, other = (EngineCluster(network, nodes, weights, executor, kind).feed(tokens, 32) for kind in (F32, kv_cache))
    return plain, other, np.linalg.norm(other - plain, axis=1) / np.linalg.norm(plain, axis=1)


@pytest.mark.parametrize(("kind", "median", "most"), [(F16, (1e-5, 3e-4), 1e-3), (Q80, (1e-3, 1e-2), 3e-2)])
def test_logits_are_close_to_those_of_f32_caches(
    kind: FloatType, median: tuple[float, float], most: float, executors: dict[int, Executor], tmp_path: Path
) -> None:
    """A value is off by at most 1 / 2048 of itself, or 1 / 254 of the largest of its block."""
    write_random_model(tmp_path / "m.m", small_spec(Architecture.QWEN3, F32))
    tokens = np.random.default_rng(1).integers(0, 320, 150).tolist()
    plain, other, error = errors(tmp_path / "m.m", tokens, executors[2], kind)
    assert median[0] < np.median(error) < median[1]
    assert error.max() < most
    assert (other.argmax(1) == plain.argmax(1)).all()


@pytest.mark.parametrize("name", FIXTURES)
def test_quantized_activations_round_otherwise_and_the_best_ids_stay(name: str, executors: dict[int, Executor]) -> None:
    golden = GOLDEN["models"][name]
    plain, blocks, error = errors(DATA / f"{name}.m", golden["prompt_ids"] + golden["generated_ids_1_node"], executors[2], Q80)
    assert np.median(error) < 0.05
    assert (blocks.argmax(1) == plain.argmax(1)).mean() > 0.9


@pytest.mark.parametrize(("kind", "block"), [(F16, 64), (Q80, 34)])
def test_a_cache_takes_less_memory(kind: FloatType, block: int) -> None:
    """`block`: bytes of 32 values; 128 of F32."""
    spec = small_spec(dim=256, n_heads=4, n_kv_heads=4, head_dim=64, n_layers=5, seq_len=1000)
    network, (node,) = build_graph(spec, 1, Q80, 32)
    positions = 1024  # whole chunks
    blocks = 2 * spec.n_layers * positions * spec.kv_dim // 32
    assert Layout(network, node).cache_bytes == blocks * 128
    assert Layout(network, node, kind).cache_bytes == blocks * block
    plain, small = memory_needs(network, node, n_threads=1), memory_needs(network, node, n_threads=1, kv_cache=kind)
    assert plain.working == small.working
    assert plain.caches - small.caches == blocks * (128 - block)


@pytest.mark.parametrize("kind", [F16, Q80])
def test_what_it_needs_is_known_before(kind: FloatType) -> None:
    network, nodes = build_graph(small_spec(Architecture.QWEN3, Q40), 2, Q80, 8)
    weights = WireWeights(nodes[1])
    weights.allocate()
    program = compile_program(network, nodes[1], weights, n_threads=1, kv_cache=kind)
    held = program._layout.nbytes + sum(t.nbytes for t in program._kept[1]._tables.values()) + program.scratch.nbytes + STACK_BYTES
    assert sum(memory_needs(network, nodes[1], n_threads=1, kv_cache=kind)) == held


def test_heads_that_are_no_whole_blocks_are_refused() -> None:
    with ModelFile.open(DATA / "llama_q40.m") as model:
        network, (node,) = build_graph(model.spec, 1, Q80)
        told = "heads of 16 values; a KV cache of Q80 blocks needs a multiple of 32: keep the KV cache as F16 or F32"
        with pytest.raises(GraphError, match=told):
            compile_program(network, node, FileWeights(model), n_threads=1, kv_cache=Q80)
        with pytest.raises(GraphError, match=told):
            memory_needs(network, node, n_threads=1, kv_cache=Q80)


@pytest.mark.parametrize("kind", [Q40, FloatType.NONE])
def test_other_types_are_refused(kind: FloatType) -> None:
    network, (node,) = build_graph(small_spec(Architecture.QWEN3, Q40), 1, Q80, 8)
    with pytest.raises(GraphError, match=f"KV caches are kept as F32, F16 or Q80, not as {kind.name}"):
        memory_needs(network, node, n_threads=1, kv_cache=kind)
