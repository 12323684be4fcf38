"""One node, measured from within: passes of one and of several rows, in turn with reading the same weights and doing nothing else.

    python -m dairllm.bench.node '{"model": "F.m", "limit": null, "threads": 2, "rows": [1], "passes": 8, "rounds": 3, ...}'

A process of its own, so that what it may hold can be limited. Prints one JSON object. Weights that are in memory are read there, by as many
threads as compute; weights that are not, from the disk, in the I/O mode and by the readers that the node has chosen.
"""

import hashlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dairllm import machine
from dairllm.bench.pure_read import forget, read_file, read_memory
from dairllm.config import MemoryAmount
from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.engine.weights import FileWeights
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import LOGITS_PIPE, TOKEN_PIPE, build_graph
from dairllm.graph.types import NetworkConfig, NodeConfig
from dairllm.kernels.instructions import Kind
from dairllm.net.runner import run as run_on_loop
from dairllm.paging.needs import IoMode, PagingSettings, Policy
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import default_sync
from dairllm.runtime.memory_plan import MemoryPlan, plan_memory
from dairllm.runtime.node_program import NodeProgram, open_program
from dairllm.runtime.paged_compute import PagedCompute
from dairllm.telemetry import configure_logging

__all__ = ["CONTEXT", "NodeTask", "main"]

CONTEXT = 256
"""Positions that are measured."""

_OF_EXPERTS = ("block_matmul_w1", "block_matmul_w2", "block_matmul_w3")

_SETTLING = 64
"""Passes at most."""


@dataclass(frozen=True, slots=True)
class NodeTask:
    """What to measure.

    Attributes:
        limit: bytes that the process may hold; None for all weights in memory, whatever that takes.
        rows: of each pass that is measured, a time for each.
        passes: of each of them a round.
        runtime, batch: what a plan of the program counts for itself, in bytes, and the rows that it chose; None where it is not asked for.
        policy, io_mode, readers: as in PagingSettings.
    """

    model: str
    threads: int
    kernels: str = "auto"
    limit: int | None = None
    rows: tuple[int, ...] = (1,)
    passes: int = 8
    rounds: int = 3
    runtime: int | None = None
    batch: int | None = None
    policy: Policy = "pinned"
    io_mode: IoMode = "auto"
    readers: int | None = None


def main() -> None:
    """Measure, print."""
    given = json.loads(sys.argv[1])
    configure_logging(level="warning")
    task = NodeTask(**given | {"rows": tuple(given.get("rows", (1,)))})

    async def measure() -> None:
        sys.stdout.write(json.dumps(await _measure(task)) + "\n")

    run_on_loop(measure, service=False)


async def _measure(task: NodeTask) -> dict[str, Any]:
    executor = Executor(task.threads, task.kernels).start()
    compute: Compute[Program] = Compute(executor, math.inf)
    compute.open()
    try:
        with ModelFile.open(Path(task.model), max_seq_len=CONTEXT) as model:
            rows = max(task.rows) if task.batch is None else task.batch
            plan = _plan(model, task, rows)
            paging = None
            if plan.budget_blocks is not None:
                paging = PagingSettings(plan.budget_blocks, task.policy, task.io_mode, task.readers, plan.needs.block_bytes)
            network, node = _graph(model, model.spec.seq_len, rows)
            if paging is not None:
                forget(model.path)
            own = await open_program(network, node, FileWeights(model), compute, n_threads=task.threads, model=model, paging=paging)
            try:
                return await _rounds(task, model, plan, own) | {"kernels": executor.form, "plan_limit": plan.limit}
            finally:
                await own.close()
    finally:
        compute.close()
        executor.close()


def _graph(model: ModelFile, seq_len: int, rows: int) -> tuple[NetworkConfig, NodeConfig]:
    spec = replace(model.spec, seq_len=seq_len)
    network, (node,) = build_graph(spec, 1, default_sync(spec.weight_type), rows)
    return network, node


def _plan(model: ModelFile, task: NodeTask, rows: int) -> MemoryPlan:
    limit = MemoryAmount.parse("100%" if task.limit is None else f"{task.limit}B")
    build = partial(_graph, model)
    return plan_memory(model, build, limit, max_seq_len=model.spec.seq_len, rows=(rows,), runtime=task.runtime)


async def _rounds(task: NodeTask, model: ModelFile, plan: MemoryPlan, own: NodeProgram) -> dict[str, Any]:
    streamed = own.compute.streamed if isinstance(own.compute, PagedCompute) else ()
    reading: list[float] = []
    seconds: dict[int, list[float]] = {rows: [] for rows in task.rows}
    profiles = {rows: np.zeros(len(Kind), np.int64) for rows in task.rows}
    await _settle(own, model.spec.vocab_size)
    feeder = _Feeder(own, model.spec.vocab_size)
    fetched, passes = 0, 0
    for _ in range(task.rounds):
        if own.paging is None:
            reading.append(read_memory(model, task.threads))
        else:
            reading.append(
                read_file(model, streamed, own.paging.read_mode, plan.needs.block_bytes, streaming=plan.needs.streaming_blocks_best)
            )
        for rows in task.rows:
            await feeder.feed(rows)  # finds the caches, or the streaming buffer, as something else has left them
            profile, before = own.program.profile(), _fetched(own)
            seconds[rows] += [await feeder.feed(rows) for _ in range(task.passes)]
            profiles[rows] += profile.sum(axis=0)
            fetched, passes = fetched + _fetched(own) - before, passes + task.passes
    return {
        "seconds": {str(rows): found for rows, found in seconds.items()},
        "profile": {str(rows): _shares(cycles) for rows, cycles in profiles.items()},
        "read_bytes_per_second": reading,
        "weight_bytes": _weight_bytes(model),
        "missing_bytes": len(streamed) * plan.needs.block_bytes,
        "read_bytes_a_pass": fetched // passes,
        "io_mode": None if own.paging is None else {"io_mode": own.paging.read_mode.io_mode, **own.paging.configuration._asdict()},
        "paging": None if own.paging is None else asdict(own.paging.metrics),
        "peak_rss_bytes": machine.peak_rss_bytes(),
        "logits": feeder.digest.hexdigest()[:16],
    }


async def _settle(own: NodeProgram, vocab_size: int) -> None:
    """Until a node that pages has found how many threads are best."""
    feeder = _Feeder(own, vocab_size, token=11)  # not those that are measured: their experts would be there already
    for _ in range(_SETTLING):
        if not isinstance(own.compute, PagedCompute) or own.compute.settled:
            return
        await feeder.feed(1)


def _fetched(own: NodeProgram) -> int:
    """Bytes read from the disk so far."""
    return 0 if own.paging is None else own.paging.metrics.bytes


def _weight_bytes(model: ModelFile) -> int:
    """That a row reads: of experts those that it is routed to, of the embedding next to nothing."""
    experts = sum(tensor.nbytes for tensor in model.tensors if tensor.name in _OF_EXPERTS) if model.spec.n_experts else 0
    others = sum(tensor.nbytes for tensor in model.tensors if tensor.name != "embedding") - experts
    return others + (experts * model.spec.n_active_experts // model.spec.n_experts if experts else 0)


class _Feeder:
    """Passes of made-up tokens, one behind the other, from the begin again where the context ends.

    Attributes:
        digest: of all logits.
    """

    def __init__(self, own: NodeProgram, vocab_size: int, token: int = 5) -> None:
        self._own, self._vocab_size = own, vocab_size
        self._tokens, self._logits = (own.program.values(pipe) for pipe in (TOKEN_PIPE, LOGITS_PIPE))
        self._token, self._position = token, 0
        self.digest = hashlib.sha256()

    async def feed(self, rows: int) -> float:
        """One pass; seconds that it took."""
        program = self._own.program
        if self._position + rows > program.seq_len:
            self._position = 0
        for row in range(rows):
            self._token = (self._token * 7 + 3) % self._vocab_size
            self._tokens[row, 0] = self._token
        begun = time.perf_counter()
        await self._own.compute.run(program, 0, program.n_segments, self._position, rows)
        took = time.perf_counter() - begun
        self._position += rows
        self.digest.update(self._logits[rows - 1].tobytes())
        return took


def _shares(cycles: NDArray[np.int64]) -> dict[str, float]:
    """Of the threads' time, by kind of instruction, the largest first; what took none is left out."""
    order = sorted(Kind, key=lambda kind: -int(cycles[kind]))
    return {kind.name.lower(): round(float(cycles[kind] / cycles.sum()), 5) for kind in order if cycles[kind]}


if __name__ == "__main__":
    main()
