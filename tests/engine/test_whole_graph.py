"""The engine computes, to the bit, what docs/arithmetic.md defines: whole graphs against the oracle in the defined order."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dairllm.engine.executor import Executor
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import LOGITS_PIPE, TOKEN_PIPE, build_graph
from dairllm.graph.model import Architecture, HiddenAct
from dairllm.graph.types import FloatType, RopeType
from tests.engine.engine_cluster import EngineCluster
from tests.engine.oracle import OracleCluster, file_weights
from tests.kernels import exact

DATA = Path(__file__).parents[1] / "data" / "dllama"
GOLDEN = json.loads((DATA / "golden.json").read_text())
F32, Q40, Q80 = FloatType.F32, FloatType.Q40, FloatType.Q80


@pytest.fixture(scope="module")
def executors() -> Iterator[dict[int, Executor]]:
    """Of 1, 2 and 3 threads."""
    started = {n: Executor(n).start() for n in (1, 2, 3)}
    yield started
    for executor in started.values():
        executor.close()


def assert_same_bits(got, want):
    """Which rows differ says more than that some do."""
    assert np.flatnonzero((got.view(np.int32) != want.view(np.int32)).any(1)).tolist() == []


def check(path, tokens, executors, *, n_nodes=1, sync=Q80, runs=((2, 1), (1, 7), (3, 32))):
    """All rows of a text, for each (threads, rows of a batch)."""
    with ModelFile.open(path) as model:
        network, nodes = build_graph(model.spec, n_nodes, sync)
        weights = file_weights(model, n_nodes)
        want = OracleCluster(network, nodes, weights, exact).feed(tokens, batch=network.n_batches)
        assert np.isfinite(want).all()
        assert len({row.tobytes() for row in want}) > len(tokens) // 2
        for threads, batch in runs:
            assert_same_bits(EngineCluster(network, nodes, weights, executors[threads]).feed(tokens, batch), want)


@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("name", list(GOLDEN["models"]))
def test_golden_models(name, n_nodes, executors):
    golden = GOLDEN["models"][name]
    tokens = golden["prompt_ids"] + golden[f"generated_ids_{n_nodes}_node"]
    runs = [(threads, batch) for threads in (1, 2, 3) for batch in (1, 5, 32)]
    check(DATA / f"{name}.m", tokens, executors, n_nodes=n_nodes, sync=F32 if GOLDEN["sync"].get(name) == "f32" else Q80, runs=runs)


SHAPES = {
    "gelu": {"hidden_act": HiddenAct.GELU},
    "blocks that fill no group": {"dim": 96, "hidden_dim": 288, "n_heads": 6, "n_kv_heads": 3, "head_dim": 16},
    "outputs that fill no tile": {"vocab_size": 333, "dim": 96, "n_heads": 3, "n_kv_heads": 1, "head_dim": 32},
    "narrow heads": {"head_dim": 8, "n_heads": 8, "n_kv_heads": 4},
    "wide heads": {"dim": 160, "n_heads": 2, "n_kv_heads": 1, "head_dim": 80},
    "a group of seven": {"n_heads": 7, "n_kv_heads": 1, "head_dim": 32},
    "scaled frequencies": {
        "rope_type": RopeType.LLAMA3_1,
        "rope_theta": 500000.0,
        "rope_scaling_factor": 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_orig_max_seq_len": 64,
    },
}


def text(n, vocab):
    return np.random.default_rng(n).integers(0, vocab, n).tolist()


@pytest.mark.parametrize("weight_type", [F32, Q40, Q80])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_shapes_with_remainders(shape, weight_type, executors, tmp_path):
    spec = small_spec(weight_type=weight_type, **SHAPES[shape])
    write_random_model(tmp_path / "m.m", spec)
    check(tmp_path / "m.m", text(40, spec.vocab_size), executors, sync=F32 if weight_type == F32 else Q80)


@pytest.mark.parametrize("weight_type", [F32, Q40, Q80])
@pytest.mark.parametrize("arch", [Architecture.QWEN3, Architecture.QWEN3_MOE])
def test_architectures(arch, weight_type, executors, tmp_path):
    spec = small_spec(arch, weight_type)
    write_random_model(tmp_path / "m.m", spec)
    check(tmp_path / "m.m", text(40, spec.vocab_size), executors, n_nodes=2, sync=F32 if weight_type == F32 else Q80)


@pytest.mark.parametrize("sync", [F32, Q80])
@pytest.mark.parametrize("weight_type", [F32, Q40])
def test_what_crosses_the_wire_is_free(weight_type, sync, executors, tmp_path):
    write_random_model(tmp_path / "m.m", small_spec(weight_type=weight_type))
    check(tmp_path / "m.m", text(40, 320), executors, n_nodes=2, sync=sync)


def test_three_nodes_with_three_heads_each(executors, tmp_path):
    spec = small_spec(dim=576, hidden_dim=192, n_heads=9, n_kv_heads=3, n_layers=1, vocab_size=321)
    write_random_model(tmp_path / "m.m", spec)
    check(tmp_path / "m.m", text(20, 321), executors, n_nodes=3)


@pytest.mark.parametrize("weight_type", [F32, Q40])
def test_texts_of_several_attention_chunks(weight_type, executors, tmp_path):
    write_random_model(tmp_path / "m.m", small_spec(weight_type=weight_type, n_layers=1))
    runs = (2, 1), (3, 32), (2, 27)
    check(tmp_path / "m.m", text(150, 320), executors, sync=F32 if weight_type == F32 else Q80, runs=runs)


@pytest.mark.parametrize("name", ["llama_q40", "llama_f32", "qwen3_moe_q40"])
def test_the_classifier_may_run_for_the_last_row_alone(name, executors):
    """As a local node does with a prompt: the other rows' logits are not wanted."""
    tokens = GOLDEN["models"][name]["prompt_ids"][:32]
    with ModelFile.open(DATA / f"{name}.m") as model:
        network, nodes = build_graph(model.spec, 1, F32 if "f32" in name else Q80)
        whole, parted = (EngineCluster(network, nodes, file_weights(model, 1), executors[2]) for _ in range(2))
        want = whole.run(tokens, 0)
        (program,), rows, last = parted.programs, len(tokens), len(nodes[0].segments) - 1
        program.values(TOKEN_PIPE)[:rows, 0] = tokens
        executors[2].run(program, 0, last, 0, rows)
        executors[2].run(program, last, last + 1, 0, rows, first_row=rows - 1)
        found = program.values(LOGITS_PIPE)[:rows]
    assert not found[:-1].any()
    assert_same_bits(found[-1:], want[-1:])
