"""Whatever a root sends as a graph: it is refused, or its instructions stay within the memory of its program."""

import dataclasses
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.engine.executor import Executor
from dairllm.engine.program import Program, compile_program, memory_needs
from dairllm.engine.weights import WireWeights
from dairllm.errors import GraphError
from dairllm.formats.random_model import small_spec
from dairllm.graph.build import POSITION_PIPE, TOKEN_PIPE, build_graph
from dairllm.graph.model import Architecture
from dairllm.graph.types import (
    AttentionConfig,
    FloatType,
    NetworkConfig,
    NoConfig,
    NodeConfig,
    Op,
    OpCode,
    Pointer,
    PointerSource,
    PointerType,
    Size,
)
from tests.engine.guarded import outside
from tests.engine.random_graphs import mutated

ENOUGH = 64 << 20
"""Bytes that a worker of these tests may hold."""

GRAPHS = [
    build_graph(small_spec(arch, weights), n_nodes, sync, 8)
    for arch in Architecture
    for weights, sync in ((FloatType.F32, FloatType.F32), (FloatType.Q40, FloatType.Q80), (FloatType.Q80, FloatType.F32))
    for n_nodes in (1, 2)
]


def compiled(network: NetworkConfig, node: NodeConfig, kv_cache: FloatType = FloatType.F32) -> Program | None:
    """As a worker does it: None where the graph asks for more than it may hold."""
    weights = WireWeights(node)
    if weights.nbytes + sum(memory_needs(network, node, n_threads=2, kv_cache=kv_cache)) > ENOUGH:
        return None
    weights.allocate()
    return compile_program(network, node, weights, n_threads=2, kv_cache=kv_cache)


def kv_types(node: NodeConfig) -> list[FloatType]:
    """What this graph's KV caches can be kept as."""
    head_dims = {op.config.head_dim for s in node.segments for op in s.ops if isinstance(op.config, AttentionConfig)}
    return [FloatType.F32, FloatType.F16] + [FloatType.Q80] * all(n % 32 == 0 for n in head_dims)


def assert_within_its_memory(program: Program) -> None:
    assert not outside(program)


@pytest.mark.parametrize("number", range(len(GRAPHS)))
def test_a_good_graph_stays_within_its_memory(number: int) -> None:
    network, nodes = GRAPHS[number]
    for node in nodes:
        for kv_cache in kv_types(node):
            program = compiled(network, node, kv_cache)
            assert program is not None
            assert_within_its_memory(program)


@settings(max_examples=1500, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, len(GRAPHS) - 1), st.integers(1, 3))
def test_a_changed_graph_is_refused_or_stays_within_its_memory(seed: int, number: int, changes: int) -> None:
    rng = Random(seed)  # noqa: S311 - not for secrets
    network, nodes = GRAPHS[number]
    node = rng.choice(nodes)
    kv_cache = rng.choice(kv_types(node))
    for _ in range(changes):
        if rng.random() < 0.2:
            network = mutated(network, rng)
        else:
            node = mutated(node, rng)
    try:
        program = compiled(network, node, kv_cache)
    except GraphError:
        return
    if program is not None:
        assert_within_its_memory(program)


def test_changed_graphs_that_compile_run(executor: Executor) -> None:
    """With garbage in the pipes and in the weights: no crash, and the threads come back."""
    ran = 0
    for seed in range(400):
        rng = Random(seed)  # noqa: S311 - not for secrets
        network, nodes = rng.choice(GRAPHS)
        node = rng.choice(nodes)
        kv_cache = rng.choice(kv_types(node))
        node = mutated(node, rng)
        try:
            program = compiled(network, node, kv_cache)
        except GraphError:
            continue
        if program is None or not program.segments or not program.seq_len:
            continue
        weights, _ = program._kept
        weights._memory[:] = np.random.default_rng(seed).integers(0, 256, len(weights._memory), np.uint8)
        for rows in {1, min(network.n_batches, program.seq_len)}:
            executor.run(program, 0, program.n_segments, program.seq_len - rows, rows)
        ran += 1
    assert ran > 50


@pytest.mark.parametrize("rows", [1, 8])
def test_positions_are_not_what_ops_write_into_their_pipe(rows: int, executor: Executor) -> None:
    """Caches and tables are addressed by them: a root could reach any memory."""
    network, (node,) = GRAPHS[0]
    tokens, positions = (Pointer(PointerSource.PIPE, pipe, PointerType.BATCH) for pipe in (TOKEN_PIPE, POSITION_PIPE))
    size = Size(FloatType.F32, 0, 0, 0)
    first = node.segments[0]
    node = dataclasses.replace(
        node,
        segments=(
            dataclasses.replace(first, ops=(*first.ops, Op(OpCode.CAST, "x", 0, tokens, positions, size, NoConfig()))),
            *node.segments[1:],
        ),
    )
    program = compiled(network, node)
    assert program is not None
    program.values(TOKEN_PIPE)[:] = 1e12
    executor.run(program, 0, program.n_segments, 3, rows)
    assert (program.values(POSITION_PIPE)[:rows] == np.float32(1e12)).all()


@pytest.fixture(scope="module")
def executor() -> Any:
    with Executor(2) as running:
        yield running
