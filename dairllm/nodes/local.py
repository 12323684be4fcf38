"""One node that computes the whole model: the graph for one node, run from the model's file in place."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.paging import PagingMeters, PagingSettings
from dairllm.engine.paging_choice import WayChoice
from dairllm.engine.program import Program, compile_program
from dairllm.engine.weights import FileWeights
from dairllm.errors import EngineError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import LOGITS_PIPE, TOKEN_PIPE, build_graph
from dairllm.graph.types import FloatType
from dairllm.net.compute import Compute
from dairllm.net.runner import in_thread
from dairllm.nodes.prefetch import PagedCompute, open_paged
from dairllm.nodes.report import NodeReport

__all__ = ["PROMPT_ROWS", "LocalNode", "default_sync"]

PROMPT_ROWS = 256
"""Rows of a prompt that go through the layers together."""


def default_sync(weight_type: FloatType) -> FloatType:
    """What crosses the wire where nobody chose:

    F32 for F32 weights, else Q80. A local run rounds likewise, so that its answer is a cluster's.
    """
    return FloatType.F32 if weight_type == FloatType.F32 else FloatType.Q80


class LocalNode:
    """A `dairllm.nodes.generation.Model` over this machine alone, from `open` to `close`.

    Args:
        model: stays the caller's and must stay open; its spec's seq_len is the context length.
        compute: the caller's too; its executor, of `n_threads`, must have been started before `open`.
        sync: type of the pipe ZQ; `default_sync` if None.
        paging: room for part of the weights; all are used in place if None.

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
        paging: PagingSettings | None = None,
    ) -> None:
        spec = model.spec
        self.seq_len, self.vocab_size = spec.seq_len, spec.vocab_size
        self.n_batches = min(PROMPT_ROWS, spec.seq_len)
        self.n_threads = n_threads
        self._model, self._compute, self._paging = model, compute, paging
        self._graph = build_graph(spec, 1, default_sync(spec.weight_type) if sync is None else sync, self.n_batches)
        self._program: Program | None = None
        self._paged: PagedCompute | None = None

    async def open(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Make the program. `progress` is a cluster's: here nothing is sent.

        Raises:
            GraphError: something of the model cannot be computed.
        """
        network, (node,) = self._graph
        weights = FileWeights(self._model)
        if self._paging is None:
            program = await in_thread("prepare", lambda: compile_program(network, node, weights, n_threads=self.n_threads))
        else:
            self._paged = await open_paged(network, node, weights, self._model, self._paging, self._compute, n_threads=self.n_threads)
            program = self._paged.program
        self._tokens, self._logits = (program.values(pipe) for pipe in (TOKEN_PIPE, LOGITS_PIPE))
        self._program = program

    async def feed(self, tokens: Sequence[int], position: int, *, logits: bool) -> NDArray[np.float32] | None:
        """As `Model.feed`; the logits are a view.

        Raises:
            EngineError: no token or too many, one outside of the vocabulary, no room for them, or the node is not open.
        """
        program, rows = self._program, len(tokens)
        if program is None:
            raise EngineError("the node is not open")
        if not 1 <= rows <= self.n_batches or min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise EngineError(f"expected 1 to {self.n_batches} tokens with ids in 0..{self.vocab_size - 1}, found {rows}")
        if position < 0 or position + rows > self.seq_len:
            raise EngineError(f"positions {position} to {position + rows - 1}: the context has room for {self.seq_len}")
        # Where computing never waits, nothing else does: here signals and other tasks get their turn.
        await asyncio.sleep(0)
        self._tokens[:rows, 0] = tokens
        last = program.n_segments - 1
        compute = self._paged or self._compute
        if rows == 1 and logits:
            await compute.run(program, 0, last + 1, position, 1)
        else:
            await compute.run(program, 0, last, position, rows)
            if logits:  # the last segment is the classifier, wanted for the last row alone
                await compute.run(program, last, last + 1, position, rows, rows - 1)
        return self._logits[rows - 1] if logits else None

    @property
    def nodes(self) -> tuple[NodeReport, ...]:
        spec = self._model.spec
        return (NodeReport(0, "", "dairllm", spec.n_heads, spec.n_kv_heads, spec.ff_dim),)

    @property
    def paging(self) -> PagingMeters | None:
        """What paging has read and waited for; None where nothing is paged."""
        return None if self._paged is None else self._paged.meters

    @property
    def way(self) -> WayChoice | None:
        """How blocks are read, as measured at `open`; None where nothing is paged."""
        return None if self._paged is None else self._paged.choice

    @property
    def trouble(self) -> None:
        """Nobody can go away."""
        return None

    async def close(self) -> None:
        """Give up the program's memory. Nothing is being computed: a pass ends before whoever awaits it goes on."""
        if self._program is not None:
            self._program = None
            del self._tokens, self._logits
        if self._paged is not None:
            paged, self._paged = self._paged, None
            await paged.close()
