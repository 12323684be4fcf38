"""Weights located in a file: what a root would send, whoever's share; and nothing outside of it, whatever is claimed."""

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dairllm.engine.located_weights import LocatedWeights
from dairllm.errors import GraphError
from dairllm.formats.digest import model_digests
from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_slices import outgoing_weights
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.formats.share_file import ShareFile
from dairllm.formats.share_writer import ShareWriter
from dairllm.graph.build import LOGITS_PIPE, build_network, build_node
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.references import WeightReference, weight_references
from dairllm.graph.slicing import Axis, Part, Share, Span, deal_shares, nearly_equal_sizes, parse_shares
from dairllm.graph.types import FloatType, NodeConfig, Op, OpCode, Size, row_bytes

MODELS = {
    "f32": small_spec(weight_type=FloatType.F32, n_heads=6, n_kv_heads=2, dim=96, hidden_dim=192, vocab_size=322),
    "q40": small_spec(Architecture.QWEN3, n_heads=9, n_kv_heads=3, dim=288, head_dim=32, hidden_dim=192, vocab_size=322),
    "moe": small_spec(
        Architecture.QWEN3_MOE, weight_type=FloatType.Q80, n_heads=4, n_kv_heads=2, dim=128, head_dim=32, moe_hidden_dim=96, vocab_size=322
    ),
}
SHARES = [
    ("f32", 1),
    ("f32", 2),
    ("f32", 3),
    ("f32", "1/32,4/96,1/64"),
    ("q40", 2),
    ("q40", 4),
    ("q40", "7/32,2/160"),
    ("moe", 2),
    ("moe", 3),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModelFile]]:
    folder, opened = tmp_path_factory.mktemp("models"), {}
    for name, spec in MODELS.items():
        write_random_model(folder / f"{name}.m", spec, seed=len(name))
        opened[name] = ModelFile.open(folder / f"{name}.m")
    yield opened
    for model in opened.values():
        model.close()


def dealt(spec: ModelSpec, shares: int | str) -> tuple[tuple[Share, ...], list[NodeConfig], int]:
    """Shares, the nodes' graphs, classifier rows of each node."""
    found = deal_shares(spec, nearly_equal_sizes(spec, shares) if isinstance(shares, int) else parse_shares(shares))
    network = build_network(spec, found, FloatType.F32)
    nodes = [build_node(spec, network, node, share) for node, share in enumerate(found)]
    return found, nodes, network.pipes[LOGITS_PIPE].size.x // len(found)


def ops_of(node: NodeConfig) -> list[Op]:
    return [op for segment in node.segments for op in segment.ops if op.weight_size.length]


def seen(weights: LocatedWeights, op: Op) -> bytes:
    """What a kernel reads of an op's weight."""
    size, view = op.weight_size, weights.view(op)
    rows, columns = (size.x, size.y) if op.code == OpCode.MATMUL else (size.y, size.x)
    nbytes = row_bytes(size.float_type, columns)
    return b"".join(
        ctypes.string_at(view.area.address + expert * view.expert + row * view.row, nbytes)
        for expert in range(size.z)
        for row in range(rows)
    )


@pytest.mark.parametrize(("name", "shares"), SHARES)
def test_a_kernel_sees_what_a_root_would_send(models: dict[str, ModelFile], name: str, shares: int | str) -> None:
    """In the model's file, and in one of the share."""
    model = models[name]
    found, nodes, logits_rows = dealt(model.spec, shares)
    for node, (share, graph) in enumerate(zip(found, nodes, strict=True)):
        sent: dict[tuple[str, int], bytes] = {}
        for weight in outgoing_weights(model, share, logits_rows):
            piece = memoryview(bytearray(weight.nbytes))
            weight.read(0, weight.n_rows, piece)
            sent[weight.name, weight.layer] = sent.get((weight.name, weight.layer), b"") + bytes(piece)
        weights = LocatedWeights(model, graph, weight_references(model.spec, share, graph))
        weights.allocate()
        for op in ops_of(graph):
            if op.name == "embedding":
                assert seen(weights, op) == model.array(model.tensor("embedding")).tobytes()
                continue
            assert seen(weights, op) == sent[op.name, op.index], (node, op.name, op.index)
            located = weights.located(op.name, op.index)
            assert located is not None
            view = weights.view(op)
            assert (view.offset is not None) == located.in_place
            if view.offset is not None:
                assert view.area.address - view.offset == model.raw.ctypes.data
        packed = LocatedWeights(model, graph, weight_references(model.spec, share, graph), packed=True)
        packed.allocate()
        for op in (op for op in ops_of(graph) if op.name != "embedding"):
            assert seen(packed, op) == sent[op.name, op.index]
            view, width = packed.view(op), row_bytes(op.weight_size.float_type, op.weight_size.y)
            assert view.row == width or op.code != OpCode.MATMUL, "nothing lies between two rows"
        if node:
            file = ShareFile.open(ShareWriter(model, model_digests(model).identity, node, len(nodes), share).prepare().path)
            file.locate(model)
            prepared = LocatedWeights(model, graph, weight_references(model.spec, share, graph), file)
            assert prepared.nbytes == 0, "nothing is copied"
            for op in ops_of(graph):
                assert seen(prepared, op) == sent[op.name, op.index], (node, op.name, op.index)
            file.close()
        scattered = len(share.heads) > 1 or len(share.kv_heads) > 1
        assert scattered == any(weights.view(op).offset is None for op in ops_of(graph) if op.name in ("block_matmul_q", "block_matmul_k"))


def test_equal_shares_need_no_memory(models: dict[str, ModelFile]) -> None:
    spec = models["f32"].spec
    found = deal_shares(spec, nearly_equal_sizes(spec, 2))
    network = build_network(spec, found, FloatType.F32)
    graph = build_node(spec, network, 1, found[1])
    weights = LocatedWeights(models["f32"], graph, weight_references(spec, found[1], graph))
    assert weights.nbytes == 0


def true_references(model: ModelFile, shares: int | str, node: int) -> tuple[NodeConfig, list[WeightReference]]:
    found, nodes, _ = dealt(model.spec, shares)
    return nodes[node], list(weight_references(model.spec, found[node], nodes[node]))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda refs: refs[1:], "nothing refers to "),
        (lambda refs: [*refs, refs[0]], "is referred to twice"),
        (lambda refs: [*refs, replace(refs[0], layer=77)], "of layer 77 is no weight of the configuration"),
        (lambda refs: [replace(refs[0], name="embedding"), *refs[1:]], "embedding of layer 0 is no weight of the configuration"),
        (lambda refs: with_part(refs, "block_matmul_q", Part(Axis.ROWS, (Span(0, 32),))), "32 x 384"),
        (lambda refs: with_part(refs, "block_matmul_q", Part(Axis.ROWS, (Span(80, 128),))), "rows 80 to 128 are not among them"),
        (lambda refs: with_part(refs, "block_matmul_q", Part(Axis.COLUMNS, (Span(0, 48),))), "96 x 192"),
        (lambda refs: with_part(refs, "block_matmul_wo", Part(Axis.COLUMNS, (Span(2**31, 2**32 - 1),))), "are not among them"),
        (lambda refs: with_part(refs, "block_matmul_wo", Part(Axis.COLUMNS, ())), "its part of f32.m is nothing"),
    ],
)
def test_references_that_do_not_fit_are_refused(models: dict[str, ModelFile], change: object, problem: str) -> None:
    node, references = true_references(models["f32"], 2, 1)
    LocatedWeights(models["f32"], node, references)
    with pytest.raises(GraphError, match=problem):
        LocatedWeights(models["f32"], node, change(references))  # type: ignore[operator] # a parameter that is a function


def with_part(references: list[WeightReference], name: str, part: Part) -> list[WeightReference]:
    return [replace(each, part=part) if each.name == name else each for each in references]


def with_sizes(node: NodeConfig, name: str, size: Size) -> NodeConfig:
    segments = [
        replace(segment, ops=tuple(replace(op, weight_size=size) if op.name == name else op for op in segment.ops))
        for segment in node.segments
    ]
    return replace(node, segments=tuple(segments))


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (Size(FloatType.Q80, 1, 96, 64), "is Q80 in the graph and F32 in f32.m"),
        (Size(FloatType.F32, 1 << 30, 96, 48), "f32.m has no 1073741824 of block_matmul_q"),
        (Size(FloatType.F32, 1, 96, 49 << 20), "^$"),
        (Size(FloatType.F32, 1, 97, 48), "48 rows of 388 bytes in the graph; its part of f32.m is 48 x 384"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(models: dict[str, ModelFile], size: Size, problem: str) -> None:
    """More rows than the tensor has are padding: memory, which the owner is asked for."""
    node, references = true_references(models["f32"], 2, 1)
    node = with_sizes(node, "block_matmul_q", size)
    if problem == "^$":
        assert LocatedWeights(models["f32"], node, references).nbytes == 2 * size.nbytes
    else:
        with pytest.raises(GraphError, match=problem):
            LocatedWeights(models["f32"], node, references)


NAMES = ("block_matmul_q", "block_matmul_wo", "block_matmul_w1", "block_matmul_w2", "block_norm_0", "final_matmul_logits", "block_moe_gate")
EDGES = st.integers(-3, 400) | st.integers(0, 2**32 - 1)
PARTS = st.builds(Part, st.sampled_from(Axis), st.none() | st.lists(st.builds(Span, EDGES, EDGES), max_size=3).map(tuple))
SIZES = st.builds(
    Size, st.sampled_from([FloatType.F32, FloatType.Q40, FloatType.Q80]), *([st.integers(1, 400) | st.integers(1, 2**32)] * 3)
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(MODELS)),
    victim=st.sampled_from(NAMES),
    part=st.none() | PARTS,
    size=st.none() | SIZES,
    x=st.none() | st.integers(1, 400),
)
def test_whatever_is_claimed_nothing_outside_of_the_file_is_read(
    models: dict[str, ModelFile], name: str, victim: str, part: Part | None, size: Size | None, x: int | None
) -> None:
    model = models[name]
    node, references = true_references(model, 2, 1)
    if part is not None:
        references = with_part(references, victim, part)
    if size is not None:
        node = with_sizes(node, victim, size)
    if x is not None:
        true = next((op.weight_size for op in ops_of(node) if op.name == victim), None)
        node = node if true is None else with_sizes(node, victim, replace(true, x=x))
    try:
        weights = LocatedWeights(model, node, references)
    except GraphError:
        return
    if weights.nbytes > 1 << 24:
        return  # the owner is asked
    weights.allocate()
    for op in ops_of(node):
        view, sizes = weights.view(op), op.weight_size
        rows, columns = (sizes.x, sizes.y) if op.code == OpCode.MATMUL else (sizes.y, sizes.x)
        end = (sizes.z - 1) * view.expert + (rows - 1) * view.row + row_bytes(sizes.float_type, columns)
        if view.offset is not None:
            assert view.offset >= 0
            assert view.offset + end <= model.nbytes
            assert view.area.address == model.raw.ctypes.data + view.offset
        else:
            assert end == sizes.nbytes
            memory = np.asarray(weights._memory)
            assert memory.ctypes.data <= view.area.address
            assert view.area.address + end <= memory.ctypes.data + memory.nbytes
