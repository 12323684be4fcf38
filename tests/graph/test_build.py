"""Graphs that fit together, for every combination of weights and sync; that equal ones are the C++ root's is tested with its recorded bytes
(``tests/protocol/dllama/test_recorded_graphs.py``)."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from dairllm.errors import GraphError
from dairllm.graph.build import LOGITS_PIPE, POSITION_PIPE, TOKEN_PIPE, build_graph, build_network, build_node
from dairllm.graph.model import Architecture, HiddenAct, ModelSpec
from dairllm.graph.slicing import deal_shares, parse_shares
from dairllm.graph.types import (
    AttentionConfig,
    FloatType,
    InvRmsConfig,
    NetworkConfig,
    NodeConfig,
    Op,
    OpCode,
    Pointer,
    PointerSource,
    PointerType,
    RopeConfig,
    RopeType,
    Size,
)

F32, Q40, Q80 = FloatType.F32, FloatType.Q40, FloatType.Q80
ARCHITECTURES = pytest.mark.parametrize("model", ["llama", "qwen3", "qwen3_moe"])
COMBINATIONS = pytest.mark.parametrize(("weights", "sync"), [(w, s) for w in (F32, Q40, Q80) for s in (F32, Q80)])


@pytest.fixture
def spec(model: str, request: pytest.FixtureRequest) -> ModelSpec:
    found: ModelSpec = request.getfixturevalue(model)
    return found


def ops(node: NodeConfig) -> Iterator[Op]:
    for segment in node.segments:
        yield from segment.ops


def size_of(pointer: Pointer, network: NetworkConfig, node: NodeConfig) -> Size:
    size = network.pipes[pointer.index].size if pointer.source == PointerSource.PIPE else node.buffers[pointer.index].size
    return replace(size, x=size.x // network.n_nodes) if pointer.type == PointerType.BATCHED_SLICE else size


@ARCHITECTURES
@COMBINATIONS
@pytest.mark.parametrize("n_nodes", [1, 3])
def test_matmuls_meet_what_they_multiply(spec: ModelSpec, weights: FloatType, sync: FloatType, n_nodes: int) -> None:
    """Types and widths of every matmul, whatever crosses the wire."""
    network, nodes = build_graph(replace(spec, weight_type=weights), n_nodes, sync)
    for node in nodes:
        matmuls = [op for op in ops(node) if op.code == OpCode.MATMUL]
        assert matmuls
        for op in matmuls:
            source, target = size_of(op.input, network, node), size_of(op.output, network, node)
            gate = op.name == "block_moe_gate"
            assert op.weight_size.float_type == (F32 if gate else weights)
            assert source.float_type == (F32 if gate or weights == F32 else Q80)
            assert target.float_type == F32
            assert (op.weight_size.y, op.weight_size.x) == (source.x, target.x)
            assert source.nbytes


@ARCHITECTURES
@COMBINATIONS
def test_casts_keep_their_width(spec: ModelSpec, weights: FloatType, sync: FloatType) -> None:
    network, nodes = build_graph(replace(spec, weight_type=weights), 3, sync)
    for node in nodes:
        for op in ops(node):
            source, target = size_of(op.input, network, node), size_of(op.output, network, node)
            if op.code in (OpCode.CAST, OpCode.SILU):
                assert source.x == target.x
                assert source.z == target.z
            if op.code == OpCode.CAST:
                assert op.input != op.output
            if op.code == OpCode.MERGE_ADD:
                assert source.x == 3 * target.x


@COMBINATIONS
def test_only_zq_follows_sync(llama: ModelSpec, weights: FloatType, sync: FloatType) -> None:
    network, nodes = build_graph(replace(llama, weight_type=weights), 3, sync)
    assert [(pipe.name, pipe.size.float_type) for pipe in network.pipes] == [
        ("POS", F32),
        ("TOK", F32),
        ("X", F32),
        ("LG", F32),
        ("ZQ", sync),
    ]
    other = build_graph(replace(llama, weight_type=weights), 3, F32)[1]
    assert nodes == other


def test_pipes_of_the_network(llama: ModelSpec) -> None:
    network, _ = build_graph(llama, 3, Q80, n_batches=8)
    assert (network.n_batches, network.n_nodes, network.pre_syncs) == (8, 3, (POSITION_PIPE,))
    assert [(pipe.size.z, pipe.size.y, pipe.size.x) for pipe in network.pipes] == [
        (1, 8, 1),
        (1, 8, 1),
        (1, 8, 128),
        (1, 8, 300),
        (1, 8, 384),
    ]
    assert (network.pipes[TOKEN_PIPE].name, network.pipes[LOGITS_PIPE].name) == ("TOK", "LG")


def test_the_root_alone_has_the_embedding(llama: ModelSpec) -> None:
    _, nodes = build_graph(llama, 3, Q80)
    assert [[op.name for op in node.segments[0].ops] for node in nodes] == [["embedding"], [], []]
    assert nodes[0].segments[0].ops[0].weight_size == Size(F32, 1, 300, 128)


def test_each_layer_has_its_own_cache(llama: ModelSpec) -> None:
    _, nodes = build_graph(llama, 3, Q80)
    configs = [op.config for op in ops(nodes[1]) if isinstance(op.config, AttentionConfig)]
    caches = [(config.key_cache_buffer, config.value_cache_buffer) for config in configs]
    assert len({index for pair in caches for index in pair}) == 2 * llama.n_layers
    for config in configs:
        assert nodes[1].buffers[config.key_cache_buffer].size == Size(F32, 1, llama.seq_len, config.kv_dim_0)


def test_hidden_act_is_the_models(llama: ModelSpec) -> None:
    for act, code in ((HiddenAct.SILU, OpCode.SILU), (HiddenAct.GELU, OpCode.GELU)):
        _, (node,) = build_graph(replace(llama, hidden_act=act), 1, Q80)
        assert {op.code for op in ops(node) if op.name == "block_act"} == {code}


def test_numbers_are_those_that_the_wire_can_carry(llama: ModelSpec) -> None:
    """A node that got 1e-5 as a float32 and one that built its graph must compute alike."""
    _, (node,) = build_graph(llama, 1, Q80)
    epsilon = next(op.config.epsilon for op in ops(node) if isinstance(op.config, InvRmsConfig))
    assert epsilon == 9.999999747378752e-06


def test_rope_of_a_node_starts_where_its_heads_do(llama: ModelSpec) -> None:
    _, nodes = build_graph(llama, 3, Q80)
    rope = next(op.config for op in ops(nodes[2]) if isinstance(op.config, RopeConfig))
    assert (rope.q_dim_start, rope.q_dim_end, rope.kv_dim_start, rope.q_shift, rope.slice_dim) == (128, 192, 64, 64, 128)
    assert rope.cache_size == Size(F32, 1, llama.seq_len, 128)


def test_falcon_turns_every_head_alike(qwen3: ModelSpec) -> None:
    _, nodes = build_graph(qwen3, 3, Q80)
    rope = next(op.config for op in ops(nodes[2]) if isinstance(op.config, RopeConfig))
    assert (rope.type, rope.cache_size) == (RopeType.FALCON, Size(F32, 1, qwen3.seq_len, qwen3.head_dim))


def test_unequal_shares_build_too(llama: ModelSpec) -> None:
    """Two KV groups and one; logits in equal slices, the last padded."""
    llama = replace(llama, vocab_size=301)
    shares = deal_shares(llama, parse_shares("4/64,2/128"))
    network = build_network(llama, shares, Q80)
    assert network.pipes[LOGITS_PIPE].size.x == 302
    for number, share in enumerate(shares):
        node = build_node(llama, network, number, share)
        widths = {op.name: (op.weight_size.y, op.weight_size.x) for op in ops(node) if op.code == OpCode.MATMUL}
        assert widths["block_matmul_q"] == (128, 32 * share.n_heads)
        assert widths["block_matmul_k"] == (128, 32 * share.n_kv_heads)
        assert widths["block_matmul_wo"] == (32 * share.n_heads, 128)
        assert widths["block_matmul_w2"] == (share.ffn.size, 128)
        z = next(op.input for op in ops(node) if op.code == OpCode.MULTIHEAD_ATT)
        assert size_of(z, network, node).x == 32 * share.n_heads


def rope_of(node: NodeConfig) -> RopeConfig:
    (config,) = {replace(op.config, is_q=0) for op in ops(node) if isinstance(op.config, RopeConfig)}
    return config


@pytest.mark.parametrize("sizes", ["6/192", "4/64,2/128", "3/96,3/96", "1/64,1/64,4/64", "2/32,1/32,1/32,1/32,1/64"])
def test_a_rope_cache_holds_what_q_and_k_read(sizes: str, llama: ModelSpec) -> None:
    """C++ fills it once, from k's beginning to q's end, and reads q from a shift on, k from its beginning on."""
    shares = deal_shares(llama, parse_shares(sizes))
    network = build_network(llama, shares, Q80)
    for number, share in enumerate(shares):
        rope = rope_of(build_node(llama, network, number, share))
        assert (rope.q_dim_0, rope.kv_dim_0) == (32 * share.n_heads, 32 * share.n_kv_heads)
        assert rope.cache_size.x == rope.slice_dim == rope.q_dim_end - rope.kv_dim_start
        assert rope.q_shift == rope.q_dim_start - rope.kv_dim_start >= 0
        assert max(rope.q_shift + rope.q_dim_0, rope.kv_dim_0) <= rope.slice_dim
        assert rope.q_dim_start % 32 == rope.kv_dim_start % 32 == 0
        if len(share.heads) == len(share.kv_heads) == 1:
            assert rope.q_dim_start == 32 * share.heads[0].start
            assert rope.kv_dim_start == 32 * share.kv_heads[0].start


def test_heads_that_lie_apart_are_turned_as_if_they_were_the_first(llama: ModelSpec) -> None:
    llama = replace(llama, n_heads=9)
    shares = deal_shares(llama, parse_shares("5/96,4/96"))
    network = build_network(llama, shares, Q80)
    first, second = (rope_of(build_node(llama, network, number, share)) for number, share in enumerate(shares))
    assert (first.q_dim_start, first.q_dim_end, first.kv_dim_start, first.q_shift, first.slice_dim) == (0, 160, 0, 0, 160)
    assert (second.q_dim_start, second.q_dim_end, second.kv_dim_start, second.q_shift, second.slice_dim) == (0, 128, 0, 0, 128)


def test_more_nodes_than_kv_heads(qwen3: ModelSpec) -> None:
    """Each has a KV head to itself; the classifier's rows are filled up."""
    qwen3 = replace(qwen3, vocab_size=302)
    shares = deal_shares(qwen3, parse_shares("1/32,1/32,1/32,1/32,2/64"))
    network = build_network(qwen3, shares, Q80)
    assert network.pipes[LOGITS_PIPE].size.x == 5 * 61
    for number, share in enumerate(shares):
        node = build_node(qwen3, network, number, share)
        configs = [op.config for op in ops(node) if isinstance(op.config, AttentionConfig)]
        assert {(c.n_heads, c.n_heads_0, c.n_kv_heads, c.kv_dim_0) for c in configs} == {(6, share.n_heads, 3, 32)}
        assert next(op.weight_size for op in ops(node) if op.name == "final_matmul_logits") == Size(Q40, 1, 128, 61)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"weight_type": FloatType.F16}, "no graph for F16 weights"),
        ({"n_experts": 8, "n_active_experts": 3, "moe_hidden_dim": 96}, "LLAMA with 8 experts"),
        ({"arch": Architecture.QWEN3_MOE}, "QWEN3_MOE with 0 experts"),
        ({"arch": Architecture.QWEN3_MOE, "n_experts": 2, "n_active_experts": 3, "moe_hidden_dim": 96}, "3 active experts of 2"),
        ({"n_heads": 8}, "8 query heads cannot share 3 KV heads"),
        ({"dim": 100}, "Q40 weights: a row of 100 values is not a whole number of Q40 blocks"),
        ({"dim": 100, "weight_type": F32}, "Q80 partial sums: a row of 100 values is not a whole number"),
    ],
)
def test_models_without_a_graph(llama: ModelSpec, change: dict[str, object], problem: str) -> None:
    with pytest.raises(GraphError, match=problem):
        build_graph(replace(llama, **change), 1, Q80)


def test_syncs_without_a_graph(llama: ModelSpec) -> None:
    with pytest.raises(GraphError, match="as F32 or Q80, not Q40"):
        build_graph(llama, 1, Q40)
    with pytest.raises(GraphError, match="a batch of 0 rows"):
        build_graph(llama, 1, Q80, n_batches=0)
    with pytest.raises(GraphError, match="2 equal nodes cannot share"):
        build_graph(llama, 2, Q80)
