"""Shares cover the model exactly once, each node's as its attention wants it; what cannot be dealt is refused with its numbers and with
what comes nearest."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dairllm.errors import ConfigError, GraphError
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.slicing import (
    Axis,
    Part,
    Share,
    ShareSize,
    Span,
    deal_shares,
    equal_shares,
    nearly_equal_sizes,
    parse_shares,
    weight_part,
)
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


@pytest.fixture
def smollm2(llama: ModelSpec) -> ModelSpec:
    return replace(llama, dim=576, n_heads=9, n_kv_heads=3, head_dim=64, hidden_dim=1536, vocab_size=49152)


def written(sizes: Iterable[ShareSize]) -> str:
    return ",".join(map(str, sizes))


def test_whole_groups_and_parts_of_one(smollm2: ModelSpec) -> None:
    """Nine heads, three a KV head, on two nodes: the second node has a whole group first, then its part of the one in the middle."""
    first, second = deal_shares(smollm2, parse_shares("5/768,4/768"))
    assert first == Share((Span(0, 5),), (Span(0, 2),), Span(0, 768), Span(0, 24576))
    assert second == Share((Span(6, 9), Span(5, 6)), (Span(2, 3), Span(1, 2)), Span(768, 1536), Span(24576, 49152))
    assert (second.n_heads, second.n_kv_heads) == (4, 2)
    assert weight_part(smollm2, second, "block_matmul_wo") == Part(Axis.COLUMNS, (Span(384, 576), Span(320, 384)))
    assert weight_part(smollm2, second, "block_matmul_v") == Part(Axis.ROWS, (Span(128, 192), Span(64, 128)))


def test_a_kv_head_on_several_nodes(smollm2: ModelSpec) -> None:
    shares = deal_shares(smollm2, [ShareSize(1, 512), ShareSize(2, 512), ShareSize(6, 512)])
    assert [share.heads for share in shares] == [(Span(0, 1),), (Span(1, 3),), (Span(3, 9),)]
    assert [share.kv_heads for share in shares] == [(Span(0, 1),), (Span(0, 1),), (Span(1, 3),)]


def test_classifier_rows_of_the_last_nodes_are_short_or_missing(smollm2: ModelSpec) -> None:
    shares = deal_shares(replace(smollm2, vocab_size=10), nearly_equal_sizes(smollm2, 4))
    assert [share.logits for share in shares] == [Span(0, 3), Span(3, 6), Span(6, 9), Span(9, 10)]
    shares = deal_shares(replace(smollm2, vocab_size=5), nearly_equal_sizes(smollm2, 4))
    assert [share.logits for share in shares] == [Span(0, 2), Span(2, 4), Span(4, 5), Span(5, 5)]


@pytest.mark.parametrize(
    ("n_nodes", "sizes"),
    [
        (1, "9/1536"),
        (2, "5/768,4/768"),
        (3, "3/512,3/512,3/512"),
        (4, "3/384,3/384,2/384,1/384"),
        (5, "3/320,2/320,2/320,1/288,1/288"),
        (9, "1/192,1/192,1/192,1/160,1/160,1/160,1/160,1/160,1/160"),
    ],
)
def test_nearly_equal_sizes(n_nodes: int, sizes: str, smollm2: ModelSpec) -> None:
    assert written(nearly_equal_sizes(smollm2, n_nodes)) == sizes


def test_nearly_equal_sizes_are_equal_where_they_can_be(llama: ModelSpec) -> None:
    """Also with a vocabulary that does not divide, and with columns of F32 that are no blocks."""
    odd = replace(llama, weight_type=FloatType.F32, hidden_dim=3 * 40)
    for spec in (llama, replace(llama, vocab_size=301), odd):
        sizes = nearly_equal_sizes(spec, 3)
        assert len(set(sizes)) == 1
    assert sizes[0] == ShareSize(2, 40)
    assert deal_shares(odd, sizes) == equal_shares(odd, 3)


def test_a_last_block_that_is_short(llama: ModelSpec) -> None:
    """F32 files may have any width: the last node has what is left of the last block."""
    odd = replace(llama, weight_type=FloatType.F32, hidden_dim=100)
    assert written(nearly_equal_sizes(odd, 3)) == "2/32,2/32,2/36"
    shares = deal_shares(odd, parse_shares("4/96,2/4"))
    assert [share.ffn for share in shares] == [Span(0, 96), Span(96, 100)]
    assert [share.ffn for share in deal_shares(odd, parse_shares("6/100"))] == [Span(0, 100)]


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("3/512,3/512,2/512", "they have 8 query heads, the model 9; the nearest that can be dealt: 4/512,3/512,2/512"),
        # sizes of another model: its ratio, 12:12:8 and 11:11:6
        ("12/5632,12/5632,8/3072", "they have 32 query heads, the model 9; the nearest that can be dealt: 4/608,3/608,2/320"),
        ("12/1536,12/1536,8/1000", "they have 32 query heads, the model 9; the nearest that can be dealt: 4/576,3/576,2/384"),
        ("9/768,0/768", "node 1 has no query head; the nearest that can be dealt: 8/768,1/768"),
        ("5/1536,4/0", "node 1 has no feed-forward columns; the nearest that can be dealt: 5/1504,4/32"),
        ("5/768,4/800", "they have 1568 feed-forward columns, the model 1536; the nearest that can be dealt: 5/768,4/768"),
        (
            "4/700,5/836",
            "node 0 has 700 feed-forward columns, no whole blocks of 32; the nearest that can be dealt: 4/704,5/832",
        ),
        (
            "2/512,2/512,5/512",
            "beside whole groups of 3 heads to a KV head, nodes have 2, 2, 2, which do not make up whole groups; "
            "the nearest that can be dealt: 1/512,2/512,6/512",
        ),
        ("999999999/999999999", "they have 999999999 query heads, the model 9; the nearest that can be dealt: 9/1536"),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_the_nearest(asked: str, problem: str, smollm2: ModelSpec) -> None:
    with pytest.raises(GraphError) as error:
        deal_shares(smollm2, parse_shares(asked))
    assert str(error.value) == f"shares {asked}: {problem}"
    nearest = str(error.value).rpartition(": ")[2]
    assert len(deal_shares(smollm2, parse_shares(nearest))) == len(asked.split(","))


def test_equal_shares_may_be_the_nearest(llama: ModelSpec) -> None:
    odd = replace(llama, weight_type=FloatType.F32, hidden_dim=3 * 40)
    with pytest.raises(GraphError, match=r"nearest that can be dealt: 2/40,2/40,2/40$"):
        deal_shares(odd, parse_shares("2/40,2/40,2/41"))


def test_heads_that_share_a_block(llama: ModelSpec) -> None:
    narrow = replace(llama, n_heads=8, n_kv_heads=2, head_dim=16)
    with pytest.raises(GraphError, match=r"node 0 has 3 query heads of 16 values, no whole blocks of 32; .*: 2/96,6/96$"):
        deal_shares(narrow, parse_shares("3/96,5/96"))
    assert deal_shares(replace(narrow, weight_type=FloatType.F32), parse_shares("3/96,5/96"))[0].n_heads == 3
    threes = replace(llama, head_dim=16, n_heads=12, n_kv_heads=4)
    with pytest.raises(GraphError, match="groups of 3 heads to a KV head, and heads 2 at a time, cannot be parted so"):
        deal_shares(threes, parse_shares("2/64,2/64,8/64"))


def test_too_many_nodes(smollm2: ModelSpec) -> None:
    problem = (
        "10 nodes cannot share this model, 9 can at most: each needs query heads, of which there are 9, "
        "and a block of 32 feed-forward columns, of which there are 48"
    )
    for refuse in (lambda: nearly_equal_sizes(smollm2, 10), lambda: deal_shares(smollm2, [ShareSize(1, 32)] * 10)):
        with pytest.raises(GraphError) as error:
            refuse()
        assert str(error.value) == problem
    with pytest.raises(GraphError, match=r"5 nodes cannot share this model, 4 can at most: .* 9, and a block .* there are 4$"):
        nearly_equal_sizes(replace(smollm2, hidden_dim=128), 5)
    with pytest.raises(GraphError, match=r"5 nodes cannot share this model, 4 can at most: .* 8, dealt 2 at a time, and"):
        nearly_equal_sizes(replace(smollm2, head_dim=16, n_heads=8, n_kv_heads=2), 5)


def test_equal_nodes_need_no_blocks(llama: ModelSpec) -> None:
    slim = replace(llama, weight_type=FloatType.F32, hidden_dim=30)
    assert written(nearly_equal_sizes(slim, 3)) == "2/10,2/10,2/10"
    with pytest.raises(GraphError, match=r"2 nodes cannot share this model, 1 can at most: .*; 3 equal nodes can, too$"):
        nearly_equal_sizes(slim, 2)


def test_no_shares_at_all(smollm2: ModelSpec) -> None:
    for refuse in (lambda: nearly_equal_sizes(smollm2, 0), lambda: deal_shares(smollm2, ())):
        with pytest.raises(GraphError, match="one"):
            refuse()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"n_heads": 8}, "8 query heads cannot share 3 KV heads"),
        ({"head_dim": 8}, "72 attention values are not whole blocks of 32"),
    ],
)
def test_models_that_nobody_can_share(change: dict[str, int], problem: str, smollm2: ModelSpec) -> None:
    with pytest.raises(GraphError, match=problem):
        nearly_equal_sizes(replace(smollm2, **change), 2)


def test_shares_as_a_user_writes_them() -> None:
    assert parse_shares("2/64") == (ShareSize(2, 64),)
    assert parse_shares(" 2/64, 1/32,0/0 ") == (ShareSize(2, 64), ShareSize(1, 32), ShareSize(0, 0))
    assert written(parse_shares("2/64,1/32")) == "2/64,1/32"


@pytest.mark.parametrize(
    "text", ["", ",", "2", "2/", "/2", "2/64,", "2/64;1/32", "-1/32", "2/64/1", "1.5/32", "2 / 64", "1/9999999999", "\u0664/3"]
)
def test_what_are_no_shares(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected query heads/feed-forward columns of each node, as in 2/64,1/32; found "):
        parse_shares(text)


def covers_once(spans: Iterable[Span], whole: int) -> bool:
    return sorted(i for span in spans for i in range(span.start, span.stop)) == list(range(whole))


@st.composite
def _models(draw: st.DrawFn) -> ModelSpec:
    weight_type = draw(st.sampled_from([FloatType.F32, FloatType.Q40, FloatType.Q80]))
    head_dim = draw(st.sampled_from([16, 32, 48, 64, 80]))
    group, kv_heads = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    width = draw(st.integers(1, 40)) * 32 - (draw(st.sampled_from([0, 0, 8, 20])) if weight_type == FloatType.F32 else 0)
    spec = ModelSpec(
        Architecture.LLAMA, dim=64, hidden_dim=width, n_layers=1, n_heads=group * kv_heads, n_kv_heads=kv_heads, head_dim=head_dim,
        vocab_size=draw(st.integers(1, 100)), seq_len=8, weight_type=weight_type,
    )  # fmt: skip
    assume(weight_type == FloatType.F32 or spec.q_dim % 32 == 0)
    return spec


def check_shares(spec: ModelSpec, sizes: Sequence[ShareSize], shares: Sequence[Share]) -> None:
    assert [(share.n_heads, share.ffn.size) for share in shares] == [(size.heads, size.ffn) for size in sizes]
    assert covers_once((span for share in shares for span in share.heads), spec.n_heads)
    assert covers_once((share.ffn for share in shares), spec.ff_dim)
    assert covers_once((share.logits for share in shares), spec.vocab_size)
    assert len(shares[0].heads) == len(shares[0].kv_heads) == 1
    rows = -(-spec.vocab_size // len(shares))
    assert all(share.logits.start == min(node * rows, spec.vocab_size) for node, share in enumerate(shares))
    group = spec.n_heads // spec.n_kv_heads
    for share in shares:
        heads, kv_heads = ([i for span in spans for i in range(span.start, span.stop)] for spans in (share.heads, share.kv_heads))
        assert kv_heads == list(dict.fromkeys(head // group for head in heads))
        for number, head in enumerate(heads):  # as the attention op counts
            assert head // group == kv_heads[number // group]
        if spec.weight_type != FloatType.F32:
            values = [span.times(spec.head_dim) for span in share.heads]
            assert all(value % 32 == 0 for span in values for value in (span.start, span.stop))
            assert share.ffn.start % 32 == share.ffn.stop % 32 == 0


@settings(deadline=None)
@given(_models(), st.data())
def test_nearly_equal_shares_keep_every_rule(spec: ModelSpec, data: st.DataObject) -> None:
    try:
        nearly_equal_sizes(spec, 1000)
        raise AssertionError("1000 nodes")
    except GraphError as error:
        most = int(str(error).split(", ")[1].split()[0])
    n_nodes = data.draw(st.integers(1, most))
    sizes = nearly_equal_sizes(spec, n_nodes)
    check_shares(spec, sizes, deal_shares(spec, sizes))
    with pytest.raises(GraphError, match=f"{most} can at most"):
        nearly_equal_sizes(replace(spec, vocab_size=most), most + 1)  # where no shares are equal


@settings(deadline=None)
@given(_models(), st.lists(st.builds(ShareSize, st.integers(0, 20), st.integers(0, 400)), min_size=1, max_size=4))
def test_what_is_asked_for_or_the_nearest_can_be_dealt(spec: ModelSpec, sizes: list[ShareSize]) -> None:
    try:
        shares = deal_shares(spec, sizes)
    except GraphError as error:
        assume("nearest" in str(error))
        sizes = list(parse_shares(str(error).rpartition(": ")[2]))
        shares = deal_shares(spec, sizes)
    check_shares(spec, sizes, shares)
