"""A node's graph compiled: instructions, the memory they work on, and the views of its pipes that others fill and read."""

import copy
import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.allocation import aligned
from dairllm.engine.area import Area
from dairllm.engine.kv_caches import KvCaches
from dairllm.engine.memory import Layout
from dairllm.engine.ops import Emitter
from dairllm.engine.pieces import Piece
from dairllm.engine.tables import RopeTables, table_bytes
from dairllm.engine.weights import Weights
from dairllm.errors import EngineError, GraphError
from dairllm.graph.build import POSITION_PIPE
from dairllm.graph.types import BLOCK_VALUES, AttentionConfig, FloatType, MatmulConfig, NetworkConfig, NodeConfig, Op, OpCode
from dairllm.kernels.instructions import CLAIMS, FIELDS, Kind, State
from dairllm.kernels.panels import TILE_COLUMNS, row_panel_bytes
from dairllm.kernels.sizes import BARRIER_BYTES, CHUNK, attention_scratch_bytes, experts_scratch_bytes, tile_scratch_bytes

__all__ = ["STACK_BYTES", "MemoryNeeds", "Program", "compile_program", "memory_needs"]

MAX_THREADS = 1024


STACK_BYTES = 192 << 10
"""What a thread touches of its stack, and what the C library keeps for it."""


class MemoryNeeds(NamedTuple):
    """Bytes that running a graph takes beside its weights.

    Attributes:
        caches: K and V of all positions.
        working: pipes, buffers, tables, and what each thread works with.
    """

    caches: int
    working: int


def memory_needs(network: NetworkConfig, node: NodeConfig, *, n_threads: int, kv_cache: FloatType = FloatType.F32) -> MemoryNeeds:
    """What a program will take. Nothing is allocated.

    Args:
        n_threads: compute threads.
        kv_cache: F32, F16 or Q80.

    Raises:
        GraphError: sizes that no graph can have, or a KV cache that its heads cannot have.
    """
    layout = Layout(network, node, kv_cache)
    threads = n_threads * (scratch_bytes(node) + STACK_BYTES)
    return MemoryNeeds(layout.cache_bytes, layout.nbytes - layout.cache_bytes + table_bytes(node) + threads)


def scratch_bytes(node: NodeConfig) -> int:
    """What one thread works with: a tile of unpacked weights, rows of one expert, or a chunk of attention for some rows."""
    most = tile_scratch_bytes(1)
    for op in (op for segment in node.segments for op in segment.ops):
        size, c = op.weight_size, op.config
        if isinstance(c, MatmulConfig) and c.n_experts:
            row = 4 * size.y if size.float_type == FloatType.F32 else row_panel_bytes(size.y // BLOCK_VALUES)
            most = max(most, experts_scratch_bytes(row))
        elif op.code == OpCode.MATMUL and size.float_type != FloatType.F32:
            most = max(most, tile_scratch_bytes(size.y // BLOCK_VALUES))
        elif isinstance(c, AttentionConfig) and min(c.n_heads, c.n_kv_heads, c.n_heads_0, c.head_dim) > 0:
            group = min(max(c.n_heads // c.n_kv_heads, 1), c.n_heads_0)
            chunks = max(-(-node.buffers[c.key_cache_buffer].size.y // CHUNK), 1)  # a cache without room is refused where it is compiled
            most = max(most, attention_scratch_bytes(group, c.head_dim, chunks))
    return -(-most // 64) * 64 + 64


class Program:
    """Made by `compile_program`. Everything it works on lives as long as it does, and it must outlive its runs."""

    def __init__(self, layout: Layout, emitter: Emitter, segments: tuple[tuple[int, int], ...], n_threads: int) -> None:
        self._layout, self._kept = layout, (emitter.weights, emitter.tables)
        self.n_threads = n_threads
        self.segments = segments
        """(first instruction, end) of each."""
        self.pieces: Sequence[tuple[int, Piece]] = tuple(emitter.pieces)
        """(instruction, piece) of each matmul, in order."""
        self.embeddings: Sequence[tuple[int, Op]] = tuple(emitter.embeddings)
        """(instruction, op) of each embedding."""
        self.instructions = emitter.assembler.program()
        state = aligned(64).view(np.int64)
        self._state = state.data  # numpy takes three times as long to write a number
        self.barrier = aligned(BARRIER_BYTES)
        self.scratch_stride = emitter.scratch.nbytes
        self.scratch = aligned(self.scratch_stride * n_threads)
        # taken once: numpy needs a microsecond for each
        self.addresses = (self.instructions.ctypes.data, state.ctypes.data, self.barrier.ctypes.data, self.scratch.ctypes.data)
        self.n_batches = layout.network.n_batches
        self.seq_len = self.n_batches if emitter.seq_len is None else emitter.seq_len
        self._positions = layout.positions()
        self._first_position = self._positions[:1].data
        self._batch: tuple[int, int, int] | None = None
        self._rows: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        """By pipe: its slices [n, rows, width / n], and room for one row."""

    @property
    def n_segments(self) -> int:
        return len(self.segments)

    def with_segments(self, segments: Sequence[tuple[int, int]]) -> "Program":
        """The same instructions and the same memory, cut otherwise: (first instruction, end) of each segment. Only one of the two may
        be run."""
        other = copy.copy(self)
        other.segments = tuple(segments)
        return other

    def experts(self, instruction: int, rows: int, first_row: int = 0) -> set[int]:
        """Which experts an instruction of experts takes for rows first_row..rows-1, once those have been through the gate."""
        words = self.instructions[instruction].tolist()
        fields = dict(zip(FIELDS[Kind(words[0])], words[1:], strict=False))
        k, last = fields["k"], fields["n_experts"] - 1
        chosen = (ctypes.c_int64 * (k * (rows - first_row))).from_address(fields["indexes"] + 8 * k * first_row)
        return {min(max(expert, 0), last) for expert in chosen}

    def region(self, pipe: int, node: int | None, rows: int, first_row: int = 0) -> list[memoryview]:
        """The pipe's own memory for rows first_row..rows-1:

        `node`'s slice of each, or whole rows. One piece where the layout allows it, else one a row, in order.
        """
        return self._layout.region(pipe, node, rows, first_row)

    def row(self, pipe: int, row: int) -> NDArray[np.float32]:
        """One row of an F32 pipe, [width]: a view where it lies together, else its slices gathered into memory that the
        next call for this pipe writes again.
        """
        if pipe not in self._rows:
            slices = self._layout.slices(pipe)
            self._rows[pipe] = slices, np.empty(slices.shape[::2], np.float32)
        slices, gathered = self._rows[pipe]
        if len(slices) == 1:
            view: NDArray[np.float32] = slices[0, row]
            return view
        np.copyto(gathered, slices[:, row])
        return gathered.reshape(-1)

    def values(self, pipe: int) -> NDArray[np.float32]:
        """An F32 pipe that is not kept by slices, as a view [rows, width].

        Raises:
            GraphError: it is kept by slices, or not of F32.
        """
        slices = self._layout.slices(pipe)
        if len(slices) > 1:
            raise GraphError(f"pipe {self._layout.network.pipes[pipe].name} is kept by slices and has no whole rows")
        values: NDArray[np.float32] = slices[0]
        return values

    def keep_caches(self, count: int) -> KvCaches:
        """Sets of KV caches for so many texts, of which the program computes with one at a time. To be called once."""
        return KvCaches(self.instructions, count, self._layout)

    def profile(self) -> NDArray[np.int64]:
        """From now on, where the time goes: int64 [threads, kinds], the processor's cycles that each thread has spent on each `Kind`.

        The time at a barrier, waiting for the other threads, is the barrier's.
        """
        self._profile = np.zeros((self.n_threads, len(Kind)), np.int64)
        self._state[State.PROFILE] = self._profile.ctypes.data
        return self._profile

    def recover(self) -> None:
        """After a call that threads have left in the middle: make what they share as it was before the first call.

        What they have computed stays as it is.
        """
        self.barrier[:] = 0
        self.instructions[:, CLAIMS] = 0

    def prepare(self, position: int, rows: int, first_row: int = 0) -> None:
        """Say which rows the next run computes, and their positions: position, position + 1, ... from row 0 on.

        Args:
            first_row: the first of them: 0, a multiple of TILE_COLUMNS, or rows - 1 for the last row alone.

        Raises:
            EngineError: rows or positions that this program has no room for.
        """
        batch = position, rows, first_row
        if batch == self._batch:
            return  # as for every segment of a token but the first
        if not 1 <= rows <= self.n_batches or not 0 <= first_row < rows:
            raise EngineError(f"rows {first_row} to {rows - 1} of a batch of at most {self.n_batches}")
        if first_row % TILE_COLUMNS and first_row != rows - 1:
            raise EngineError(f"rows {first_row} to {rows - 1}: many rows begin at a multiple of {TILE_COLUMNS}")
        if position < 0 or position + rows > self.seq_len:
            raise EngineError(f"positions {position} to {position + rows - 1}; there is room for {self.seq_len}")
        if rows == 1:
            self._first_position[0] = position  # half the time that the other takes, between any two tokens
        else:
            self._positions[:rows] = np.arange(position, position + rows)
        self._state[State.FIRST_ROW], self._state[State.END_ROW] = first_row, rows
        self._batch = batch


def compile_program(
    network: NetworkConfig,
    node: NodeConfig,
    weights: Weights,
    *,
    n_threads: int,
    piece_bytes: int | None = None,
    kv_cache: FloatType = FloatType.F32,
) -> Program:
    """Allocate and compile. The weights need not have arrived yet.

    Args:
        piece_bytes: matmuls whose weights take more of the model file become several instructions (dairllm.engine.pieces); None: never.
        kv_cache: F32; F16 or Q80: half or a quarter of the memory, logits that differ a little (docs/arithmetic.md). A node's own choice.

    Raises:
        GraphError: the graph contradicts itself or asks for what we cannot compute.
    """
    if not 1 <= n_threads <= MAX_THREADS:
        raise EngineError(f"{n_threads} threads; expected 1 to {MAX_THREADS}")
    if not network.pipes or network.pipes[POSITION_PIPE].size.float_type != FloatType.F32 or network.pipes[POSITION_PIPE].size.x != 1:
        raise GraphError("pipe 0 brings the positions: one F32 value a row")
    layout = Layout(network, node, kv_cache)
    layout.allocate()
    scratch = Area("the memory that a thread works with", 0, scratch_bytes(node))
    emitter = Emitter(layout, weights, RopeTables(node), scratch, piece_bytes)
    segments = []
    for segment in node.segments:
        first = emitter.assembler.begin_segment()
        for op in segment.ops:
            emitter.emit(op)
        segments.append((first, len(emitter.assembler)))
    return Program(layout, emitter, tuple(segments), n_threads)
