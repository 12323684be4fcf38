"""The oracle of whole graphs against the C++ program's recorded logits, on one node and on two."""

import json
from pathlib import Path

import numpy as np
import pytest

from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import build_graph
from dairllm.graph.types import FloatType
from dairllm.kernels import reference
from tests.engine.oracle import OracleCluster, file_weights
from tests.kernels import exact

DATA = Path(__file__).parents[1] / "data" / "dllama"
GOLDEN = json.loads((DATA / "golden.json").read_text())
NEAR_TIE = 0.15
"""Of the two best logits: right programs that sum in another order may part there."""


@pytest.mark.parametrize("arithmetic", [reference, exact], ids=["any order", "defined order"])
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("name", list(GOLDEN["models"]))
def test_logits_and_ids_are_those_of_the_cpp_program(name, n_nodes, arithmetic):
    golden, want = GOLDEN["models"][name], np.load(DATA / f"{name}.logits-{n_nodes}-node.npy")
    ids = golden["prompt_ids"] + golden[f"generated_ids_{n_nodes}_node"]
    f32 = GOLDEN["sync"].get(name) == "f32"
    with ModelFile.open(DATA / f"{name}.m") as model:
        network, nodes = build_graph(model.spec, n_nodes, FloatType.F32 if f32 else FloatType.Q80)
        cluster = OracleCluster(network, nodes, file_weights(model, n_nodes), arithmetic)
        got = cluster.feed(ids[:-1], batch=network.n_batches)[len(golden["prompt_ids"]) - 1 :]
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error.max() < (0.0001 if f32 else 0.03)
    other = got.argmax(1) != want.argmax(1)
    best = np.sort(want, axis=1)[:, -2:]
    assert (best[other, 1] - best[other, 0] < (0 if f32 else NEAR_TIE)).all()


@pytest.mark.parametrize("name", ["llama_f32", "qwen3_moe_q40"])
def test_a_row_is_the_same_alone_and_in_a_batch(name):
    ids = GOLDEN["models"][name]["prompt_ids"]
    with ModelFile.open(DATA / f"{name}.m") as model:
        network, nodes = build_graph(model.spec, 1, FloatType.F32 if "f32" in name else FloatType.Q80)
        alone, batch, mixed = (
            OracleCluster(network, nodes, file_weights(model, 1), exact).feed(ids, batch=size) for size in (1, network.n_batches, 7)
        )
    assert np.array_equal(alone.view(np.int32), batch.view(np.int32))
    assert np.array_equal(alone.view(np.int32), mixed.view(np.int32))
