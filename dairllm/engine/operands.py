"""What an op's pointers and configuration name, looked up and checked: the operands that its records are made of.

Every address that a kernel uses comes from here, so every size is checked here or in dairllm.engine.ops: whatever a root may send, a
record stays within the memory of its program.
"""

from typing import TypeVar

from dairllm.engine.memory import Area, Layout, Packed, Role
from dairllm.engine.step import Memory
from dairllm.engine.weights import Weights, WeightView
from dairllm.errors import GraphError
from dairllm.graph.types import (
    BLOCK_VALUES,
    AttentionConfig,
    FloatType,
    Op,
    OpCode,
    Pointer,
    PointerSource,
    PointerType,
    row_bytes,
)

__all__ = ["Cache", "Operands", "planes", "rows"]

_C = TypeVar("_C")


def rows(name: str, area: Area) -> dict[str, int]:
    """Fields of an operand of one plane."""
    return {name: area.address, f"{name}_row": area.row}


def planes(name: str, area: Area) -> dict[str, int]:
    """Fields of an operand of several planes."""
    return {**rows(name, area), f"{name}_plane": area.plane if area.planes > 1 else 0}


class Cache:
    """A KV cache: [head][position][head_dim], F32, F16 or Q80 blocks. `head_stride` in bytes."""

    def __init__(self, address: int, width: int, positions: int, head_stride: int, float_type: FloatType) -> None:
        self.address, self.width, self.positions, self.head_stride = address, width, positions, head_stride
        self.float_type = float_type


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

    def area(self, pointer: Pointer, *types: FloatType) -> Area:
        """Rows of values or of plain blocks. A batched slice is this node's part of each row."""
        network, node = self._layout.network, self._layout.node
        if pointer.type == PointerType.RAW:
            raise self.error("a raw pointer is only for the caches of shift")
        if pointer.source == PointerSource.PIPE:
            self.require(0 <= pointer.index < len(network.pipes), f"pipe {pointer.index} does not exist")
            area = self._layout.pipe_area(pointer.index)
        else:
            self.require(0 <= pointer.index < len(node.buffers), f"buffer {pointer.index} does not exist")
            role = self._layout.roles[pointer.index]
            self.require(role in (Role.VALUES, Role.BLOCKS), f"buffer {node.buffers[pointer.index].name} is used as {role.value}")
            area = self._layout.buffer_area(pointer.index)
        self.require(area.float_type in types, f"it takes {' or '.join(t.name for t in types)}, not {area.float_type.name}")
        if pointer.type == PointerType.BATCH:
            self.require(not area.slice_stride or self.op.code == OpCode.MERGE_ADD, "this pipe has no whole rows")
            return area
        n = network.n_nodes
        self.require(area.width % n == 0, f"a row of {area.width} values has no {n} equal slices")
        width = area.width // n
        whole = area.float_type == FloatType.F32 or width % BLOCK_VALUES == 0
        self.require(whole, f"a slice of {width} values is not a whole number of blocks")
        stride = area.slice_stride or row_bytes(area.float_type, width)
        return Area(area.address + node.node * stride, area.row, area.plane, 0, width, area.planes, area.float_type)

    def values(self, pointer: Pointer) -> Area:
        """Rows of F32 values."""
        return self.area(pointer, FloatType.F32)

    def buffer(self, index: int) -> Area:
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
        here = pointer.source, pointer.index
        writers = {op.code for s in self._layout.node.segments for op in s.ops if (op.output.source, op.output.index) == here}
        return writers == {OpCode.REPEAT_Z}

    def expert_indexes(self, index: int, k: int) -> int:
        """Address of int64 [rows][k]."""
        known = 0 <= index < len(self._layout.roles) and self._layout.roles[index] == Role.INDEXES
        self.require(known and self._layout.node.buffers[index].size.x == k, f"{k} experts need as many indexes a row")
        return self._layout.address("indexes", index)

    def positions(self, pipe: int) -> int:
        """Address of the positions, F32 [rows]: the program's own, since what ops or other nodes write into the pipe may be anything."""
        self.require(pipe == 0 and len(self._layout.network.pipes) > 0, f"positions come in pipe 0, not in pipe {pipe}")
        area = self._layout.pipe_area(0)
        self.require(area.float_type == FloatType.F32 and area.width == 1, "the position pipe has one F32 value a row")
        return self._layout.address("positions", 0)

    def weight(self, float_type: FloatType, z: int, y: int, x: int) -> WeightView:
        size = self.op.weight_size
        expected, found = (f"{t.name} {a} x {b} x {c}" for t, a, b, c in ((float_type, z, y, x), (size.float_type, size.z, size.y, size.x)))
        self.require(expected == found, f"its weight is {found}; expected {expected}")
        return self._weights.view(self.op)

    def cache(self, index: int, head_dim: int) -> Cache:
        known = 0 <= index < len(self._layout.roles) and self._layout.roles[index] == Role.CACHE
        self.require(known, f"buffer {index} is no cache")
        size = self._layout.node.buffers[index].size
        self.require(size.float_type == FloatType.F32 and size.z == 1 and size.x >= 1, "a cache is one plane of F32 rows")
        heads = head_dim >= 8 and head_dim % 8 == 0 and size.x % head_dim == 0
        self.require(heads, f"cache rows of {size.x} values are not whole heads of {head_dim}, a multiple of 8")
        head_stride = self._layout.cache_positions(size) * self._layout.cache_row_bytes(head_dim)
        return Cache(self._layout.address("cache", index), size.x, size.y, head_stride, self._layout.kv_cache)

    def head_dim(self, cache: int) -> int:
        """The head size that the attention op which reads a cache gives it."""
        for op in (op for segment in self._layout.node.segments for op in segment.ops):
            c = op.config
            if isinstance(c, AttentionConfig) and cache in (c.key_cache_buffer, c.value_cache_buffer):
                return c.head_dim
        raise self.error("no attention op reads the cache that it writes")

    def scratch(self, kind: str) -> int:
        """Address of what attention keeps between its two records."""
        return self._layout.address(kind, 0)
