"""One node that computes the whole model: the graph for one node, run from the model's file in place."""

import asyncio
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.kv_caches import KvCaches
from dairllm.engine.program import Program
from dairllm.engine.weights import FileWeights
from dairllm.errors import EngineError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import LOGITS_PIPE, TOKEN_PIPE, build_graph
from dairllm.graph.types import FloatType
from dairllm.paging.needs import PagingSettings
from dairllm.paging.status import PagingStatus
from dairllm.runtime.compute import Compute
from dairllm.runtime.node_program import NodeProgram, open_program
from dairllm.runtime.node_status import NodeStatus
from dairllm.runtime.pass_clock import PassClock

__all__ = ["PROMPT_ROWS", "LocalNode", "default_sync"]

PROMPT_ROWS = 256
"""Rows of a prompt that go through the layers together."""


def default_sync(weight_type: FloatType) -> FloatType:
    """What crosses the wire where nobody chose:

    F32 for F32 weights, else Q80. A local run rounds likewise: it is a cluster of one node. More nodes add up parts that were
    rounded one by one, so their bits are others (docs/arithmetic.md).
    """
    return FloatType.F32 if weight_type == FloatType.F32 else FloatType.Q80


class LocalNode:
    """A `dairllm.serving.generation.Model` over this machine alone, from `open` to `close`.

    Args:
        model: stays the caller's and must stay open; its spec's seq_len is the context length.
        compute: the caller's too; its executor, of `n_threads`, must have been started before `open`.
        sync: type of the pipe ZQ; `default_sync` if None.
        rows: of a prompt that go through the layers together.
        kv_cache: F32, F16 or Q80.
        paging: room for part of the weights; all are used in place if None.
        clock: of its passes, for who wants to know how long the one in hand has been running.
        conversations: texts whose K and V are kept, each in KV caches of its own; one where weights are paged.

    Raises:
        GraphError: the model has a shape that we cannot compute. Told before any kernel is needed.
    """

    def __init__(
        self,
        model: ModelFile,
        compute: Compute[Program],
        *,
        n_threads: int,
        sync: FloatType | None = None,
        rows: int | None = None,
        kv_cache: FloatType = FloatType.F32,
        paging: PagingSettings | None = None,
        clock: PassClock | None = None,
        conversations: int = 1,
    ) -> None:
        spec = model.spec
        self.seq_len, self.vocab_size = spec.seq_len, spec.vocab_size
        self.n_batches = min(PROMPT_ROWS if rows is None else rows, spec.seq_len)
        self.n_threads = n_threads
        self._clock = clock or PassClock()
        self._model, self._compute, self._kv_cache, self._paging = model, compute, kv_cache, paging
        self._graph = build_graph(spec, 1, default_sync(spec.weight_type) if sync is None else sync, self.n_batches)
        self._conversations = conversations if paging is None else 1
        self._own: NodeProgram | None = None
        self._kv_caches: KvCaches | None = None

    async def open(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Make the program. `progress` is a cluster's: here nothing is sent.

        Raises:
            GraphError: something of the model cannot be computed.
        """
        network, (node,) = self._graph
        weights, kv_cache = FileWeights(self._model), self._kv_cache
        self._own = own = await open_program(
            network, node, weights, self._compute, n_threads=self.n_threads, kv_cache=kv_cache, model=self._model, paging=self._paging
        )
        try:
            self._kv_caches = own.program.keep_caches(self._conversations) if self._conversations > 1 else None
            self._tokens, self._logits = (own.program.values(pipe) for pipe in (TOKEN_PIPE, LOGITS_PIPE))
        except BaseException:
            self._own = None
            await own.close()
            raise

    async def feed(self, tokens: Sequence[int], position: int, *, logits: bool) -> NDArray[np.float32] | None:
        """As `Model.feed`; the logits are a view.

        Raises:
            EngineError: no token or too many, one outside of the vocabulary, no room for them, or the node is not open.
        """
        own, rows = self._ready(tokens, position), len(tokens)
        # Where computing never waits, nothing else does: here signals and other tasks get their turn.
        await asyncio.sleep(0)
        self._tokens[:rows, 0] = tokens
        program, compute = own.program, own.compute
        last = program.n_segments - 1
        with self._clock.running(rows):
            if rows == 1 and logits:
                await compute.run(program, 0, last + 1, position, 1)
            else:
                await compute.run(program, 0, last, position, rows)
                if logits:  # the last segment is the classifier, wanted for the last row alone
                    await compute.run(program, last, last + 1, position, rows, rows - 1)
        return self._logits[rows - 1] if logits else None

    async def feed_rows(self, tokens: Sequence[int], position: int) -> Iterator[NDArray[np.float32]]:
        """The logits after each of the tokens; views. Raises as `feed`."""
        own, rows = self._ready(tokens, position), len(tokens)
        await asyncio.sleep(0)
        self._tokens[:rows, 0] = tokens
        await own.compute.run(own.program, 0, own.program.n_segments, position, rows)
        return iter(self._logits[:rows])

    def _ready(self, tokens: Sequence[int], position: int) -> NodeProgram:
        """The program, if it can be fed these."""
        own, rows = self._own, len(tokens)
        if own is None:
            raise EngineError("the node is not open")
        if not 1 <= rows <= self.n_batches or min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise EngineError(f"expected 1 to {self.n_batches} tokens with ids in 0..{self.vocab_size - 1}, found {rows}")
        if position < 0 or position + rows > self.seq_len:
            raise EngineError(f"positions {position} to {position + rows - 1}: the context has room for {self.seq_len}")
        return own

    @property
    def nodes(self) -> tuple[NodeStatus, ...]:
        spec = self._model.spec
        return (NodeStatus(0, "", "dairllm", spec.n_heads, spec.n_kv_heads, spec.ff_dim),)

    @property
    def kv_caches(self) -> KvCaches | None:
        """Those of several conversations; None where there is room for one."""
        return self._kv_caches

    @property
    def paging(self) -> PagingStatus | None:
        """None where nothing is paged."""
        return None if self._own is None else self._own.paging

    @property
    def trouble(self) -> None:
        """Nobody can go away."""
        return None

    async def close(self) -> None:
        """Give up the program's memory. Nothing is being computed: a pass ends before whoever awaits it goes on."""
        if self._own is not None:
            own, self._own, self._kv_caches = self._own, None, None
            del self._tokens, self._logits
            await own.close()
