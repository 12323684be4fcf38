"""What paging needs and what it is given: blocks of the model file, counted before anything is loaded.

A node that cannot hold its weights pins some blocks of the file and passes the others through a *streaming buffer*: read ahead
of their use, evicted behind it. The budget is counted in blocks. What is small or read a row at a time is no block: norms are
copied into memory at start, rows of the embedding are read one by one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dairllm.config import Paging
from dairllm.engine.pieces import PIECE_BYTES, Piece, segment_pieces
from dairllm.engine.weights import Weights
from dairllm.graph.types import MatmulConfig, NetworkConfig, NodeConfig, Op, OpCode, row_bytes
from dairllm.paging.schedule import Block, blocks_of, group_pieces

__all__ = [
    "BLOCK_BYTES",
    "IO_MODES",
    "POLICIES",
    "STREAMING_BYTES",
    "IoMode",
    "PagingMetrics",
    "PagingNeeds",
    "PagingSettings",
    "Policy",
    "block_size",
    "copied_bytes",
    "weights_needs",
]

BLOCK_BYTES = 2 << 20
"""The usual block: what one huge page maps, and the largest folio that the page cache reads at once."""

STREAMING_BYTES = 32 << 20
"""Of the streaming buffer that pays: enough for reads and computing not to wait for each other; more takes from what could be pinned."""

_LEAST_BLOCK = 64 << 10
_EXPERT_BLOCKS = 8
_PAGE = 4096
_UNIT_BYTES = 3 << 10
"""What is remembered of a unit: its instructions while they are made, its blocks, its lookahead."""
_BLOCK_BYTES = 256
"""What is remembered of a block."""

IoMode = Literal["auto", "mmap", "buffered", "direct"]
Policy = Literal["pinned", "lru"]
POLICIES: tuple[Policy, ...] = ("pinned", "lru")
IO_MODES: tuple[IoMode, ...] = ("mmap", "buffered", "direct")


@dataclass(frozen=True, slots=True)
class PagingSettings:
    """How a node pages.

    Attributes:
        budget_blocks: blocks that may be in memory at once, from the needs' streaming_blocks_min on.
        policy: "pinned": as many blocks as fit stay, evenly spread over the pass, the others pass through a streaming buffer.
            "lru": the least recently used block goes; the wrong one to go in a dense model, whose use is a cycle.
        io_mode: how blocks come into memory (dairllm.paging.mapping); "auto" measures the file at start.
        readers: threads that read; None: as many as measurements find best.
        threads: that compute; None: likewise, of those that there are.
        block_bytes: a power of two from 4096 on; None: `block_size` of the weights, which is what the needs were counted in.
    """

    budget_blocks: int
    policy: Policy = "pinned"
    io_mode: IoMode = "auto"
    readers: int | None = None
    block_bytes: int | None = None
    threads: int | None = None

    @classmethod
    def chosen(cls, paging: Paging, budget_blocks: int, block_bytes: int) -> "PagingSettings":
        """By somebody's settings, with the budget that a plan found."""
        readers = None if paging.readers == "auto" else int(paging.readers)
        threads = None if paging.threads == "auto" else int(paging.threads)
        return cls(budget_blocks, paging.policy, paging.io_mode, readers, block_bytes, threads)


@dataclass(slots=True)
class PagingMetrics:
    """Counts since the node was opened.

    Attributes:
        hits: blocks that were in memory when their unit came.
        misses: blocks that were waited for.
        wait_seconds: for how long in all.
        bytes: read from the file.
    """

    hits: int = 0
    misses: int = 0
    wait_seconds: float = 0.0
    bytes: int = 0


class PagingNeeds(NamedTuple):
    """What paging a node's weights takes.

    Attributes:
        blocks_total: blocks that a pass over all segments reads; with such a budget nothing is ever read twice.
        streaming_blocks_min: the least budget that works.
        streaming_blocks_best: of the streaming that pays; a budget beyond that pins blocks.
        block_bytes: of one block.
        copied_bytes: memory beside the blocks: norms, rows of the embedding, weights that lie in memory.
        remembered_bytes: what is kept in mind of units and blocks.
        expert_blocks: of blocks_total, those of experts.
        active_blocks: of those, what one row goes through, at most.
    """

    blocks_total: int
    streaming_blocks_min: int
    streaming_blocks_best: int
    block_bytes: int
    copied_bytes: int
    remembered_bytes: int = 0
    expert_blocks: int = 0
    active_blocks: int = 0

    def pinned(self, budget: int) -> int:
        """Pinned blocks, of a budget in blocks; of experts, about which nothing is known before, none."""
        if self.expert_blocks:
            return min(self.blocks_total - self.expert_blocks, max(0, budget - 2 * self.streaming_blocks_min))
        return max(0, budget - self.streaming_blocks_best)

    def missing(self, budget: int) -> int:
        """Blocks that a pass of one row reads, at most: experts that were used before may be there."""
        return self.blocks_total - self.expert_blocks + self.active_blocks - self.pinned(budget)


def weights_needs(network: NetworkConfig, node: NodeConfig, weights: Weights, *, block_bytes: int | None = None) -> PagingNeeds:
    """The needs of a node. Weights whose views have no offset are in memory already. Nothing is read or allocated.

    Args:
        block_bytes: where another size than `block_size` is wanted.

    Raises:
        GraphError: the weights are not those that the graph names.
    """
    size = block_bytes or block_size(node, weights)
    total: set[Block] = set()
    expert_blocks: set[Block] = set()
    widest, expert_room, active, units = 1, 0, 0, 0
    for pieces in segment_pieces(node, weights, PIECE_BYTES):
        for group in group_pieces(pieces, size):
            members = [pieces[place] for place in group]
            units += 1
            total.update(blocks_of(_spans(members), size))
            if members[0].experts:
                experts = zip(*(piece.spans for piece in members if piece.spans), strict=True)  # of each, its matrices in the file
                chosen = _active(node) * max((len(blocks_of(spans, size)) for spans in experts), default=0)
                expert_room, active = max(expert_room, chosen), active + chosen
                expert_blocks.update(blocks_of(_spans(members), size))
            else:
                widest = max(widest, len(blocks_of(_spans(members), size)))
    least = max(widest, expert_room) + 1
    best = max(STREAMING_BYTES // size, 2 * widest, least)
    count = len(total)
    remembered = units * _UNIT_BYTES + count * _BLOCK_BYTES if count else 0
    copied, active = copied_bytes(network, node, weights), min(active, len(expert_blocks))
    return PagingNeeds(count, min(least, count), min(best, count), size, copied, remembered, len(expert_blocks), active)


def _spans(pieces: Iterable[Piece]) -> Iterable[tuple[int, int]]:
    return (span for piece in pieces for span in piece.spans)


def _active(node: NodeConfig) -> int:
    """Experts of a layer that one row goes through, at most."""
    return max((op.config.n_active_experts for op in _weighted(node) if isinstance(op.config, MatmulConfig)), default=0)


def _weighted(node: NodeConfig) -> Iterable[Op]:
    return (op for segment in node.segments for op in segment.ops if op.weight_size.length)


def block_size(node: NodeConfig, weights: Weights) -> int:
    """Bytes of a block: BLOCK_BYTES, or less where experts are small: those that no row goes through are not to be read with others."""
    strides = [weights.view(op).expert for op in _weighted(node) if op.weight_size.z > 1]
    size = BLOCK_BYTES
    while strides and size > _LEAST_BLOCK and size * _EXPERT_BLOCKS > min(strides):
        size //= 2
    return size


def copied_bytes(network: NetworkConfig, node: NodeConfig, weights: Weights) -> int:
    """Memory that weights take beside the blocks."""
    total = weights.nbytes
    for op in _weighted(node):
        if weights.view(op).offset is None:
            continue
        if op.code == OpCode.EMBEDDING:
            row = row_bytes(op.weight_size.float_type, op.weight_size.x)
            total += network.n_batches * (-(-row // _PAGE) + 1) * _PAGE
        elif op.code != OpCode.MATMUL:
            total += -(-op.weight_size.nbytes // 64) * 64
    return total
