"""What a node will hold, decided before anything is loaded: a budget, not a hope.

    limit  >=  program and interpreter  +  KV cache  +  pipes, buffers, tables  +  weights

The weights are all in place where they fit. Where they do not, they are paged: as many blocks stay as fit, the others pass through a ring.
Unless somebody chose them, the context is made no longer than a quarter of the limit has room for, and a prompt's batch no larger than a
tenth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dairllm import machine
from dairllm.config import MemoryAmount
from dairllm.engine.memory import Layout
from dairllm.engine.paging import PagingNeeds, paging_needs
from dairllm.engine.tables import table_bytes
from dairllm.errors import LimitError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.slicing import Share
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig
from dairllm.units import format_size

__all__ = ["BATCH_ROWS", "BuildGraph", "MemoryPlan", "plan_memory"]

BATCH_ROWS = (256, 128, 64, 32)
"""Rows of a prompt that may go through the layers together: where weights are paged, each batch reads them once."""

COMING_BYTES = 12 << 20
"""What a process holds when its kernels run, beyond what it holds while it plans: object code, threads, the allocator's reserve."""

_LEAST_CONTEXT = 256

BuildGraph = Callable[[int, int], tuple[NetworkConfig, NodeConfig]]
"""The graph for a context length and rows of a batch."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a node holds, in bytes.

    Attributes:
        limit: the most that it may; `limit_text` as it was given.
        seq_len: positions of the context.
        rows: of a batch.
        runtime: interpreter, libraries, kernels, tokenizer.
        kv_cache: for all positions.
        buffers: pipes, buffers, tables, and weights that are copied.
        needs: of the weights, in blocks.
        room_blocks: blocks of weights that fit beside all that; None where all of them do.
    """

    limit: int
    limit_text: str
    seq_len: int
    rows: int
    runtime: int
    kv_cache: int
    buffers: int
    needs: PagingNeeds
    room_blocks: int | None

    @property
    def fixed(self) -> int:
        """All but the weights."""
        return self.runtime + self.kv_cache + self.buffers

    @property
    def weights(self) -> int:
        """All that a pass reads."""
        return self.needs.blocks_total * self.needs.block_bytes

    @property
    def resident(self) -> int:
        """Weights in memory at once, at most."""
        return self.weights if self.room_blocks is None else self.room_blocks * self.needs.block_bytes

    @property
    def missing(self) -> int:
        """Weights that a token reads from the disk: what neither fits nor is part of the ring's coming and going."""
        if self.room_blocks is None:
            return 0
        return self.weights - max(0, self.room_blocks - self.needs.ring_blocks_best) * self.needs.block_bytes

    @property
    def total(self) -> int:
        return self.fixed + self.resident

    @property
    def is_roomy(self) -> bool:
        """Whether the batch takes nothing from the weights that matters."""
        return self.room_blocks is None or (self.buffers <= self.limit // 10 and self.room_blocks >= self.needs.ring_blocks_best)

    @property
    def smallest(self) -> int:
        """The least limit that works with this context and batch."""
        return self.fixed + self.needs.ring_blocks_min * self.needs.block_bytes

    def table(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) of each part, their sum, and what could be."""
        if self.room_blocks is None:
            weights = [("weights, all in memory", self.weights, "in place, in the model's file")]
        else:
            ring = min(self.needs.ring_blocks_best, self.room_blocks)
            kept = (self.room_blocks - ring) * self.needs.block_bytes
            weights = [
                ("weights that stay", kept, f"of {format_size(self.weights)}; a token reads {format_size(self.missing)} from the disk"),
                ("ring of the others", ring * self.needs.block_bytes, f"{ring} blocks of {format_size(self.needs.block_bytes)}"),
            ]
        return [
            ("program", self.runtime, "interpreter, libraries, kernels, tokenizer"),
            ("KV cache", self.kv_cache, f"{self.seq_len} tokens"),
            ("buffers", self.buffers, f"batches of {self.rows} rows"),
            *weights,
            (
                "in all",
                self.total,
                f"limit {self.limit_text}" + ("" if self.limit_text == format_size(self.limit) else f" = {format_size(self.limit)}"),
            ),
            ("smallest limit", self.smallest, f"everything in memory from {format_size(self.fixed + self.weights)} on"),
        ]


def plan_memory(
    model: ModelFile,
    build: BuildGraph,
    limit: MemoryAmount,
    *,
    share: Share | None = None,
    max_seq_len: int | None = None,
    rows: Sequence[int] = BATCH_ROWS,
    kv_cache: FloatType = FloatType.F32,
    runtime: int | None = None,
) -> MemoryPlan:
    """Decide context, batch and room for weights.

    Args:
        model: open; its spec's seq_len is the longest context.
        share: of the node; None for all of the model.
        max_seq_len: a context that somebody chose.
        rows: batches to choose from, the largest first.
        kv_cache: F32, F16 or Q80.
        runtime: what the process holds beside model and caches; estimated from what it holds now if None.

    Raises:
        LimitError: nothing works within the limit; has the table and the smallest limit that would.
        GraphError: the model cannot be computed.
    """
    nbytes = limit.resolve()
    runtime = machine.rss_bytes() + COMING_BYTES if runtime is None else runtime
    for seq_len in _contexts(model.spec.seq_len, max_seq_len):
        least = max_seq_len is not None or seq_len <= _LEAST_CONTEXT
        for count in rows:
            plan = _plan(model, share, build(seq_len, min(count, seq_len)), kv_cache, (nbytes, str(limit), seq_len, runtime))
            if plan.smallest <= nbytes and (least or plan.kv_cache <= nbytes // 4) and (count == rows[-1] or plan.is_roomy):
                return plan
    raise LimitError(_too_small(plan))


def _contexts(longest: int, chosen: int | None) -> Iterator[int]:
    """To try one after the other."""
    if chosen is not None:
        yield min(chosen, longest)
        return
    yield longest
    while longest > _LEAST_CONTEXT:
        longest = max(longest // 2, _LEAST_CONTEXT)
        yield longest


def _plan(
    model: ModelFile, share: Share | None, graph: tuple[NetworkConfig, NodeConfig], kv_cache: FloatType, given: tuple[int, str, int, int]
) -> MemoryPlan:
    limit, text, seq_len, runtime = given
    network, node = graph
    layout = Layout(network, node, kv_cache)
    needs = paging_needs(network, node, model, share)
    buffers = layout.nbytes - layout.cache_bytes + table_bytes(node) + needs.copied_bytes
    room = max(0, (limit - runtime - layout.cache_bytes - buffers) // needs.block_bytes)
    room_blocks = None if room >= needs.blocks_total else room
    return MemoryPlan(limit, text, seq_len, network.n_batches, runtime, layout.cache_bytes, buffers, needs, room_blocks)


def _too_small(plan: MemoryPlan) -> str:
    parts = ", ".join(f"{format_size(size)} {what}" for what, size, _ in plan.table()[:3])
    ring = plan.needs.ring_blocks_min * plan.needs.block_bytes
    return (
        f"the memory limit {plan.limit_text} ({format_size(plan.limit)}) is too small: {parts}, {format_size(ring)} to page the weights "
        f"through; {format_size(plan.smallest)} would do. A shorter context (--max-seq-len, now {plan.seq_len}) needs less"
    )
