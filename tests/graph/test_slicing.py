"""Equal shares cover the model exactly once; what does not divide is refused with its numbers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dairllm.errors import GraphError
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.slicing import Axis, Part, Share, Span, equal_shares, weight_part
from dairllm.graph.types import FloatType


def test_equal_shares(llama: ModelSpec) -> None:
    assert equal_shares(llama, 3) == (
        Share((Span(0, 2),), (Span(0, 1),), Span(0, 64), Span(0, 100)),
        Share((Span(2, 4),), (Span(1, 2),), Span(64, 128), Span(100, 200)),
        Share((Span(4, 6),), (Span(2, 3),), Span(128, 192), Span(200, 300)),
    )


def test_one_node_has_all(llama: ModelSpec) -> None:
    assert equal_shares(llama, 1) == (Share((Span(0, 6),), (Span(0, 3),), Span(0, 192), Span(0, 300)),)


def test_shares_of_experts_are_of_each_expert(qwen3_moe: ModelSpec) -> None:
    assert equal_shares(qwen3_moe, 3)[1].ffn == Span(32, 64)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("block_matmul_q", Part(Axis.ROWS, (Span(64, 128),))),
        ("block_matmul_k", Part(Axis.ROWS, (Span(32, 64),))),
        ("block_matmul_v", Part(Axis.ROWS, (Span(32, 64),))),
        ("block_matmul_wo", Part(Axis.COLUMNS, (Span(64, 128),))),
        ("block_matmul_w1", Part(Axis.ROWS, (Span(64, 128),))),
        ("block_matmul_w2", Part(Axis.COLUMNS, (Span(64, 128),))),
        ("block_matmul_w3", Part(Axis.ROWS, (Span(64, 128),))),
        ("final_matmul_logits", Part(Axis.ROWS, (Span(100, 200),))),
        *((name, Part(Axis.WHOLE, None)) for name in ("embedding", "block_moe_gate", "block_norm_q", "block_norm_0", "final_norm")),
    ],
)
def test_the_part_of_each_weight(name: str, part: Part, llama: ModelSpec) -> None:
    assert weight_part(llama, equal_shares(llama, 3)[1], name) == part


def test_an_op_without_a_weight(llama: ModelSpec) -> None:
    with pytest.raises(GraphError, match="op 'block_mul' has no weight"):
        weight_part(llama, equal_shares(llama, 1)[0], "block_mul")


def test_what_does_not_divide_is_named_and_what_would_do(llama: ModelSpec) -> None:
    with pytest.raises(GraphError) as error:
        equal_shares(replace(llama, vocab_size=301), 2)
    assert str(error.value) == (
        "2 equal nodes cannot share this model: 3 KV heads do not divide by 2, 301 classifier rows do not divide by 2; possible: 1"
    )
    with pytest.raises(GraphError, match=r"4 equal nodes .*6 query heads .*3 KV heads .*; possible: 1, 3$"):
        equal_shares(llama, 4)


def test_blocks_are_not_cut(llama: ModelSpec) -> None:
    narrow = replace(llama, hidden_dim=96 + 48)
    with pytest.raises(GraphError, match="48 feed-forward columns a node are not whole blocks of 32"):
        equal_shares(narrow, 3)
    assert len(equal_shares(replace(narrow, weight_type=FloatType.F32), 3)) == 3
    with pytest.raises(GraphError, match="80 attention values a node are not whole blocks of 32"):
        equal_shares(replace(llama, head_dim=40), 3)


def test_no_nodes(llama: ModelSpec) -> None:
    with pytest.raises(GraphError, match="there must be one at least"):
        equal_shares(llama, 0)


@given(
    n_nodes=st.integers(1, 8),
    kv=st.integers(1, 4),
    group=st.integers(1, 4),
    ffn=st.integers(1, 8),
    vocab=st.integers(1, 60),
)
def test_shares_cover_everything_once(n_nodes: int, kv: int, group: int, ffn: int, vocab: int) -> None:
    heads = n_nodes * kv * group
    spec = ModelSpec(
        Architecture.LLAMA, dim=64, hidden_dim=32 * n_nodes * ffn, n_layers=1, n_heads=heads, n_kv_heads=n_nodes * kv, head_dim=32,
        vocab_size=n_nodes * vocab, seq_len=8, weight_type=FloatType.Q40,
    )  # fmt: skip
    shares = equal_shares(spec, n_nodes)
    for spans, whole in (
        ([span for s in shares for span in s.heads], spec.n_heads),
        ([span for s in shares for span in s.kv_heads], spec.n_kv_heads),
        ([s.ffn for s in shares], spec.ff_dim),
        ([s.logits for s in shares], spec.vocab_size),
    ):
        assert [i for span in spans for i in range(span.start, span.stop)] == list(range(whole))
    assert all(share.heads == tuple(span.times(group) for span in share.kv_heads) for share in shares)
