"""What crosses the wire after a control packet, seen from every node."""

from collections.abc import Sequence

import pytest

from dairllm.errors import GraphError
from dairllm.graph.build import build_graph
from dairllm.graph.model import ModelSpec
from dairllm.graph.plan import Exchange, Run, Transfer, token_plan
from dairllm.graph.types import (
    FloatType,
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
    Size,
    Sync,
    SyncType,
)

X, ZQ = 0, 1
PIPES = (Pipe("X", Size(FloatType.F32, 1, 32, 12)), Pipe("ZQ", Size(FloatType.Q80, 1, 32, 96)))
WHOLE_X, SLICE_ZQ = 48, 34
_POINTER = Pointer(PointerSource.PIPE, X, PointerType.BATCH)
OP = Op(OpCode.CAST, "cast", 0, _POINTER, _POINTER, Size.none(), NoConfig())


def segment(*syncs: tuple[int, SyncType], ops: int = 1) -> Segment:
    return Segment((OP,) * ops, tuple(Sync(*sync) for sync in syncs))


def plan_of(node: int, segments: Sequence[Segment], n_nodes: int = 3, pipes: tuple[Pipe, ...] = PIPES) -> tuple[Run | Exchange, ...]:
    return token_plan(NetworkConfig(32, n_nodes, pipes, ()), NodeConfig(node, (), tuple(segments)))


def test_with_root_goes_from_the_root_to_all() -> None:
    segments = [segment((X, SyncType.WITH_ROOT), ops=0)]
    assert plan_of(0, segments) == (Exchange(X, (Transfer(1, None, WHOLE_X), Transfer(2, None, WHOLE_X)), ()),)
    assert plan_of(2, segments) == (Exchange(X, (), (Transfer(0, None, WHOLE_X),)),)


def test_node_slices_go_from_all_to_all() -> None:
    segments = [segment((ZQ, SyncType.NODE_SLICES), ops=0)]
    assert plan_of(1, segments) == (
        Exchange(ZQ, (Transfer(0, 1, SLICE_ZQ), Transfer(2, 1, SLICE_ZQ)), (Transfer(0, 0, SLICE_ZQ), Transfer(2, 2, SLICE_ZQ))),
    )
    assert plan_of(0, segments) == (
        Exchange(ZQ, (Transfer(1, 0, SLICE_ZQ), Transfer(2, 0, SLICE_ZQ)), (Transfer(1, 1, SLICE_ZQ), Transfer(2, 2, SLICE_ZQ))),
    )


def test_except_root_goes_to_the_root_only() -> None:
    segments = [segment((ZQ, SyncType.NODE_SLICES_EXCEPT_ROOT), ops=0)]
    assert plan_of(2, segments) == (Exchange(ZQ, (Transfer(0, 2, SLICE_ZQ),), ()),)
    assert plan_of(0, segments) == (Exchange(ZQ, (), (Transfer(1, 1, SLICE_ZQ), Transfer(2, 2, SLICE_ZQ))),)


def test_segments_that_exchange_nothing_run_as_one() -> None:
    segments = [segment(), segment(), segment((X, SyncType.WITH_ROOT)), segment(), segment(ops=0)]
    plan = plan_of(1, segments)
    assert plan[0] == Run(0, 3)
    assert isinstance(plan[1], Exchange)
    assert plan[2:] == (Run(3, 5),)


def test_a_segment_without_ops_is_not_run() -> None:
    plan = plan_of(1, [segment((X, SyncType.WITH_ROOT), ops=0), segment((ZQ, SyncType.NODE_SLICES), (X, SyncType.WITH_ROOT))])
    assert [type(step).__name__ for step in plan] == ["Exchange", "Run", "Exchange", "Exchange"]
    assert plan[1] == Run(1, 2)


def test_an_empty_graph_has_an_empty_plan() -> None:
    assert plan_of(1, []) == ()


def test_one_node_alone_runs_everything_at_once(llama: ModelSpec) -> None:
    network, (node,) = build_graph(llama, 1, FloatType.Q80)
    assert token_plan(network, node) == (Run(0, len(node.segments)),)


def test_what_one_sends_another_receives(qwen3_moe: ModelSpec) -> None:
    """Link by link, in order, over the whole of a real graph."""
    network, nodes = build_graph(qwen3_moe, 3, FloatType.Q80)
    sent: dict[tuple[int, int], list[tuple[int, int | None, int]]] = {}
    received: dict[tuple[int, int], list[tuple[int, int | None, int]]] = {}
    for node in nodes:
        for step in token_plan(network, node):
            if isinstance(step, Exchange):
                for transfer in step.sends:
                    sent.setdefault((node.node, transfer.node), []).append((step.pipe, transfer.slice, transfer.row_bytes))
                for transfer in step.receives:
                    received.setdefault((transfer.node, node.node), []).append((step.pipe, transfer.slice, transfer.row_bytes))
    assert sent == received
    assert set(sent) == {(a, b) for a in range(3) for b in range(3) if a != b}
    per_layer = 2
    assert len(sent[0, 1]) == 1 + per_layer * qwen3_moe.n_layers
    assert len(sent[1, 0]) == per_layer * qwen3_moe.n_layers + 1
    assert len(sent[1, 2]) == per_layer * qwen3_moe.n_layers


@pytest.mark.parametrize(
    ("pipe", "sync", "problem"),
    [
        (Pipe("P", Size(FloatType.F32, 1, 32, 13)), SyncType.NODE_SLICES, "pipe P: a row of 13 values does not divide by 3 nodes"),
        (Pipe("P", Size(FloatType.Q80, 1, 32, 48)), SyncType.WITH_ROOT, "pipe P: a row of 48 values is not a whole number"),
        (Pipe("P", Size(FloatType.F32, 2, 32, 12)), SyncType.WITH_ROOT, "pipe P of 2 x 32 rows; expected 1 x 32"),
        (Pipe("P", Size(FloatType.F32, 1, 31, 12)), SyncType.WITH_ROOT, "pipe P of 1 x 31 rows; expected 1 x 32"),
        (Pipe("P", Size(FloatType.F32, 1, 32, 0)), SyncType.WITH_ROOT, "pipe P, whose rows are empty"),
        (Pipe("P", Size(FloatType.NONE, 1, 32, 0)), SyncType.NODE_SLICES, "pipe P, whose rows are empty"),
    ],
)
def test_rows_that_cannot_be_cut(pipe: Pipe, sync: SyncType, problem: str) -> None:
    with pytest.raises(GraphError, match=f"segment 1 syncs {problem}"):
        plan_of(1, [segment(), segment((0, sync))], pipes=(pipe,))


def test_slices_that_cut_a_block() -> None:
    problem = "segment 0 syncs pipe ZQ, slices of 2 nodes: a row of 48 values is not a whole number of Q80 blocks"
    with pytest.raises(GraphError, match=problem):
        plan_of(1, [segment((ZQ, SyncType.NODE_SLICES))], n_nodes=2)


def test_a_pipe_that_does_not_exist() -> None:
    with pytest.raises(GraphError, match="segment 0 syncs pipe 2; there are 2 pipes"):
        plan_of(1, [segment((2, SyncType.WITH_ROOT))])


@pytest.mark.parametrize("node", [-1, 3])
def test_a_node_that_does_not_exist(node: int) -> None:
    with pytest.raises(GraphError, match=f"node {node} of a network of 3 nodes"):
        plan_of(node, [])
