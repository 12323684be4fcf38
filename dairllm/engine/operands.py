"""What an op's pointers and configuration name, looked up and checked: the operands that its instructions are made of.

Sizes are checked here or in dairllm.engine.ops; addresses are taken from areas, which check them once more: whatever a root may send, a
instruction stays within the memory of its program.
"""

from typing import NamedTuple, TypeVar

from dairllm.engine.area import Area
from dairllm.engine.memory import Layout, Role
from dairllm.engine.packed import Packed
from dairllm.engine.rows import Rows
from dairllm.engine.step import Memory
from dairllm.engine.weights import Weights, WeightView
from dairllm.errors import GraphError
from dairllm.graph.types import (
    BLOCK_VALUES,
    FloatType,
    Op,
    OpCode,
    Pointer,
    PointerSource,
    PointerType,
    row_bytes,
)

__all__ = ["Cache", "Operands"]

_C = TypeVar("_C")


class Cache(NamedTuple):
    """A KV cache: [head][position][head_dim], F32, F16 or Q80 blocks.

    Attributes:
        area: what it lies in.
        width: values of a position, of all heads.
        positions: that it has room for. Whole chunks are read, and there are so many.
        head_dim: values of one head.
        head_row: bytes of a head's row at one position.
        head_stride: bytes from one head to the next.
        float_type: of what it keeps.
    """

    area: Area
    width: int
    positions: int
    head_dim: int
    head_row: int
    head_stride: int
    float_type: FloatType

    def at(self, heads: int, positions: int) -> int:
        """The address of the first head, of which and of those behind it so many positions are touched.

        Raises:
            AreaError: they are not all there.
        """
        return self.area.at(0, positions * self.head_row, (heads, self.head_stride))


class Operands:
    """Of one op.

    Raises:
        GraphError: from every method, where something does not exist, has another type or another size.
    """

    def __init__(self, op: Op, layout: Layout, weights: Weights) -> None:
        self.op, self._layout, self._weights = op, layout, weights

    def error(self, what: str) -> GraphError:
        return GraphError(f"op {self.op.name} ({self.op.code.name.lower()}) of layer {self.op.index}: {what}")

    def require(self, condition: bool, what: str) -> None:
        if not condition:
            raise self.error(what)

    def config(self, kind: type[_C]) -> _C:
        """The op's configuration, of the class that its code has."""
        if not isinstance(self.op.config, kind):
            raise self.error(f"its configuration is a {type(self.op.config).__name__}; expected a {kind.__name__}")
        return self.op.config

    @property
    def input(self) -> Memory:
        return self.op.input.source.name, self.op.input.index

    @property
    def output(self) -> Memory:
        return self.op.output.source.name, self.op.output.index

    def rows(self, pointer: Pointer, *types: FloatType) -> Rows:
        """Rows of values or of plain blocks. A batched slice is this node's part of each row."""
        network, node = self._layout.network, self._layout.node
        if pointer.type == PointerType.RAW:
            raise self.error("a raw pointer is only for the caches of shift")
        if pointer.source == PointerSource.PIPE:
            self.require(0 <= pointer.index < len(network.pipes), f"pipe {pointer.index} does not exist")
            found = self._layout.pipe_rows(pointer.index)
        else:
            self.require(0 <= pointer.index < len(node.buffers), f"buffer {pointer.index} does not exist")
            role = self._layout.roles[pointer.index]
            self.require(role in (Role.VALUES, Role.BLOCKS), f"buffer {node.buffers[pointer.index].name} is used as {role.value}")
            found = self._layout.buffer_rows(pointer.index)
        self.require(found.float_type in types, f"it takes {' or '.join(t.name for t in types)}, not {found.float_type.name}")
        if pointer.type == PointerType.BATCH:
            self.require(not found.slice_stride or self.op.code == OpCode.MERGE_ADD, "this pipe has no whole rows")
            return found
        n = network.n_nodes
        self.require(found.width % n == 0, f"a row of {found.width} values has no {n} equal slices")
        width = found.width // n
        whole = found.float_type == FloatType.F32 or width % BLOCK_VALUES == 0
        self.require(whole, f"a slice of {width} values is not a whole number of blocks")
        stride = found.slice_stride or row_bytes(found.float_type, width)
        return found._replace(offset=node.node * stride, slice_stride=0, width=width)

    def values(self, pointer: Pointer) -> Rows:
        """Rows of F32 values."""
        return self.rows(pointer, FloatType.F32)

    def buffer(self, index: int) -> Rows:
        """Whole rows of F32 values of a buffer that the configuration names."""
        return self.values(Pointer(PointerSource.BUFFER, index, PointerType.BATCH))

    def is_packed(self, pointer: Pointer) -> bool:
        known = pointer.source == PointerSource.BUFFER and 0 <= pointer.index < len(self._layout.roles)
        return known and self._layout.roles[pointer.index] == Role.PACKED

    def packed(self, pointer: Pointer) -> Packed:
        self.require(pointer.type == PointerType.BATCH, "packed activations are read and written as whole rows")
        return self._layout.packed(pointer.index)

    def is_repeated(self, pointer: Pointer) -> bool:
        """Whether all planes of a packed buffer are always the same, being written by repeat_z alone: then one plane is kept."""
        return pointer.source == PointerSource.BUFFER and self._layout.writers.get(pointer.index) == {OpCode.REPEAT_Z}

    def expert_indexes(self, index: int, k: int) -> int:
        """Address of int64 [rows][k]."""
        known = 0 <= index < len(self._layout.roles) and self._layout.roles[index] == Role.INDEXES
        self.require(known and self._layout.node.buffers[index].size.x == k, f"{k} experts need as many indexes a row")
        return self._layout.area("indexes", index).at(0, 8 * k, (self._layout.rows, 8 * k))

    def positions(self, pipe: int) -> int:
        """Address of the positions, F32 [rows]: the program's own, since what ops or other nodes write into the pipe may be anything."""
        self.require(pipe == 0 and len(self._layout.network.pipes) > 0, f"positions come in pipe 0, not in pipe {pipe}")
        found = self._layout.pipe_rows(0)
        self.require(found.float_type == FloatType.F32 and found.width == 1, "the position pipe has one F32 value a row")
        return self._layout.area("positions", 0).at(0, 4, (self._layout.rows, 4))

    def weight(self, float_type: FloatType, z: int, y: int, x: int) -> WeightView:
        size = self.op.weight_size
        expected, found = (f"{t.name} {a} x {b} x {c}" for t, a, b, c in ((float_type, z, y, x), (size.float_type, size.z, size.y, size.x)))
        self.require(expected == found, f"its weight is {found}; expected {expected}")
        return self._weights.view(self.op)

    def cache(self, index: int) -> Cache:
        """A cache that attention reads, for all ops alike: head by head."""
        known = 0 <= index < len(self._layout.roles) and self._layout.roles[index] == Role.CACHE
        self.require(known, f"buffer {index} is no cache")
        size, found = self._layout.node.buffers[index].size, sorted(self._layout.head_dims.get(index, ()))
        self.require(size.float_type == FloatType.F32 and size.z == 1 and size.x >= 1, "a cache is one plane of F32 rows")
        self.require(len(found) > 0, "no attention op reads the cache that it writes")
        self.require(len(found) == 1, f"a cache has heads of one size; attention ops give this one {' and '.join(map(str, found))} values")
        (head_dim,) = found
        heads = head_dim >= 8 and head_dim % 8 == 0 and size.x % head_dim == 0
        self.require(heads, f"cache rows of {size.x} values are not whole heads of {head_dim}, a multiple of 8")
        row = self._layout.cache_row_bytes(head_dim)
        stride = self._layout.cache_positions(size) * row
        return Cache(self._layout.area("cache", index), size.x, size.y, head_dim, row, stride, self._layout.kv_cache)

    def between(self, kind: str, nbytes: int) -> int:
        """Address of what attention keeps between its two instructions: "parts" or "stats"."""
        return self._layout.area(kind, 0).at(0, nbytes)
