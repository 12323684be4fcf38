"""What a node will hold, decided before anything is loaded: a budget, not a hope.

    limit  >=  program and interpreter  +  KV cache  +  pipes, buffers, tables, threads  +  weights

What the program holds is measured, not guessed: whoever plans has loaded already what will run, the tokenizer included. The rest is
counted. The weights are all in place where they fit. Where they do not, they are paged: as many blocks are pinned as fit, the
others pass through a streaming buffer. Where they do, and a server asks for it, what is left goes to more KV caches, each for
another conversation. Unless somebody chose them, the context is made no longer than a quarter of the limit has room for, and a
prompt's batch no larger than an eighth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from dairllm import machine
from dairllm.config import MemoryAmount
from dairllm.engine.program import memory_needs
from dairllm.engine.tables import cache_positions
from dairllm.engine.weights import FileWeights, Weights
from dairllm.errors import LimitError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig
from dairllm.paging.needs import PagingNeeds, weights_needs
from dairllm.units import format_size

__all__ = ["BATCH_ROWS", "BuildGraph", "MemoryPlan", "plan_memory", "plan_node", "possible_limit", "program_bytes"]

log = structlog.get_logger()

BATCH_ROWS = (256, 128, 64, 32)
"""Rows of a prompt that may go through the layers together: where weights are paged, each batch reads them once."""

COMING_BYTES = 8 << 20
"""What a process holds when its kernels run, beyond what it holds while it plans: object code, instructions while they are
made, read-ahead of links, what answers are made with, the allocator's reserve."""

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
        kv_cache: for all positions of one conversation.
        buffers: pipes, buffers, tables, what threads work with, and weights that are copied or come over the wire.
        needs: of the weights in the model's file, in blocks.
        budget_blocks: blocks of weights that fit beside all that; None where all of them do.
        start: the most that is held before the first pass, runtime included.
        conversations: that have a KV cache each.
        held: weights among the buffers: those that are copied or come over the wire.
    """

    limit: int
    limit_text: str
    seq_len: int
    rows: int
    runtime: int
    kv_cache: int
    buffers: int
    needs: PagingNeeds
    budget_blocks: int | None
    start: int = 0
    conversations: int = 1
    held: int = 0

    @property
    def fixed(self) -> int:
        """All but the weights, with one conversation."""
        return self.runtime + self.kv_cache + self.buffers

    @property
    def weights(self) -> int:
        """All that a pass reads."""
        return self.needs.blocks_total * self.needs.block_bytes

    @property
    def resident(self) -> int:
        """Weights in memory at once, at most."""
        return self.weights if self.budget_blocks is None else self.budget_blocks * self.needs.block_bytes

    @property
    def missing(self) -> int:
        """Weights that a token reads from the disk, at most: what neither fits nor is part of the streaming buffer's coming and going."""
        if self.budget_blocks is None:
            return 0
        return self.needs.missing(self.budget_blocks) * self.needs.block_bytes

    @property
    def total(self) -> int:
        return self.fixed + (self.conversations - 1) * self.kv_cache + self.resident

    @property
    def is_roomy(self) -> bool:
        """Whether the batch takes nothing from the weights that matters."""
        return self.budget_blocks is None or (self.buffers <= self.limit // 8 and self.budget_blocks >= self.needs.streaming_blocks_best)

    @property
    def smallest(self) -> int:
        """The least limit that works with this context and batch, in whole MiB."""
        least = max(self.fixed + self.needs.streaming_blocks_min * self.needs.block_bytes, self.start)
        return -(-least >> 20) << 20

    @property
    def fits(self) -> bool:
        return self.smallest <= self.limit

    def check(self, advice: str = "A shorter context (--max-seq-len, now {seq_len}) needs less") -> None:
        """Raise LimitError where it does not work within the limit: what is needed, what would do, and `advice`."""
        if self.fits:
            return
        parts = ", ".join(f"{format_size(size)} {what}" for what, size, _ in self._fixed_rows())
        streaming = self.needs.streaming_blocks_min * self.needs.block_bytes
        paged = f", {format_size(streaming)} to page the weights through" if streaming else ""
        raise LimitError(
            f"the memory limit {self._limit} is too small: {parts}{paged}; {format_size(self.smallest)} would do. "
            + advice.format(seq_len=self.seq_len)
        )

    def figures(self) -> dict[str, Any]:
        """For a JSON document."""
        return {
            "limit_bytes": self.limit,
            "smallest_limit_bytes": self.smallest,
            "total_bytes": self.total,
            "runtime_bytes": self.runtime,
            "kv_cache_bytes": self.conversations * self.kv_cache,
            "conversations": self.conversations,
            "buffer_bytes": self.buffers,
            "weight_bytes": self.weights,
            "resident_weight_bytes": self.resident,
            "missing_bytes_a_token": self.missing,
            "max_seq_len": self.seq_len,
            "batch_rows": self.rows,
            "paged": self.budget_blocks is not None,
        }

    def summary(self) -> dict[str, Any]:
        """For a line of the log."""
        sizes = {
            "limit": self.limit,
            "total": self.total,
            "program": self.runtime,
            "kv_cache": self.conversations * self.kv_cache,
            "buffers": self.buffers - self.held,
            "weights": self.weights + self.held,
            "in_memory": self.resident + self.held,
            "read_a_token": self.missing,
            "smallest_limit": self.smallest,
        }
        return {name: format_size(size) for name, size in sizes.items()} | {
            "context": self.seq_len,
            "conversations": self.conversations,
            "batch": self.rows,
        }

    @property
    def _limit(self) -> str:
        size = format_size(self.limit)
        return size if self.limit_text == size else f"{self.limit_text} = {size}"

    def table(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) of each part, their sum, and what could be."""
        if self.budget_blocks is None:
            weights = [("weights, all in memory", self.weights, "in place, in the model's file")]
        else:
            pinned, size = self.needs.pinned(self.budget_blocks), self.needs.block_bytes
            streaming, experts = self.budget_blocks - pinned, self.needs.expert_blocks
            read = f"{'at most ' if experts else ''}{format_size(self.missing)}"
            weights = [
                ("pinned weights", pinned * size, f"of {format_size(self.weights)}; a token reads {read} from the disk"),
                (
                    "experts used most" if experts else "streaming buffer",
                    streaming * size,
                    f"{streaming} blocks of {format_size(size)}" + (", and those that are streamed" if experts else ""),
                ),
            ]
        return [
            *self._fixed_rows(),
            *weights,
            (
                "in all",
                self.total,
                f"limit {self._limit}",
            ),
            ("smallest limit", self.smallest, f"everything in memory from {format_size(self.fixed + self.weights)} on"),
        ]

    def _fixed_rows(self) -> list[tuple[str, int, str]]:
        """The rows of what is held in any case."""
        tokens = f"{self.seq_len} tokens" + (f" of each of {self.conversations} conversations" if self.conversations > 1 else "")
        held = [("weights, copied", self.held, "received, or copied together from the model's file")] if self.held else []
        return [
            ("program", self.runtime, "interpreter, libraries, kernels, tokenizer"),
            ("KV cache", self.conversations * self.kv_cache, tokens),
            ("buffers", self.buffers - self.held, f"batches of {self.rows} rows"),
            *held,
        ]


def possible_limit(limit: MemoryAmount) -> MemoryAmount:
    """A limit, or what the machine or the control group has where that is less, which the log is told: no plan may count on more."""
    available = machine.memory_bytes()
    possible = limit.within(available)
    if possible != limit:
        log.warning("the memory limit is more than there is", limit=str(limit), available=format_size(available))
    return possible


def program_bytes() -> int:
    """What this process holds beside model and caches: what it holds now, and what is to come."""
    return machine.rss_bytes() + COMING_BYTES


def plan_memory(
    model: ModelFile,
    build: BuildGraph,
    limit: MemoryAmount,
    *,
    n_threads: int | None = None,
    weigh: Callable[[NodeConfig], tuple[Weights, Weights | None]] | None = None,
    max_seq_len: int | None = None,
    rows: Sequence[int] = BATCH_ROWS,
    kv_cache: FloatType = FloatType.F32,
    runtime: int | None = None,
    start: int = 0,
    conversations: int = 1,
) -> MemoryPlan:
    """Decide context, batch, room for weights, and how many conversations have a KV cache.

    Args:
        model: open; its spec's seq_len is the longest context.
        n_threads: compute threads; one a processor if None.
        weigh: where the weights of a graph are, and `packed` as in `plan_node`; all of the model, in its file, if None.
        max_seq_len: a context that somebody chose.
        rows: batches to choose from, the largest first.
        kv_cache: F32, F16 or Q80.
        runtime: what the process holds beside model and caches; as `plan_node`.
        start: as `plan_node`.
        conversations: the most that are to have a KV cache each: as many as there is room for beside all weights.

    Raises:
        LimitError: nothing works within the limit; has the table and the smallest limit that would.
        GraphError: the model cannot be computed.
    """
    runtime = program_bytes() if runtime is None else runtime
    whole = FileWeights(model)
    for seq_len in _contexts(model.spec.seq_len, max_seq_len):
        least = max_seq_len is not None or seq_len <= _LEAST_CONTEXT
        for count in rows:
            network, node = build(seq_len, min(count, seq_len))
            weights, packed = (whole, None) if weigh is None else weigh(node)
            plan = plan_node(
                network, node, weights, limit, packed=packed, n_threads=n_threads, kv_cache=kv_cache, runtime=runtime, start=start
            )
            if plan.fits and (least or plan.kv_cache <= plan.limit // 4) and (count == rows[-1] or plan.is_roomy):
                return _with_conversations(plan, conversations)
    plan.check()
    return plan


def _with_conversations(plan: MemoryPlan, most: int) -> MemoryPlan:
    if plan.budget_blocks is not None:
        return plan
    more = (plan.limit - plan.total) // max(plan.kv_cache, 1)
    return replace(plan, conversations=max(1, min(most, 1 + more)))


def _contexts(longest: int, chosen: int | None) -> Iterator[int]:
    """To try one after the other."""
    if chosen is not None:
        yield min(chosen, longest)
        return
    yield longest
    while longest > _LEAST_CONTEXT:
        longest = max(longest // 2, _LEAST_CONTEXT)
        yield longest


def plan_node(
    network: NetworkConfig,
    node: NodeConfig,
    weights: Weights,
    limit: MemoryAmount,
    *,
    packed: Weights | None = None,
    n_threads: int | None = None,
    kv_cache: FloatType = FloatType.F32,
    runtime: int | None = None,
    beside: int = 0,
    start: int = 0,
) -> MemoryPlan:
    """The plan of one graph, whether it fits or not.

    Args:
        weights: in the model's file, or in memory.
        packed: the same as they are used where all of them fit, if that is otherwise.
        n_threads: compute threads; one a processor if None.
        kv_cache: F32, F16 or Q80.
        runtime: what the process holds beside model and caches; by default what it holds now, and what is to come.
        beside: more buffers than the graph's.
        start: bytes that are needed while the node starts, and no longer, beside runtime.

    Raises:
        GraphError: the graph cannot be computed.
    """
    nbytes = limit.resolve()
    runtime = program_bytes() if runtime is None else runtime
    held = memory_needs(network, node, n_threads=n_threads or machine.processors(), kv_cache=kv_cache)
    seq_len = cache_positions(node) or network.n_batches

    def planned(weights: Weights) -> MemoryPlan:
        needs = weights_needs(network, node, weights)
        buffers = held.working + needs.copied_bytes + needs.remembered_bytes + beside
        room = max(0, (nbytes - runtime - held.caches - buffers) // needs.block_bytes)
        budget_blocks = None if room >= needs.blocks_total else room
        return MemoryPlan(
            nbytes,
            str(limit),
            seq_len,
            network.n_batches,
            runtime,
            held.caches,
            buffers,
            needs,
            budget_blocks,
            runtime + start,
            held=weights.nbytes,
        )

    plan = None if packed is None else planned(packed)
    return planned(weights) if plan is None or plan.budget_blocks is not None else plan
