"""Where the pipes and buffers of one node's graph lie in memory, and how large that is before any of it is allocated.

What the graph calls a buffer is not always stored as the graph says it: K and V caches lie head by head, activations
that only matmuls read lie packed in panels, a RoPE cache is a table that ops share, an attention buffer is not needed.
The *role* of each buffer follows from the ops that use it.
"""

from collections.abc import Iterator
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.allocation import sparse
from dairllm.engine.area import Area
from dairllm.engine.packed import Packed
from dairllm.engine.rope import MAX_POSITIONS
from dairllm.engine.rows import Rows
from dairllm.errors import GraphError
from dairllm.graph.types import (
    BLOCK_VALUES,
    AttentionConfig,
    FloatType,
    MatmulConfig,
    MoeGateConfig,
    MulConfig,
    NetworkConfig,
    NodeConfig,
    Op,
    OpCode,
    Pointer,
    PointerSource,
    PointerType,
    RmsNormConfig,
    ScaleConfig,
    Size,
    SyncType,
    row_bytes,
)
from dairllm.kernels.panels import TILE_COLUMNS, row_panel_bytes, tile_panel_bytes
from dairllm.kernels.sizes import CHUNK

__all__ = ["Layout", "Role", "buffer_roles"]

_LINE = 64
_PAGE = 4096


class Role(Enum):
    UNUSED = "unused"
    VALUES = "values"
    BLOCKS = "Q80 blocks"
    PACKED = "packed activations"
    CACHE = "KV cache"
    INDEXES = "expert indexes"


def _uses(op: Op) -> Iterator[tuple[int, Role]]:
    """Which buffers an op's configuration names, beside its input and output."""
    c = op.config
    if isinstance(c, AttentionConfig):
        yield c.query_buffer, Role.VALUES
        yield c.key_cache_buffer, Role.CACHE
        yield c.value_cache_buffer, Role.CACHE
    elif isinstance(c, MoeGateConfig):
        yield c.indexes_buffer, Role.INDEXES
    elif isinstance(c, MatmulConfig) and c.n_experts:
        yield c.expert_indexes_buffer, Role.INDEXES
    elif isinstance(c, RmsNormConfig):
        yield c.inv_rms_buffer, Role.VALUES
    elif isinstance(c, MulConfig):
        yield c.multiplier_buffer, Role.VALUES
    elif isinstance(c, ScaleConfig):
        yield c.scale_buffer, Role.VALUES


def buffer_roles(node: NodeConfig) -> tuple[Role, ...]:
    """The role of each buffer.

    Raises:
        GraphError: ops disagree about a buffer, or name one that is not there.
    """
    roles = [Role.UNUSED] * len(node.buffers)

    def use(index: int, role: Role, op: Op) -> None:
        if not 0 <= index < len(roles):
            raise GraphError(f"op {op.name} of layer {op.index} names buffer {index}; there are {len(roles)}")
        if roles[index] == Role.PACKED and role == Role.BLOCKS:
            roles[index] = role
        elif roles[index] == Role.BLOCKS and role == Role.PACKED:
            pass
        elif roles[index] not in (Role.UNUSED, role):
            name, other = node.buffers[index].name, roles[index].value
            raise GraphError(f"op {op.name} of layer {op.index} uses buffer {index} ({name}) as {role.value}, another op as {other}")
        else:
            roles[index] = role

    for segment in node.segments:
        for op in segment.ops:
            for pointer in (op.input, op.output):
                if pointer.source != PointerSource.BUFFER:
                    continue
                index = pointer.index
                if op.code == OpCode.SHIFT and pointer is op.output:
                    use(index, Role.CACHE, op)
                elif 0 <= index < len(roles) and node.buffers[index].size.float_type == FloatType.Q80:
                    # packed for matmuls where nothing else reads it
                    only_matmuls = pointer is op.output or op.code == OpCode.MATMUL
                    use(index, Role.PACKED if only_matmuls else Role.BLOCKS, op)
                else:
                    use(index, Role.VALUES, op)
            for index, role in _uses(op):
                use(index, role, op)
    return tuple(roles)


def _wanting_rows(node: NodeConfig) -> frozenset[int]:
    """The buffers that a matmul reads row by row whatever the batch: experts, and a number of outputs that tiles do not divide."""
    return frozenset(
        op.input.index
        for segment in node.segments
        for op in segment.ops
        if op.code == OpCode.MATMUL
        and op.input == Pointer(PointerSource.BUFFER, op.input.index, PointerType.BATCH)
        and ((isinstance(op.config, MatmulConfig) and op.config.n_experts) or op.weight_size.x % 8 != 0)
    )


class Layout:
    """Places for everything a node's graph holds. Built twice: to count (`nbytes`), then, once that is known to be allowed, to `allocate`.

    Args:
        kv_cache: F32; F16: K and V rows in half the memory; or Q80: in little more than a quarter.

    Raises:
        GraphError: a size that no row of the graph can have, or heads that are not whole blocks.
    """

    def __init__(self, network: NetworkConfig, node: NodeConfig, kv_cache: FloatType = FloatType.F32) -> None:
        if not 0 <= node.node < network.n_nodes:
            raise GraphError(f"node {node.node} of a network of {network.n_nodes} nodes")
        self.network, self.node, self.kv_cache = network, node, kv_cache
        self.head_dims: dict[int, set[int]] = {}
        """Of each cache: the sizes of heads that attention ops give it."""
        self._check_caches()
        self.rows = -(-network.n_batches // TILE_COLUMNS) * TILE_COLUMNS
        self.roles = buffer_roles(node)
        self._wanting_rows = _wanting_rows(node)
        self.writers: dict[int, set[OpCode]] = {}
        """By buffer, the kinds of ops that write it."""
        for op in (op for segment in node.segments for op in segment.ops):
            if op.output.source == PointerSource.BUFFER:
                self.writers.setdefault(op.output.index, set()).add(op.code)
        self.nbytes = self.cache_bytes = 0  # of all; of KV caches
        self._places: dict[tuple[str, int], tuple[int, int]] = {}
        """Offset and bytes of each."""
        self._areas: dict[tuple[str, int], Area] = {}
        self._rows: dict[tuple[str, int], Rows] = {}
        self._memory: NDArray[np.uint8] | None = None
        for i, pipe in enumerate(network.pipes):
            self._check(f"pipe {pipe.name}", pipe.size)
            if pipe.size.z != 1:
                raise GraphError(f"pipe {pipe.name} has {pipe.size.z} planes; a pipe has one")
            self.place("pipe", i, self.rows * row_bytes(pipe.size.float_type, pipe.size.x))
        for i, (buffer, role) in enumerate(zip(node.buffers, self.roles, strict=True)):
            if role in (Role.VALUES, Role.BLOCKS, Role.PACKED):
                self._check(f"buffer {buffer.name}", buffer.size)
            size = buffer.size
            if role in (Role.VALUES, Role.BLOCKS):
                stride = self._row_stride(size)  # what lies between rows is nobody's behind the last one
                self.place("buffer", i, (size.z * self.rows - 1) * stride + row_bytes(size.float_type, size.x))
            elif role == Role.PACKED:
                panels, tiles = self._packed_bytes(size)
                self.place("panels", i, size.z * self.rows * panels)
                if size.z == 1:
                    self.place("tiles", i, self.rows // TILE_COLUMNS * tiles)
            elif role == Role.CACHE:
                if size.y > MAX_POSITIONS:  # F32 has not all of those beyond: some would be rounded up to one that has no place
                    raise GraphError(f"buffer {buffer.name}, a KV cache, has {size.y} positions; expected at most {MAX_POSITIONS}")
                self.place("cache", i, self.cache_positions(size) * self.cache_row_bytes(size.x))
                self.cache_bytes += self.nbytes - self._places["cache", i][0]
            elif role == Role.INDEXES:
                self.place("indexes", i, self.rows * size.x * 8)
        self.place("positions", 0, self.rows * 4)
        # what one row's attention leaves between its chunks and their folding; ops take turns
        parts = [self._parts_values(op.config) for segment in node.segments for op in segment.ops if isinstance(op.config, AttentionConfig)]
        self.place("parts", 0, 4 * max((values for values, _ in parts), default=0))
        self.place("stats", 0, 8 * max((heads for _, heads in parts), default=0))

    def _parts_values(self, c: AttentionConfig) -> tuple[int, int]:
        """(values, heads) of all chunks of one row; whether the numbers make sense is for dairllm.engine.ops to say."""
        if min(c.n_heads, c.n_kv_heads, c.n_heads_0, c.head_dim) < 1:
            return 0, 0
        group = min(max(c.n_heads // c.n_kv_heads, 1), c.n_heads_0)
        chunks = -(-self.node.buffers[c.key_cache_buffer].size.y // CHUNK)
        heads = -(-c.n_heads_0 // group) * chunks * group
        return heads * c.head_dim, heads

    def _check(self, what: str, size: Size) -> None:
        if size.float_type not in (FloatType.F32, FloatType.Q80):
            raise GraphError(f"{what} is {size.float_type.name}; expected F32 or Q80")
        if size.float_type == FloatType.Q80 and size.x % BLOCK_VALUES:
            raise GraphError(f"{what} has rows of {size.x} values; Q80 needs a multiple of {BLOCK_VALUES}")
        if size.x < 1 or size.z < 1 or size.y != self.network.n_batches:
            raise GraphError(f"{what} is {size.z} x {size.y} x {size.x}; expected {self.network.n_batches} rows of at least one value")

    def _check_caches(self) -> None:
        if self.kv_cache not in (FloatType.F32, FloatType.F16, FloatType.Q80):
            raise GraphError(f"KV caches are kept as F32, F16 or Q80, not as {self.kv_cache.name}")
        for op in (op for segment in self.node.segments for op in segment.ops):
            if not isinstance(op.config, AttentionConfig):
                continue
            head_dim = op.config.head_dim
            for cache in (op.config.key_cache_buffer, op.config.value_cache_buffer):
                self.head_dims.setdefault(cache, set()).add(head_dim)
            if self.kv_cache == FloatType.Q80 and head_dim % BLOCK_VALUES:
                raise GraphError(
                    f"op {op.name} of layer {op.index} has heads of {head_dim} values; a KV cache of Q80 blocks needs a multiple of "
                    f"{BLOCK_VALUES}: keep the KV cache as F16 or F32"
                )

    @staticmethod
    def cache_positions(size: Size) -> int:
        return -(-size.y // CHUNK) * CHUNK

    def cache_row_bytes(self, values: int) -> int:
        """Of so many values at one position; what is left of a block counts as one."""
        whole = -(-values // BLOCK_VALUES) * BLOCK_VALUES if self.kv_cache == FloatType.Q80 else values
        return row_bytes(self.kv_cache, whole)

    @staticmethod
    def _row_stride(size: Size) -> int:
        """Whole cache lines, and not a multiple of the page: the rows of a tile would share one set of the cache."""
        stride = -(-row_bytes(size.float_type, size.x) // _LINE) * _LINE
        return stride + _LINE if stride % _PAGE == 0 else stride

    @staticmethod
    def _packed_bytes(size: Size) -> tuple[int, int]:
        blocks = size.x // BLOCK_VALUES
        return row_panel_bytes(blocks), tile_panel_bytes(blocks)

    def place(self, kind: str, index: int, nbytes: int) -> None:
        """Reserve nbytes under a name of its own."""
        self._places[kind, index] = self.nbytes, nbytes
        self.nbytes += -(-nbytes // _LINE) * _LINE

    def allocate(self) -> None:
        self._memory = sparse(self.nbytes)
        self._whole = Area.of("the program's memory", self._memory)

    def area(self, kind: str, index: int) -> Area:
        """What was reserved under a name."""
        if (kind, index) not in self._areas:
            self._areas[kind, index] = self._whole.part(self._name(kind, index), *self._places[kind, index])
        return self._areas[kind, index]

    def _name(self, kind: str, index: int) -> str:
        if kind == "pipe":
            return f"pipe {self.network.pipes[index].name}"
        if kind in ("positions", "parts", "stats"):
            return f"the {kind} of attention"
        name = f"buffer {self.node.buffers[index].name}"
        return name if kind == "buffer" else f"the {kind} of {name}"

    # ------------------------------------------------------------------------------------------------------------------ what ops work on
    def _sliced(self, pipe: int) -> bool:
        """Whether a pipe is stored slice by slice: then all rows of a peer's slice are one piece of memory, received and sent as such.

        So where its syncs move slices and every op sees one slice, or, adding them up, all.
        """
        n, size = self.network.n_nodes, self.network.pipes[pipe].size
        if n == 1 or size.x % n or (size.float_type == FloatType.Q80 and size.x // n % BLOCK_VALUES):
            return False
        syncs = [s for segment in self.node.segments for s in segment.syncs if s.pipe == pipe]
        if not syncs or any(s.type == SyncType.WITH_ROOT for s in syncs):
            return False
        here = PointerSource.PIPE, pipe
        for segment in self.node.segments:
            for op in segment.ops:
                if (op.output.source, op.output.index) == here and op.output.type != PointerType.BATCHED_SLICE:
                    return False
                if (op.input.source, op.input.index) == here and op.input.type != PointerType.BATCHED_SLICE:
                    if (
                        op.code != OpCode.MERGE_ADD
                        or op.output.source != PointerSource.BUFFER
                        or op.output.type != PointerType.BATCH
                        or not 0 <= op.output.index < len(self.node.buffers)
                    ):
                        return False
                    if self.node.buffers[op.output.index].size.x * n != size.x:
                        return False
        return True

    def pipe_rows(self, index: int) -> Rows:
        if ("pipe", index) not in self._rows:
            area, size, n = self.area("pipe", index), self.network.pipes[index].size, self.network.n_nodes
            row = row_bytes(size.float_type, size.x)
            row, slices = (row // n, row // n * self.rows) if self._sliced(index) else (row, 0)
            self._rows["pipe", index] = Rows(area, 0, self.rows, row, 0, slices, size.x, 1, size.float_type)
        return self._rows["pipe", index]

    def buffer_rows(self, index: int) -> Rows:
        if ("buffer", index) not in self._rows:
            size = self.node.buffers[index].size
            row = self._row_stride(size)
            area, plane = self.area("buffer", index), row * self.rows
            self._rows["buffer", index] = Rows(area, 0, self.rows, row, plane, 0, size.x, size.z, size.float_type)
        return self._rows["buffer", index]

    def packed(self, index: int) -> Packed:
        size = self.node.buffers[index].size
        row, tile = self._packed_bytes(size)
        tiles = self.area("tiles", index) if size.z == 1 else None
        always = size.z > 1 or index in self._wanting_rows
        return Packed(self.area("panels", index), tiles, self.rows, row, row * self.rows, tile, always, size.x, size.z)

    def region(self, pipe: int, node: int | None, rows: int, first_row: int = 0) -> list[memoryview]:
        """The memory of rows first_row..rows-1 of a pipe:

        of node's slice, or of whole rows. One piece where the layout allows it, else one a row, in order.
        """
        if self._memory is None:
            raise RuntimeError("the layout has not been allocated")
        found, size = self.pipe_rows(pipe), self.network.pipes[pipe].size
        start, _ = self._places["pipe", pipe]
        length = row_bytes(size.float_type, size.x)
        if node is not None:
            length //= self.network.n_nodes
            start += node * (found.slice_stride or length)
        elif found.slice_stride:
            raise GraphError(f"pipe {self.network.pipes[pipe].name} is kept by slices and has no whole rows")
        view = self._memory.data
        if found.row == length:
            return [view[start + first_row * length : start + rows * length]]
        return [view[start + m * found.row : start + m * found.row + length] for m in range(first_row, rows)]

    def slices(self, pipe: int) -> NDArray[np.float32]:
        """All rows of a pipe of F32 as they lie in memory: [slices, rows, width / slices], one slice where it is not kept by slices."""
        if self._memory is None:
            raise RuntimeError("the layout has not been allocated")
        found = self.pipe_rows(pipe)
        if found.float_type != FloatType.F32:
            raise GraphError(f"pipe {self.network.pipes[pipe].name} is {found.float_type.name}; expected F32")
        n = self.network.n_nodes if found.slice_stride else 1
        start, row_values = self._places["pipe", pipe][0], found.width // n
        values = self._memory[start : start + n * self.rows * row_values * 4].view(np.float32)
        return values.reshape(n, self.rows, row_values)

    def positions(self) -> NDArray[np.float32]:
        """The positions of all rows, [rows]."""
        if self._memory is None:
            raise RuntimeError("the layout has not been allocated")
        start, _ = self._places["positions", 0]
        return self._memory[start : start + self.rows * 4].view(np.float32)
