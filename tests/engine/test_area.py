"""Addresses are taken from areas, which know where they end; and graphs that once left them, or met each other's numbers."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dairllm.engine.area import Area, AreaError
from dairllm.engine.executor import Executor
from dairllm.engine.program import Program, compile_program
from dairllm.engine.rows import Rows
from dairllm.engine.weights import FileWeights, WireWeights
from dairllm.errors import GraphError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import build_graph
from dairllm.graph.types import (
    AttentionConfig,
    Buffer,
    FloatType,
    MatmulConfig,
    MoeGateConfig,
    NetworkConfig,
    NoConfig,
    NodeConfig,
    Op,
    OpCode,
    Pipe,
    Pointer,
    PointerSource,
    PointerType,
    Segment,
    ShiftConfig,
    Size,
    Sync,
    SyncType,
)

F32, Q40, Q80 = FloatType.F32, FloatType.Q40, FloatType.Q80
AREA = Area("somewhere", 1 << 20, 100)


def pipe(index: int, kind: PointerType = PointerType.BATCH) -> Pointer:
    return Pointer(PointerSource.PIPE, index, kind)


def buffer(index: int, kind: PointerType = PointerType.BATCH) -> Pointer:
    return Pointer(PointerSource.BUFFER, index, kind)


def graph(
    batch: int, pipes: list[tuple[FloatType, int]], buffers: list[Size], ops: list[Op], *, n_nodes: int = 1, syncs: tuple[Sync, ...] = ()
) -> tuple[NetworkConfig, NodeConfig]:
    """Node 0. Pipe 0 brings the positions; `pipes` are those from 1 on."""
    sizes = [Size(F32, 1, batch, 1), *(Size(float_type, 1, batch, width) for float_type, width in pipes)]
    network = NetworkConfig(batch, n_nodes, tuple(Pipe(f"P{i}", size) for i, size in enumerate(sizes)), ())
    return network, NodeConfig(0, tuple(Buffer(f"b{i}", size) for i, size in enumerate(buffers)), (Segment(tuple(ops), syncs),))


def compiled(network: NetworkConfig, node: NodeConfig, **how: Any) -> Program:
    weights = WireWeights(node)
    weights.allocate()
    rng = np.random.default_rng(1)
    for op in (op for segment in node.segments for op in segment.ops if op.weight_size.length):
        memory = np.frombuffer(weights.into(op.name, op.index, 0, op.weight_size.nbytes), np.uint8)
        memory[:] = rng.integers(0, 60, len(memory), np.uint8)  # scales that are numbers
    return compile_program(network, node, weights, n_threads=1, **how)


@pytest.fixture(scope="module")
def executor() -> Any:
    with Executor(1) as running:
        yield running


# -------------------------------------------------------------------------------------------------------------------------------- areas
@given(st.integers(-3, 110), st.integers(-1, 60), st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 40)), max_size=3))
def test_an_address_is_given_where_every_byte_is_there(offset: int, nbytes: int, steps: list[tuple[int, int]]) -> None:
    starts = [offset]
    for count, stride in steps:
        starts = [start + i * stride for start in starts for i in range(count)]
    sensible = nbytes >= 0 and all(count >= 1 and stride >= 0 for count, stride in steps)
    if sensible and all(start >= 0 and start + nbytes <= AREA.nbytes for start in starts):
        assert AREA.at(offset, nbytes, *steps) == AREA.address + offset
        assert AREA.part("a part", offset, nbytes) == ("a part", AREA.address + offset, nbytes)
    else:
        with pytest.raises(AreaError, match="somewhere"):
            AREA.at(offset, nbytes, *steps)


def test_offsets_of_any_size_are_compared_as_they_are() -> None:
    for offset, steps in ((1 << 63, ()), (1 << 64, ()), (0, ((1 << 62, 4),)), (0, ((3, 1 << 63),))):
        with pytest.raises(AreaError, match="expected none beyond its 100"):
            AREA.at(offset, 1, *steps)


def test_rows_are_all_there_or_none() -> None:
    rows = Rows(Area("x", 4096, 2 * 3 * 128 - 28), 0, 3, 128, 384, 0, 25, 2, F32)  # two planes of three rows of 25 values
    assert rows.at(5, 20, 2) == 4096 + 20
    assert rows.plane_fields("x", 25, 2) == {"x": 4096, "x_row": 128, "x_plane": 384}
    assert rows._replace(planes=1).plane_fields("x", 25, 7) == {"x": 4096, "x_row": 128, "x_plane": 0}
    for first, values, planes in ((6, 20, 2), (0, 26, 2), (0, 1, 3)):
        with pytest.raises(AreaError, match="of x; expected none beyond its 740"):
            rows.at(first, values, planes)


def test_a_weight_that_ends_too_early_is_refused_by_the_name_of_its_op(tmp_path: Path) -> None:
    """As many bytes as the op's, but in fewer and longer rows."""
    spec = small_spec()
    path = tmp_path / "model.m"
    write_random_model(path, spec, seed=1)
    network, (node,) = build_graph(spec, 1, F32, 4)
    renamed = {"block_matmul_w1": "block_matmul_w2"}
    segments = tuple(
        dataclasses.replace(part, ops=tuple(dataclasses.replace(op, name=renamed.get(op.name, op.name)) for op in part.ops))
        for part in node.segments
    )
    with ModelFile.open(path) as model, pytest.raises(GraphError) as refused:
        compile_program(network, dataclasses.replace(node, segments=segments), FileWeights(model), n_threads=1)
    assert str(refused.value).startswith("op block_matmul_w2 (matmul) of layer 0: it touches bytes 0 to ")
    assert " of weight block_matmul_w2 of layer 0; expected none beyond its " in str(refused.value)


# ------------------------------------------------------------------------------------------------- what the sizes said, and nobody asked
@pytest.mark.parametrize("n_nodes", [2, 3, 4])
@pytest.mark.parametrize("batch", [1, 5, 33, 64])
def test_slices_of_a_pipe_are_added_into_a_slice_of_a_buffer(n_nodes: int, batch: int, executor: Executor) -> None:
    """As many as the sizes say, which are more than there are nodes. The pipe's syncs move slices."""
    width = 32
    ops = [
        Op(OpCode.MERGE_ADD, "merge", 0, pipe(1), buffer(0, PointerType.BATCHED_SLICE), Size.none(), NoConfig()),
        Op(OpCode.CAST, "out", 0, buffer(0, PointerType.BATCHED_SLICE), pipe(2), Size.none(), NoConfig()),
    ]
    pipes, buffers = [(F32, n_nodes * n_nodes * width), (F32, width)], [Size(F32, 1, batch, n_nodes * width)]
    program = compiled(*graph(batch, pipes, buffers, ops, n_nodes=n_nodes, syncs=(Sync(1, SyncType.NODE_SLICES),)))
    x = np.random.default_rng(2).integers(-9, 9, (batch, n_nodes * n_nodes * width)).astype(np.float32)
    for node in range(n_nodes):
        part = x[:, node * n_nodes * width : (node + 1) * n_nodes * width]
        regions = program.region(1, node, batch)
        for region, rows in zip(regions, np.array_split(part, len(regions)), strict=True):
            np.frombuffer(region, np.float32)[:] = rows.reshape(-1)
    executor.run(program, 0, 1, 0, batch)
    expected = x.reshape(batch, n_nodes * n_nodes, width).sum(axis=1)
    assert (program.values(2)[:batch] == expected).all()


@pytest.mark.parametrize("weights", [Q40, Q80])
def test_a_mixture_of_one_expert_is_that_of_a_row_alone(weights: FloatType, executor: Executor) -> None:
    batch, width, outputs = 16, 64, 24
    ops = [
        Op(OpCode.MOE_GATE, "gate", 0, pipe(3), buffer(1), Size.none(), MoeGateConfig(1, 1, 2)),
        Op(OpCode.REPEAT_Z, "repeat", 0, pipe(1), buffer(0), Size.none(), NoConfig()),
        Op(OpCode.MATMUL, "expert", 0, buffer(0), pipe(2), Size(weights, 1, width, outputs), MatmulConfig(1, 1, 2)),
    ]
    buffers = [Size(Q80, 1, batch, width), Size(F32, 1, batch, 1), Size(F32, 1, batch, 1)]
    network, node = graph(batch, [(F32, width), (F32, outputs), (F32, 1)], buffers, ops)
    x = np.random.default_rng(3).standard_normal((batch, width)).astype(np.float32)

    def computed(rows: int, x: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        program = compiled(network, node)
        program.values(1)[:rows] = x
        program.values(3)[:] = 1
        executor.run(program, 0, 1, 0, rows)
        return program.values(2)[:rows].copy()

    alone = np.concatenate([computed(1, row) for row in x])
    assert np.abs(alone).min() > 0
    assert (computed(batch, x).view(np.int32) == alone.view(np.int32)).all()


def attention(positions: int, *head_dims: int) -> tuple[NetworkConfig, NodeConfig]:
    """Keys and values of 64 values go into two caches; an attention op for each size of heads reads them."""
    ops = [Op(OpCode.SHIFT, f"shift{cache}", 0, pipe(1), buffer(cache, PointerType.RAW), Size.none(), ShiftConfig(0)) for cache in (0, 1)]
    for n in head_dims:
        config = AttentionConfig(64 // n, 64 // n, 64 // n, n, positions, 64, 64, 0, 2, 0, 1, 3)
        ops.append(Op(OpCode.MULTIHEAD_ATT, f"att{n}", 0, buffer(2), pipe(2), Size.none(), config))
    buffers = [Size(F32, 1, positions, 64), Size(F32, 1, positions, 64), Size(F32, 1, 4, 64), Size(F32, 1, 4, 1)]
    return graph(4, [(F32, 64), (F32, 64)], buffers, ops)


def test_one_cache_has_heads_of_one_size() -> None:
    assert compiled(*attention(100, 32, 32)).seq_len == 100
    with pytest.raises(
        GraphError, match=r"op shift0 \(shift\) of layer 0: a cache has heads of one size; attention ops give this one 16 and 32"
    ):
        compiled(*attention(100, 32, 16))
    network, node = attention(100, 32, 16)
    unwritten = dataclasses.replace(node, segments=(Segment(node.segments[0].ops[2:], ()),))
    with pytest.raises(GraphError, match=r"op att32 \(multihead_att\) of layer 0: a cache has heads of one size"):
        compiled(network, unwritten)


def test_a_cache_has_no_more_positions_than_a_float_can_say() -> None:
    """Position 2^24 + 3 is rounded to 2^24 + 4, which may be the first that has no place."""
    with pytest.raises(GraphError, match="buffer b0, a KV cache, has 16777220 positions; expected at most 16777216"):
        compiled(*attention((1 << 24) + 4, 32))
