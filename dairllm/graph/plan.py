"""What a node does after a control packet, as plain data: which segments run, which pipe rows cross the wire between them.

The same plan drives the node that runs it and the protocol that must know how many bytes come next: a stream of pipe rows carries
no lengths, both ends compute them from the graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dairllm.errors import GraphError
from dairllm.graph.types import NetworkConfig, NodeConfig, Pipe, Sync, SyncType, row_bytes

__all__ = ["ROOT", "Exchange", "Run", "Transfer", "token_plan"]

ROOT = 0
"""Node number of the root."""


@dataclass(frozen=True, slots=True)
class Run:
    """Compute segments first .. stop - 1; none of those before the last one has anything to exchange."""

    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """Part of each row of a pipe that goes to `node` or comes from it; `slice` None is the whole row."""

    node: int
    slice: int | None
    row_bytes: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """One sync as seen from one node. On one link rows go in ascending order; how many is known at run time."""

    pipe: int
    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]


def token_plan(network: NetworkConfig, node: NodeConfig) -> tuple[Run | Exchange, ...]:
    """The steps of one control packet for `node` (0 is the root), in order; syncs that move nothing for it are left out.

    Raises:
        GraphError: a sync names a pipe that does not exist, or one whose rows cannot be cut into a slice for each node.
    """
    if not 0 <= node.node < network.n_nodes:
        raise GraphError(f"node {node.node} of a network of {network.n_nodes} nodes")
    return tuple(_steps(network, node))


def _steps(network: NetworkConfig, node: NodeConfig) -> Iterator[Run | Exchange]:
    first: int | None = None
    known: dict[Sync, Exchange] = {}  # a graph has a handful of different syncs, each with a transfer per node
    for number, segment in enumerate(node.segments):
        if segment.ops and first is None:
            first = number
        for sync in segment.syncs:
            if sync not in known:
                known[sync] = _exchange(network, node.node, sync, f"segment {number}")
        moving = [known[sync] for sync in segment.syncs if known[sync].sends or known[sync].receives]
        if moving and first is not None:
            yield Run(first, number + 1)
            first = None
        yield from moving
    if first is not None:
        yield Run(first, len(node.segments))


def _exchange(network: NetworkConfig, me: int, sync: Sync, where: str) -> Exchange:
    if not 0 <= sync.pipe < len(network.pipes):
        raise GraphError(f"{where} syncs pipe {sync.pipe}; there are {len(network.pipes)} pipes")
    pipe = network.pipes[sync.pipe]
    whole = _row_bytes(pipe, network.n_batches, 1, where)
    others = [other for other in range(network.n_nodes) if other != me]
    if sync.type == SyncType.WITH_ROOT:
        if me == ROOT:
            return Exchange(sync.pipe, tuple(Transfer(other, None, whole) for other in others), ())
        return Exchange(sync.pipe, (), (Transfer(ROOT, None, whole),))
    part = _row_bytes(pipe, network.n_batches, network.n_nodes, where)
    to_root_only = sync.type == SyncType.NODE_SLICES_EXCEPT_ROOT
    send_to = [other for other in others if not to_root_only or other == ROOT]
    receive_from = others if not to_root_only or me == ROOT else []
    return Exchange(
        sync.pipe,
        tuple(Transfer(other, me, part) for other in send_to),
        tuple(Transfer(other, other, part) for other in receive_from),
    )


def _row_bytes(pipe: Pipe, n_batches: int, n_parts: int, where: str) -> int:
    """Bytes of one of `n_parts` equal parts of a row of `pipe`."""
    size = pipe.size
    if size.z != 1 or size.y < n_batches:
        raise GraphError(f"{where} syncs pipe {pipe.name} of {size.z} x {size.y} rows; expected 1 x {n_batches}")
    if size.x % n_parts:
        raise GraphError(f"{where} syncs pipe {pipe.name}: a row of {size.x} values does not divide by {n_parts} nodes")
    try:
        nbytes = row_bytes(size.float_type, size.x // n_parts)
    except ValueError as error:
        slices = "" if n_parts == 1 else f", slices of {n_parts} nodes"
        raise GraphError(f"{where} syncs pipe {pipe.name}{slices}: {error}") from error
    if not nbytes:
        raise GraphError(f"{where} syncs pipe {pipe.name}, whose rows are empty")
    return nbytes
