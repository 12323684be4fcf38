"""The engine as the oracle is: all nodes of a network in one process, in lockstep, rows copied from pipe to pipe. No sockets."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dairllm.engine.executor import Executor
from dairllm.engine.program import compile_program
from dairllm.engine.weights import WireWeights
from dairllm.graph.plan import Exchange, Run, token_plan
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig
from tests.engine.oracle import TOKEN_PIPE, Weights

__all__ = ["EngineCluster"]


class EngineCluster:
    """Each node has a program of its own; one executor runs them in turn.

    Args:
        network: shared by all.
        nodes: in order; node 0 is the root.
        weights: as the oracle takes them; they reach the programs as bytes, as if over the wire.
        executor: running.
        kv_cache: how all nodes keep their KV caches.
    """

    def __init__(
        self,
        network: NetworkConfig,
        nodes: Sequence[NodeConfig],
        weights: Weights,
        executor: Executor,
        kv_cache: FloatType = FloatType.F32,
    ) -> None:
        self.network, self.executor = network, executor
        self.programs = []
        self.plans = []
        for node in nodes:
            memory = WireWeights(node)
            memory.allocate()
            for op in (op for segment in node.segments for op in segment.ops if op.weight_size.length):
                raw = np.ascontiguousarray(weights(node.node, op)).reshape(-1).view(np.uint8)
                memory.into(op.name, op.index, 0, raw.size)[:] = raw.data
            assert not memory.missing()
            self.programs.append(compile_program(network, node, memory, n_threads=executor.n_threads, kv_cache=kv_cache))
            self.plans.append(token_plan(network, node))

    def run(self, tokens: Sequence[int], position: int, logits_pipe: int = 3, ends: Sequence[int] = ()) -> npt.NDArray[np.float32]:
        """One control packet; the root's rows of the logits pipe, float32 [rows, vocab].

        Args:
            ends: of the parts that the rows are computed and exchanged in; the last is len(tokens).
        """
        rows = len(tokens)
        ends = ends or [rows]
        parts = list(zip([0, *ends], ends, strict=False))
        self.programs[0].values(TOKEN_PIPE)[:rows, 0] = tokens
        waiting = [list(plan) for plan in self.plans]
        while any(waiting):
            for plan, program in zip(waiting, self.programs, strict=True):
                step = plan[0] if plan else None
                if isinstance(step, Run):
                    plan.pop(0)
                    for first, end in parts:
                        self.executor.run(program, step.first, step.stop, position, end, first)
            exchanges = [self._next_exchange(plan) for plan in waiting]
            for me, exchange in enumerate(exchanges):
                for transfer in exchange.receives if exchange else ():
                    assert exchange is not None
                    for first, end in parts:
                        source = self.programs[transfer.node].region(exchange.pipe, transfer.slice, end, first)
                        self._copy(source, self.programs[me].region(exchange.pipe, transfer.slice, end, first))
        return np.frombuffer(b"".join(self._logits(logits_pipe, rows)), np.float32).reshape(rows, -1)

    def feed(self, tokens: Sequence[int], batch: int = 1) -> npt.NDArray[np.float32]:
        """A whole text from position 0 on, `batch` rows at a time: the logits of every row."""
        return np.concatenate([self.run(tokens[i : i + batch], i) for i in range(0, len(tokens), batch)])

    @staticmethod
    def _next_exchange(plan: list[Run | Exchange]) -> Exchange | None:
        if not plan:
            return None
        step = plan.pop(0)
        assert isinstance(step, Exchange)
        return step

    @staticmethod
    def _copy(source: Sequence[memoryview], target: Sequence[memoryview]) -> None:
        raw = b"".join(source)
        for piece in target:
            piece[:] = raw[: len(piece)]
            raw = raw[len(piece) :]

    def _logits(self, pipe: int, rows: int) -> list[bytes]:
        """Row by row, whichever way the pipe is laid out."""
        return [self.programs[0].row(pipe, row).tobytes() for row in range(rows)]
