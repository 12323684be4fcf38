"""Computing with weights that are not all in memory: the event loop's side of paging.

`PagedCompute` takes the place of a node's `Compute`. It goes through a pass unit by unit: says where the pass has come to, so that reads go
on ahead of it; waits for what the next unit needs, if that is not there yet; has the unit computed. Reader threads do the reading, compute
threads the computing. What is asked for ahead is asked for at once, many blocks at a time, so nothing has to run on the loop for the disk
to stay busy.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from dairllm.engine.pieces import PIECE_BYTES
from dairllm.engine.program import Program, compile_program
from dairllm.engine.weights import Weights
from dairllm.errors import EngineError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import TOKEN_PIPE
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig
from dairllm.kernels.panels import TILE_COLUMNS
from dairllm.net.runner import in_thread
from dairllm.paging.block_cache import BlockCache
from dairllm.paging.mapping import FileMapping, open_mapping
from dairllm.paging.needs import PagingMetrics, PagingSettings, weights_needs
from dairllm.paging.pager import Pager
from dairllm.paging.policy import divide
from dairllm.paging.read_mode import ReadMode, probe_read_mode
from dairllm.paging.schedule import Block, program_schedule
from dairllm.paging.status import PagingStatus
from dairllm.paging.thread_configuration import ThreadConfiguration, thread_configurations
from dairllm.paging.weights import EmbeddingRows, PagedWeights
from dairllm.runtime.autotuner import Autotuner
from dairllm.runtime.compute import Compute

__all__ = ["PagedCompute", "open_paged"]

log = structlog.get_logger()

_LITTLE = 0.25
"""Of a pass's time, between one that is measured and the one before."""


async def open_paged(
    network: NetworkConfig,
    node: NodeConfig,
    places: Weights,
    model: ModelFile,
    settings: PagingSettings,
    compute: Compute[Program],
    *,
    n_threads: int,
    kv_cache: FloatType = FloatType.F32,
) -> "PagedCompute":
    """A node's program over the blocks of its model file, and what computes it.

    Args:
        places: where the node's weights lie: matmuls in their file, all else in the model's.
        compute: open; stays the caller's.
        kv_cache: F32, F16 or Q80.

    Raises:
        EngineError: the file is another one by now, or cannot be read.
        GraphError: something of the graph cannot be computed.
        LimitError: there is less room than the least that works.
    """

    def prepare() -> PagedCompute:
        needs = weights_needs(network, node, places, block_bytes=settings.block_bytes)
        file = places.matmul_file or model
        choice = probe_read_mode(file.path, file.stamp, needs.block_bytes, settings.io_mode, settings.readers)
        mapping = open_mapping(choice.io_mode, file.path, file.stamp, needs.block_bytes)
        weights = None
        try:
            weights = PagedWeights(places, mapping, model)
            program = compile_program(network, node, weights, n_threads=n_threads, piece_bytes=PIECE_BYTES, kv_cache=kv_cache)
            units, starts = program_schedule(program, needs.block_bytes)
            configurations = thread_configurations(settings.threads, settings.readers, most_threads=n_threads, first_readers=choice.readers)
            pager = Pager(mapping, units, divide(units, needs, settings), max(configuration.readers for configuration in configurations))
        except BaseException:
            if weights is not None:
                weights.close()
            mapping.close()
            raise
        return PagedCompute(compute, program, pager, starts, mapping, weights, choice, Autotuner(configurations, passes=3, settling=1))

    return await in_thread("prepare", prepare, PagedCompute.give_back)


class PagedCompute:
    """Computes one program, from `open_paged` to `close`. One task at a time computes.

    Attributes:
        program: the node's.
        choice: how the file is read.
    """

    def __init__(
        self,
        compute: Compute[Program],
        program: Program,
        pager: Pager,
        starts: Sequence[int],
        mapping: FileMapping,
        weights: PagedWeights,
        choice: ReadMode,
        tuner: Autotuner[ThreadConfiguration],
    ) -> None:
        self.program, self.choice = program, choice
        self._tuner, self._n_threads = tuner, program.n_threads
        self._pass_seconds, self._pass_end = 0.0, -math.inf
        self._one_row = self._measured = False
        self._compute, self._pager, self._starts = compute, pager, starts
        self._unitwise = program.with_segments([(unit.first, unit.stop) for unit in pager.units])
        self._mapping, self._weights = mapping, weights
        self._embedding_units = {
            number
            for number, unit in enumerate(pager.units)
            for instruction, _ in program.embeddings
            if unit.first <= instruction < unit.stop
        }

    @property
    def status(self) -> PagingStatus:
        return PagingStatus(self.metrics, self.choice, self.configuration)

    @property
    def metrics(self) -> PagingMetrics:
        return self._pager.blocks.metrics

    @property
    def streamed(self) -> tuple[Block, ...]:
        """Blocks that do not stay, in the order of a pass: what it reads, and of experts what it may read."""
        order = dict.fromkeys(block for unit in self._pager.units for blocks in (unit.blocks, *unit.experts) for block in blocks)
        return tuple(block for block in order if block not in self._pager.blocks.pinned)

    async def run(self, program: Program, first: int, stop: int, position: int, rows: int, first_row: int = 0) -> None:
        """As `Compute.run`, of this program. Raises as well:

        EngineError: a block cannot be read; the file was cut or written to.
        """
        if program is not self.program:
            raise EngineError("paging was made for another program")
        self._mapping.check()
        unit, end = self._starts[first], self._starts[stop]
        begun = time.perf_counter()
        if not unit:
            self._begin_pass(begun, rows)
        while unit < end:
            self._pager.look_ahead(unit)
            if unit in self._embedding_units:
                await self._embed(first_row, rows)
            if self._pager.units[unit].experts:
                await self._run_experts(unit, position, rows, first_row)
                unit += 1
                continue
            needed = self._pager.needed(unit)
            await self._there(needed, partial(self._pager.look_ahead, unit))
            following = self._pager.extent(unit, end)
            for other in range(unit + 1, following):
                self.metrics.hits += len(self._pager.needed(other))
            await self._compute.run(self._unitwise, unit, following, position, rows, first_row)
            for other in range(unit, following):
                self._pager.computed(other)
            unit = following
        self._pager.look_ahead(end % len(self._pager.units))
        self._mapping.check()  # what was written into the file meanwhile may have been computed with
        self._pass_seconds += time.perf_counter() - begun
        if end == len(self._pager.units):
            self._end_pass()

    @property
    def configuration(self) -> ThreadConfiguration:
        """How many threads compute and read for a token, by now."""
        return self._tuner.configuration

    @property
    def settled(self) -> bool:
        """Whether that has been tried, and stays."""
        return self._tuner.over

    def _begin_pass(self, now: float, rows: int) -> None:
        """Rows of a prompt are computed by all threads, a token by as many as are found best."""
        self._one_row = rows == 1
        threads = self.configuration.threads if self._one_row else self._n_threads
        self._compute.use_threads(threads)
        self._pager.blocks.readers = self.configuration.readers
        # between two tokens in a row there is little time; with more, the streaming buffer has filled meanwhile
        self._measured = self._one_row and self._pager.blocks.all_pinned_asked and now - self._pass_end < _LITTLE * self._pass_seconds
        self._pass_seconds = 0.0

    def _end_pass(self) -> None:
        self._pass_end = time.perf_counter()
        if self._measured and not self._tuner.over:
            self._tuner.passed(self._pass_seconds)
            if self._tuner.over:
                log.info("paging: what is fastest", threads=self.configuration.threads, readers=self.configuration.readers)

    async def _run_experts(self, unit: int, position: int, rows: int, first_row: int) -> None:
        """A unit of experts: all rows together where there is room for all experts that they go through, else in parts."""
        chosen = self.program.experts(self._pager.units[unit].expert_instruction, rows, first_row)
        if not self._pager.experts_fit(unit, chosen):
            part = TILE_COLUMNS * (-(-(rows - first_row) // (2 * TILE_COLUMNS))) if rows - first_row > TILE_COLUMNS else 1
            for begin in range(first_row, rows, part):
                await self._run_experts(unit, position, min(begin + part, rows), begin)
            return
        ask = partial(self._pager.demand, unit, chosen)
        ask()
        needed = self._pager.needed(unit, chosen)
        await self._there(needed, ask)
        await self._compute.run(self._unitwise, unit, unit + 1, position, rows, first_row)
        self._pager.computed(unit, chosen)

    async def _there(self, needed: Sequence[Block], ask: Callable[[], None]) -> None:
        """Wait until blocks are in memory. `ask` is called again as room becomes free."""
        blocks, metrics = self._pager.blocks, self.metrics
        if blocks.all_ready(needed):
            metrics.hits += len(needed)
            return
        loop = asyncio.get_running_loop()
        come = asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(come.set)

        missing = blocks.missing(needed, notify)
        metrics.hits += len(needed) - missing
        metrics.misses += missing
        if missing:
            begun = time.perf_counter()
            while missing:
                if not all(blocks.asked(block) for block in needed):
                    ask()  # what came since the last time may go by now; what comes from now on notifies
                await come.wait()
                come.clear()
                missing = blocks.missing(needed, notify)
            metrics.wait_seconds += time.perf_counter() - begun

    async def _embed(self, first_row: int, rows: int) -> None:
        """Bring the embedding's rows for the tokens of a pass.

        Even when cancelled it returns only after they have come: they would take the place of the next pass'.
        """
        embedding = self._weights.embedding
        if embedding is None:
            return
        tokens = [int(token) for token in self.program.values(TOKEN_PIPE)[first_row:rows, 0]]
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._pager.blocks.call(partial(_load_rows, embedding, tokens, loop, done, self._pager.blocks))
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            while not done.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([done])
            done.exception()
            raise
        done.result()

    async def close(self) -> None:
        """Give all up. Nothing is being computed."""
        self._compute.use_threads(self._n_threads)
        await in_thread("close", self.give_back)

    def give_back(self) -> None:
        """The memory, the readers and the file. Waits for reads: not for the event loop."""
        self._pager.close()
        self._weights.close()
        self._mapping.close()


def _load_rows(
    embedding: EmbeddingRows, tokens: Sequence[int], loop: asyncio.AbstractEventLoop, done: asyncio.Future[None], blocks: BlockCache
) -> None:
    """On a reader thread."""
    error: EngineError | None = None
    try:
        blocks.count(embedding.load(tokens))
    except EngineError as caught:
        error = caught

    def settle() -> None:
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle)
