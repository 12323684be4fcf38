"""One pass over the layers, as every node of a cluster does it: the root and its workers run the same steps, each by its own plan.

*Parts.* A batch of many rows is computed in two parts, one after the other in each range of segments. While one part is computed the rows
of the other are on the wire: what a row needs of earlier rows, their keys and values, is computed before it. On each link the rows keep
their order, so whoever is at the other end, of whatever kind, cannot tell. A row's bits do not depend on the part that it is in.

*Memory.* Rows go out of the pipe's own memory and come straight into it. So before rows of a part are computed, what was sent of them must
have left, and what is to come for them must have come.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from dairllm.engine.program import Program
from dairllm.graph.plan import Exchange, Run
from dairllm.kernels.panels import TILE_COLUMNS
from dairllm.net.transport import Connection, Incoming
from dairllm.runtime.autotuner import Autotuner
from dairllm.runtime.compute import BRIEF_SECONDS

__all__ = ["Computes", "PassMetric", "RowsFrom", "TensorPass"]


class RowsFrom(Incoming[object], Protocol):
    """The receiving end of a link that brings rows: both sides of the dllama protocol have such."""

    def receive_into(self, *views: memoryview) -> None: ...


class Computes(Protocol):
    """`Compute`, or what takes its place."""

    async def run(self, program: Program, first: int, stop: int, position: int, rows: int, first_row: int = 0) -> None: ...


class PassMetric(Protocol):
    """Counts the seconds of each activity."""

    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Stage:
    """Segments that run without a pause, and what is exchanged after them."""

    run: Run | None
    exchanges: tuple[Exchange, ...]


class TensorPass:
    """Runs passes, one at a time.

    Args:
        program: this node's, with its weights.
        plan: this node's ``token_plan``.
        compute: open.
        connections: by node number.
        links: what each connection is attached to; rows are due when the pass begins.
        overlap: compute large batches in two parts, if that is found faster than whole: with a network that costs next to nothing the
            weights are read twice for it.
        silence: seconds without a byte after which a node is given up in a pass of so many rows.
        metric: counts seconds of compute and exchange.
    """

    def __init__(
        self,
        program: Program,
        plan: tuple[Run | Exchange, ...],
        compute: Computes,
        connections: Mapping[int, Connection],
        links: Mapping[int, RowsFrom],
        *,
        overlap: bool,
        silence: Callable[[int], float],
        metric: PassMetric,
    ) -> None:
        self.program, self._compute, self._metric, self._silence_of = program, compute, metric, silence
        self._silence = 0.0
        self._connections, self._links = connections, links
        self._overlap = Autotuner([_halves, _whole] if overlap else [_whole])
        self._stages = _stages(plan)
        self._final = self._stages[-1] if self._stages else None  # a session without anything in it is one, too
        self._region = cache(program.region)
        self._due: dict[int, int] = {}
        """By node, the part whose rows are under way from it: one at a time on a link."""
        self.awaited: int | None = None
        """The node that something was last awaited from: where a pass fails, the one that failed it."""
        self._left: list[dict[int, int]] = [{}, {}]
        """Of each part, by node, how much must have left the connection before the part's memory may be written."""

    async def run(self, position: int, rows: int, first_final: int = 0) -> None:
        """Compute a batch; ends when all that belongs to it has come and has left.

        Args:
            position: of the first row.
            first_final: 0, rows - 1 or `rows`: the last range of segments, the classifier, leaves out the rows before this one.

        Raises:
            NetworkError: a node is gone or silent.
            RemoteProtocolError: a node said something wrong.
            EngineError: the batch does not fit, or the computation failed.
        """
        clock, seconds = time.perf_counter, self._metric.seconds
        begun = before = yielded = clock()
        parts, self._silence = self._overlap.configuration(rows), self._silence_of(rows)
        for stage in self._stages:
            for part, (first, stop) in enumerate(parts):
                if stage.run is not None:
                    await self._settle(part)
                    after = clock()
                    seconds["exchange"] += after - before
                    from_row = first if stage is not self._final else max(first, first_final)
                    if from_row < stop:
                        await self._compute.run(self.program, stage.run.first, stage.run.stop, position, stop, from_row)
                    before = clock()
                    seconds["compute"] += before - after
                for exchange in stage.exchanges:
                    await self._exchange(exchange, part, first, stop)
            if before - yielded > BRIEF_SECONDS:  # where all is there when it is wanted, nothing above gives way to the loop
                await asyncio.sleep(0)
                yielded = clock()
        for part in range(len(parts)):
            await self._settle(part)
        seconds["exchange"] += clock() - before
        if rows == self.program.n_batches > TILE_COLUMNS:
            self._overlap.passed(clock() - begun)

    async def _exchange(self, exchange: Exchange, part: int, first: int, stop: int) -> None:
        """Rows of ours set out, those of others may come. Waits only for the rows before them on the same link."""
        left = self._left[part]
        for send in exchange.sends:
            self.awaited = send.node
            connection = self._connections[send.node]
            connection.send(self._region(exchange.pipe, send.slice, stop, first))
            left[send.node] = connection.bytes_sent
        for receive in exchange.receives:
            node = receive.node
            if node in self._due:
                await self._arrived(node)
            self._links[node].receive_into(*self._region(exchange.pipe, receive.slice, stop, first))
            self._due[node] = part

    async def _settle(self, part: int) -> None:
        """Wait until a part's memory is its own again."""
        for node in [node for node, due in self._due.items() if due == part]:
            await self._arrived(node)
        left = self._left[part]
        for node, sent in left.items():
            self.awaited = node
            await self._connections[node].flushed(self._silence, sent)
        left.clear()

    async def _arrived(self, node: int) -> None:
        self.awaited = node
        await self._connections[node].next_event(self._links[node], self._silence)
        del self._due[node]


def _stages(plan: tuple[Run | Exchange, ...]) -> tuple[_Stage, ...]:
    stages: list[_Stage] = []
    for step in plan:
        if isinstance(step, Run):
            stages.append(_Stage(step, ()))
        elif stages:
            stages[-1] = _Stage(stages[-1].run, (*stages[-1].exchanges, step))
        else:
            stages.append(_Stage(None, (step,)))
    return tuple(stages)


def _whole(rows: int) -> tuple[tuple[int, int], ...]:
    return ((0, rows),)


def _halves(rows: int) -> tuple[tuple[int, int], ...]:
    """Halves of whole tiles, where there is more than one: a tile costs the same however few of its rows are wanted."""
    half = -(-rows // (2 * TILE_COLUMNS)) * TILE_COLUMNS
    return ((0, rows),) if rows <= TILE_COLUMNS else ((0, half), (half, rows))
