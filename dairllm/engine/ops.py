"""Graph ops to records: what each op reads and writes, checked against the sizes it names, and where threads must meet.

Every address that a kernel uses comes from here, so every size is checked here: whatever a root may send, a record that is emitted stays within the memory of its program.

Barriers: each record says which memory it reads and writes and how its columns, rows or heads are dealt to threads (its *deal*). Two records need a barrier between them when one
writes what the other touches, unless both deal it alike: then a thread only meets what it did itself.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.memory import CHUNK, Area, Layout, Packed, Role
from dairllm.engine.tables import RopeTables
from dairllm.engine.weights import Weights
from dairllm.errors import GraphError
from dairllm.graph.types import (
    BLOCK_VALUES, AttentionConfig, FloatType, InvRmsConfig, MatmulConfig, MoeGateConfig, MulConfig, NoConfig, Op, OpCode, Pointer, PointerSource, PointerType, RmsNormConfig,
    RopeConfig, RopeType, ScaleConfig, ShiftConfig, row_bytes,
)  # fmt: skip
from dairllm.kernels.records import ALWAYS_ROWS, FIELDS, RECORD_WORDS, Kind

__all__ = ["Emitter"]

_CONFIG: dict[OpCode, type] = {
    OpCode.INV_RMS: InvRmsConfig,
    OpCode.RMS_NORM: RmsNormConfig,
    OpCode.MATMUL: MatmulConfig,
    OpCode.ROPE: RopeConfig,
    OpCode.MULTIHEAD_ATT: AttentionConfig,
    OpCode.MUL: MulConfig,
    OpCode.SCALE: ScaleConfig,
    OpCode.SHIFT: ShiftConfig,
    OpCode.MOE_GATE: MoeGateConfig,
}

Deal = tuple[str, int] | None
"""How a record's work is dealt: ("columns", n), ("rows", n parts a row), ("heads", n); None: any thread may touch any of it."""


@dataclass(frozen=True, slots=True)
class _Use:
    memory: tuple[str, int]
    writes: bool
    deal: Deal


class Emitter:
    """Compiles ops one after the other; `records` is the program so far.

    Args:
        layout: allocated.
        weights: where the ops' weights are.
        tables: RoPE tables.
    """

    def __init__(self, layout: Layout, weights: Weights, tables: RopeTables) -> None:
        self.layout, self.weights, self.tables = layout, weights, tables
        self.records: list[list[int]] = []
        self.max_blocks = 1
        self.attention_shapes: list[tuple[int, int, int]] = []
        self.seq_len: int | None = None
        self._since_barrier: list[_Use] = []
        self._op: Op

    def emit(self, op: Op) -> None:
        """Append an op's records.

        Raises:
            GraphError: its sizes contradict each other, or it is one that we cannot compute.
        """
        self._op = op
        if not isinstance(op.config, _CONFIG.get(op.code, NoConfig)):
            raise self._error(f"its configuration is a {type(op.config).__name__}")
        {
            OpCode.MERGE_ADD: self._merge_add,
            OpCode.MERGE_SUM: self._merge_sum,
            OpCode.EMBEDDING: self._embedding,
            OpCode.INV_RMS: self._inv_rms,
            OpCode.RMS_NORM: self._rms_norm,
            OpCode.MATMUL: self._matmul,
            OpCode.ROPE: self._rope,
            OpCode.MULTIHEAD_ATT: self._attention,
            OpCode.GELU: lambda: self._map(Kind.GELU),
            OpCode.SILU: lambda: self._map(Kind.SILU),
            OpCode.MUL: self._mul,
            OpCode.SCALE: self._scale,
            OpCode.CAST: self._cast,
            OpCode.REPEAT_Z: self._repeat_z,
            OpCode.SHIFT: self._shift,
            OpCode.SOFTMAX: self._softmax,
            OpCode.MOE_GATE: self._moe_gate,
        }[op.code]()

    def program(self) -> NDArray[np.int64]:
        return np.array(self.records, np.int64).reshape(-1, RECORD_WORDS)

    # ------------------------------------------------------------------------------------------------------------ records and barriers
    def _error(self, what: str) -> GraphError:
        return GraphError(f"op {self._op.name} ({self._op.code.name.lower()}) of layer {self._op.index}: {what}")

    def _require(self, condition: bool, what: str) -> None:
        if not condition:
            raise self._error(what)

    def _record(self, kind: Kind, uses: list[_Use], **values: int) -> None:
        def conflicts(new: _Use) -> bool:
            return any(
                old.memory == new.memory and (old.writes or new.writes) and (old.deal is None or old.deal != new.deal) for old in self._since_barrier
            )

        if any(conflicts(use) for use in uses):
            self.records.append([Kind.BARRIER] + [0] * (RECORD_WORDS - 1))
            self._since_barrier.clear()
        self._since_barrier += uses
        assert tuple(values) == FIELDS[kind], kind
        self.records.append([kind, *values.values()] + [0] * (RECORD_WORDS - 1 - len(values)))

    # --------------------------------------------------------------------------------------------------------------------- operands
    def _memory(self, pointer: Pointer) -> tuple[str, int]:
        return pointer.source.name, pointer.index

    def _area(self, pointer: Pointer, *types: FloatType) -> Area:
        """Rows of values or plain blocks. A batched slice is this node's part."""
        network, node = self.layout.network, self.layout.node
        if pointer.type == PointerType.RAW:
            raise self._error("a raw pointer is only for the caches of shift")
        if pointer.source == PointerSource.PIPE:
            self._require(0 <= pointer.index < len(network.pipes), f"pipe {pointer.index} does not exist")
            area = self.layout.pipe_area(pointer.index)
        else:
            self._require(0 <= pointer.index < len(node.buffers), f"buffer {pointer.index} does not exist")
            role = self.layout.roles[pointer.index]
            self._require(role in (Role.VALUES, Role.BLOCKS), f"buffer {node.buffers[pointer.index].name} is used as {role.value}")
            area = self.layout.buffer_area(pointer.index)
        self._require(area.float_type in types, f"it takes {' or '.join(t.name for t in types)}, not {area.float_type.name}")
        if pointer.type == PointerType.BATCH:
            self._require(not area.slice_stride or self._op.code == OpCode.MERGE_ADD, "this pipe has no whole rows")
            return area
        n = network.n_nodes
        self._require(area.width % n == 0, f"a row of {area.width} values has no {n} equal slices")
        width = area.width // n
        self._require(area.float_type == FloatType.F32 or width % BLOCK_VALUES == 0, f"a slice of {width} values is not a whole number of blocks")
        stride = area.slice_stride or row_bytes(area.float_type, width)
        return Area(area.address + node.node * stride, area.row, area.plane, 0, width, area.planes, area.float_type)

    def _values(self, pointer: Pointer) -> Area:
        return self._area(pointer, FloatType.F32)

    def _buffer(self, index: int) -> tuple[Area, tuple[str, int]]:
        pointer = Pointer(PointerSource.BUFFER, index, PointerType.BATCH)
        return self._values(pointer), self._memory(pointer)

    def _is_packed(self, pointer: Pointer) -> bool:
        return pointer.source == PointerSource.BUFFER and 0 <= pointer.index < len(self.layout.roles) and self.layout.roles[pointer.index] == Role.PACKED

    def _packed(self, pointer: Pointer) -> Packed:
        self._require(pointer.type == PointerType.BATCH, "packed activations are read and written as whole rows")
        return self.layout.packed(pointer.index)

    def _positions(self, pipe: int) -> int:
        self._require(pipe == 0 and len(self.layout.network.pipes) > 0, f"positions come in pipe 0, not in pipe {pipe}")
        area = self.layout.pipe_area(0)
        self._require(area.float_type == FloatType.F32 and area.width == 1, "the position pipe has one F32 value a row")
        return area.address

    def _weight(self, float_type: FloatType, z: int, y: int, x: int) -> Any:
        size = self._op.weight_size
        found = f"{size.float_type.name} {size.z} x {size.y} x {size.x}"
        self._require((size.float_type, size.z, size.y, size.x) == (float_type, z, y, x), f"its weight is {found}; expected {float_type.name} {z} x {y} x {x}")
        return self.weights.view(self._op)

    # -------------------------------------------------------------------------------------------------------------------- column ops
    def _map(self, kind: Kind, x: Area | None = None, extra: dict[str, int] | None = None, reads: list[_Use] | None = None, planes: int | None = None) -> None:
        op = self._op
        x = x or self._values(op.input)
        y = self._area(op.output, FloatType.Q80 if kind == Kind.TO_BLOCKS else FloatType.F32)
        planes = planes or x.planes
        self._require(x.width == y.width and y.planes == planes, f"{x.planes} planes of {x.width} values become {y.planes} of {y.width}")
        deal = "columns", x.width
        uses = [_Use(self._memory(op.input), False, deal), _Use(self._memory(op.output), True, deal), *(reads or [])]
        self._record(
            kind, uses, x=x.address, x_row=x.row, x_plane=x.plane if x.planes > 1 else 0, y=y.address, y_row=y.row, y_plane=y.plane, n=x.width, planes=planes, **(extra or {})
        )

    def _mul(self) -> None:
        m, memory = self._buffer(self._op.config.multiplier_buffer)  # type: ignore[union-attr]  # emit has checked the class
        x = self._values(self._op.input)
        self._require((m.width, m.planes) == (x.width, x.planes), f"it multiplies {x.planes} x {x.width} values by {m.planes} x {m.width}")
        self._map(Kind.MUL, x, {"m": m.address, "m_row": m.row, "m_plane": m.plane}, [_Use(memory, False, ("columns", x.width))])

    def _scale(self) -> None:
        s, memory = self._buffer(self._op.config.scale_buffer)  # type: ignore[union-attr]
        x = self._values(self._op.input)
        self._require((s.width, s.planes) == (1, x.planes), f"it scales {x.planes} planes by {s.planes} of {s.width} values")
        self._map(Kind.SCALE, x, {"s": s.address, "s_row": s.row, "s_plane": s.plane}, [_Use(memory, False, None)])

    def _cast(self) -> None:
        op = self._op
        self._require(not self._is_packed(op.input), "packed activations cannot be cast")
        x = self._area(op.input, FloatType.F32, FloatType.Q80)
        if self._is_packed(op.output):
            self._pack(x, op.output)
            return
        y = self._area(op.output, FloatType.F32, FloatType.Q80)
        kinds = {
            (FloatType.F32, FloatType.F32): Kind.COPY,
            (FloatType.F32, FloatType.Q80): Kind.TO_BLOCKS,
            (FloatType.Q80, FloatType.F32): Kind.FROM_BLOCKS,
        }
        kind = kinds.get((x.float_type, y.float_type))
        if kind is None:
            raise self._error(f"there is no cast from {x.float_type.name} to {y.float_type.name}")
        self._map(kind, x)

    def _pack(self, x: Area, destination: Pointer, repeat: bool = False) -> None:
        """Rows into panels. Repeated planes are one: all read the same panels."""
        y = self._packed(destination)
        self._require(x.width == y.width and (repeat or x.planes == y.planes), f"{x.planes} planes of {x.width} values become {y.planes} of {y.width}")
        deal = "columns", x.width
        self._record(
            Kind.PACK if x.float_type == FloatType.F32 else Kind.PACK_BLOCKS,
            [_Use(self._memory(self._op.input), False, deal), _Use(self._memory(destination), True, deal)],
            x=x.address, x_row=x.row, x_plane=x.plane, n=x.width, panels=y.panels, panels_row=y.panels_row, panels_plane=y.panels_plane, tiles=y.tiles,
            tile_stride=y.tile_stride, flags=ALWAYS_ROWS if y.always_rows else 0, planes=1 if repeat else x.planes,
        )  # fmt: skip

    def _repeats(self, buffer: int) -> bool:
        """Whether all planes of a packed buffer are always the same, being written by repeat_z alone."""
        writers = [op.code for s in self.layout.node.segments for op in s.ops if (op.output.source, op.output.index) == (PointerSource.BUFFER, buffer)]
        return set(writers) == {OpCode.REPEAT_Z}

    def _repeat_z(self) -> None:
        op = self._op
        x = self._values(op.input)
        self._require(x.planes == 1, f"it repeats one plane, not {x.planes}")
        if self._is_packed(op.output):
            self._require(self._repeats(op.output.index), "its output is written by other ops as well")
            self._pack(x, op.output, repeat=True)
        else:
            self._map(Kind.COPY, x, planes=self._values(op.output).planes)

    def _merge_add(self) -> None:
        op = self._op
        x, y = self._area(op.input, FloatType.F32, FloatType.Q80), self._values(op.output)
        self._require(x.width % y.width == 0 and x.planes == y.planes == 1, f"{x.width} values do not divide into slices of {y.width}")
        n_slices = x.width // y.width
        self._require(x.float_type == FloatType.F32 or y.width % BLOCK_VALUES == 0, f"slices of {y.width} values are not whole blocks")
        deal = "columns", y.width
        self._record(
            Kind.MERGE_ADD_F32 if x.float_type == FloatType.F32 else Kind.MERGE_ADD_BLOCKS,
            [_Use(self._memory(op.input), False, deal), _Use(self._memory(op.output), True, deal)],
            x=x.address, x_row=x.row, x_slice=x.slice_stride or row_bytes(x.float_type, y.width), n_slices=n_slices, y=y.address, y_row=y.row, n=y.width,
        )  # fmt: skip

    def _merge_sum(self) -> None:
        op = self._op
        x, y = self._values(op.input), self._values(op.output)
        self._require(x.width == y.width and y.planes == 1, f"{x.planes} planes of {x.width} values become {y.planes} of {y.width}")
        deal = "columns", y.width
        uses = [_Use(self._memory(op.input), False, deal), _Use(self._memory(op.output), True, deal)]
        self._record(Kind.MERGE_SUM, uses, x=x.address, x_row=x.row, x_plane=x.plane, planes=x.planes, y=y.address, y_row=y.row, n=y.width)

    def _embedding(self) -> None:
        op = self._op
        tokens, y = self._values(op.input), self._values(op.output)
        self._require(tokens.width == 1 and y.planes == 1, f"it takes one token a row, not {tokens.width}")
        vocab = op.weight_size.y
        self._require(vocab >= 1, "its table is empty")
        w = self._weight(FloatType.F32, 1, vocab, y.width)
        uses = [_Use(self._memory(op.input), False, None), _Use(self._memory(op.output), True, ("columns", y.width))]
        self._require(tokens.row == 4, "tokens lie one after the other")
        self._record(Kind.EMBED, uses, tokens=tokens.address, table=w.address, vocab=vocab, n=y.width, y=y.address, y_row=y.row)

    # --------------------------------------------------------------------------------------------------------------------------- norms
    def _inv_rms(self) -> None:
        op, c = self._op, self._op.config
        assert isinstance(c, InvRmsConfig)
        x, y = self._values(op.input), self._values(op.output)
        self._require(x.planes == y.planes == 1 and 1 <= c.n_columns <= y.width and x.width % c.n_columns == 0, f"{x.width} values have no {c.n_columns} equal parts, or {y.width} places for them")
        uses = [_Use(self._memory(op.input), False, None), _Use(self._memory(op.output), True, ("rows", c.n_columns))]
        bits = int(np.float32(c.epsilon).view(np.int32))
        self._record(Kind.INV_RMS, uses, x=x.address, x_row=x.row, y=y.address, y_row=y.row, n_columns=c.n_columns, width=x.width // c.n_columns, epsilon_bits=bits)

    def _rms_norm(self) -> None:
        op, c = self._op, self._op.config
        assert isinstance(c, RmsNormConfig)
        x, y = self._values(op.input), self._values(op.output)
        inverse, memory = self._buffer(c.inv_rms_buffer)
        self._require(x.width == y.width and x.planes == y.planes == inverse.planes == 1, f"{x.width} values become {y.width}")
        self._require(1 <= c.n_columns <= inverse.width and x.width % c.n_columns == 0, f"{x.width} values have no {c.n_columns} equal parts")
        width = x.width // c.n_columns
        w = self._weight(FloatType.F32, 1, 1, width)
        deal = "columns", x.width
        uses = [_Use(self._memory(op.input), False, deal), _Use(memory, False, None), _Use(self._memory(op.output), True, deal)]
        self._record(
            Kind.RMS_NORM, uses, x=x.address, x_row=x.row, inverse=inverse.address, inverse_row=inverse.row, weights=w.address, y=y.address, y_row=y.row,
            n_columns=c.n_columns, width=width,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------------------------- matmuls
    def _matmul(self) -> None:
        op, c, size = self._op, self._op.config, self._op.weight_size
        assert isinstance(c, MatmulConfig)
        y = self._values(op.output)
        experts = c.n_experts
        self._require(size.float_type in (FloatType.F32, FloatType.Q40, FloatType.Q80), f"weights of type {size.float_type.name}")
        self._require(size.x == y.width, f"its weight has {size.x} outputs, its output {y.width} values")
        planes = c.n_active_experts if experts else 1
        self._require(y.planes == planes and (not experts or 1 <= planes <= experts), f"{planes} of {experts} experts write {y.planes} planes")
        w = self._weight(size.float_type, max(experts, 1), size.y, size.x)
        route: dict[str, int] = {}
        uses = [_Use(self._memory(op.input), False, None), _Use(self._memory(op.output), True, ("columns", y.width))]
        if experts:
            index = c.expert_indexes_buffer
            self._require(0 <= index < len(self.layout.roles) and self.layout.node.buffers[index].size.x == planes, f"{planes} experts need as many indexes a row")
            route = {"indexes": self.layout.address("indexes", index), "k": planes, "n_experts": experts}
            uses.append(_Use(("BUFFER", index), False, None))
        if size.float_type == FloatType.F32:
            x = self._values(op.input)
            self._require((x.width, x.planes) == (size.y, planes), f"its weight has {size.y} inputs, its input {x.planes} planes of {x.width} values")
            if experts:
                self._record(
                    Kind.EXPERTS_F32, uses, x=x.address, x_row=x.row, x_plane=x.plane, weights=w.address, weights_row=w.row, weights_expert=w.expert, n=size.y, d=size.x,
                    y=y.address, y_row=y.row, y_plane=y.plane, **route,
                )  # fmt: skip
            else:
                self._record(Kind.MATMUL_F32, uses, x=x.address, x_row=x.row, weights=w.address, weights_row=w.row, n=size.y, d=size.x, y=y.address, y_row=y.row)
            return
        self._require(self._is_packed(op.input), f"{size.float_type.name} weights take Q80 activations from a buffer that only matmuls read")
        p = self._packed(op.input)
        self._require((p.width, p.planes) == (size.y, planes), f"its weight has {size.y} inputs, its input {p.planes} planes of {p.width} values")
        blocks = size.y // BLOCK_VALUES
        self.max_blocks = max(self.max_blocks, blocks)
        q80 = size.float_type == FloatType.Q80
        if experts:
            plane = 0 if self._repeats(op.input.index) else p.panels_plane
            self._record(
                Kind.EXPERTS_Q80 if q80 else Kind.EXPERTS_Q40, uses, x=p.panels, x_row=p.panels_row, x_plane=plane, weights=w.address, weights_row=w.row,
                weights_expert=w.expert, n=blocks, d=size.x, y=y.address, y_row=y.row, y_plane=y.plane, **route,
            )  # fmt: skip
        else:
            self._record(
                Kind.MATMUL_Q80 if q80 else Kind.MATMUL_Q40, uses, panels=p.panels, panels_row=p.panels_row, tiles=p.tiles, tile_stride=p.tile_stride, weights=w.address,
                weights_row=w.row, n_blocks=blocks, d=size.x, y=y.address, y_row=y.row,
            )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------------------- attention
    def _limit_positions(self, seq_len: int) -> None:
        self._require(seq_len >= 1, "it has room for no position")
        self.seq_len = seq_len if self.seq_len is None else min(self.seq_len, seq_len)

    def _rope(self) -> None:
        op, c = self._op, self._op.config
        assert isinstance(c, RopeConfig)
        self._require(op.input == op.output, "rope works in place")
        x = self._values(op.input)
        self._require(c.head_dim >= 2 and c.head_dim % 2 == 0 and x.width % c.head_dim == 0 and x.planes == 1, f"{x.width} values are not whole heads of {c.head_dim}")
        if c.type != RopeType.FALCON:
            self._require((c.q_dim_start if c.is_q else c.kv_dim_start) % c.head_dim == 0, f"a slice that begins inside a head of {c.head_dim}")
        self._limit_positions(c.seq_len)
        table = self.tables.address(c)
        halves = c.type == RopeType.FALCON
        deal: Deal = ("heads", x.width // c.head_dim) if halves else ("columns", x.width)
        uses = [_Use(self._memory(op.input), True, deal)]
        kind = Kind.ROPE_HALVES if halves else Kind.ROPE_NEIGHBOURS
        self._record(kind, uses, x=x.address, x_row=x.row, n=x.width, head_dim=c.head_dim, table=table, positions=self._positions(c.position_pipe))

    def _head_dim_of(self, cache: int) -> int:
        """The head size that the attention op which reads this cache gives it."""
        for segment in self.layout.node.segments:
            for op in segment.ops:
                c = op.config
                if isinstance(c, AttentionConfig) and cache in (c.key_cache_buffer, c.value_cache_buffer):
                    return c.head_dim
        raise self._error(f"no attention op reads the cache {self.layout.node.buffers[cache].name}")

    def _cache(self, index: int, head_dim: int) -> tuple[int, int, int, int]:
        """(address, bytes from head to head, width, positions) of a KV cache."""
        self._require(0 <= index < len(self.layout.roles) and self.layout.roles[index] == Role.CACHE, f"buffer {index} is no cache")
        size = self.layout.node.buffers[index].size
        self._require(size.float_type == FloatType.F32 and size.z == 1 and size.x >= 1, "a cache is one plane of F32 rows")
        self._require(head_dim >= 8 and head_dim % 8 == 0 and size.x % head_dim == 0, f"cache rows of {size.x} values are not whole heads of {head_dim}, a multiple of 8")
        return self.layout.address("cache", index), self.layout.cache_positions(size) * head_dim * 4, size.x, size.y

    def _shift(self) -> None:
        op, c = self._op, self._op.config
        assert isinstance(c, ShiftConfig)
        x = self._values(op.input)
        self._require(op.output.source == PointerSource.BUFFER and op.output.type == PointerType.RAW, "it writes into a cache, by a raw pointer")
        head_dim = self._head_dim_of(op.output.index)
        cache, head_stride, width, positions = self._cache(op.output.index, head_dim)
        self._require(x.width == width and x.planes == 1, f"rows of {x.width} values go into a cache of {width}")
        self._limit_positions(positions)
        deal = "columns", x.width
        uses = [_Use(self._memory(op.input), False, deal), _Use(self._memory(op.output), True, deal)]
        self._record(
            Kind.SHIFT, uses, x=x.address, x_row=x.row, n=width, head_dim=head_dim, cache=cache, head_stride=head_stride, positions=self._positions(c.position_pipe)
        )

    def _attention(self) -> None:
        op, c = self._op, self._op.config
        assert isinstance(c, AttentionConfig)
        y = self._values(op.output)
        q, q_memory = self._buffer(c.query_buffer)
        keys, head_stride, width, positions = self._cache(c.key_cache_buffer, c.head_dim)
        values, value_stride, value_width, value_positions = self._cache(c.value_cache_buffer, c.head_dim)
        self._require((head_stride, width, positions) == (value_stride, value_width, value_positions), "its two caches have different sizes")
        self._require(1 <= c.n_kv_heads <= c.n_heads and c.n_heads % c.n_kv_heads == 0, f"{c.n_heads} heads do not share {c.n_kv_heads} KV heads evenly")
        group = c.n_heads // c.n_kv_heads
        self._require(c.n_heads_0 >= 1 and q.width == y.width == c.n_heads_0 * c.head_dim and q.planes == y.planes == 1, f"{c.n_heads_0} heads of {c.head_dim} are not {q.width} and {y.width} values")
        n_kv = -(-c.n_heads_0 // group)
        self._require(n_kv * c.head_dim <= width, f"{c.n_heads_0} heads need {n_kv} KV heads, its caches have {width // c.head_dim}")
        self._limit_positions(positions)
        group = min(group, c.n_heads_0)
        chunks = -(-positions // CHUNK)
        self.attention_shapes.append((group, c.head_dim, chunks))
        fields = {
            "q": q.address, "q_row": q.row, "n_heads": c.n_heads_0, "group": group, "head_dim": c.head_dim, "keys": keys, "values": values, "head_stride": head_stride,
            "positions": self._positions(c.position_pipe), "y": y.address, "y_row": y.row, "parts": self.layout.address("parts", 0), "stats": self.layout.address("stats", 0),
            "max_chunks": chunks,
        }  # fmt: skip
        out = self._memory(op.output)
        caches = [_Use(("BUFFER", i), False, None) for i in (c.key_cache_buffer, c.value_cache_buffer)]
        self._record(Kind.ATTEND, [_Use(q_memory, False, None), *caches, _Use(out, True, None), _Use(("parts", 0), True, None)], **fields)
        self._record(Kind.FOLD, [_Use(("parts", 0), False, None), _Use(out, True, ("heads", c.n_heads_0))], **fields)

    # --------------------------------------------------------------------------------------------------------------------------- experts
    def _softmax(self) -> None:
        op = self._op
        self._require(op.input == op.output, "softmax works in place")
        x = self._values(op.input)
        self._require(x.planes == 1, "softmax takes one plane")
        self._record(Kind.SOFTMAX, [_Use(self._memory(op.input), True, ("rows", 1))], x=x.address, x_row=x.row, n=x.width)

    def _moe_gate(self) -> None:
        op, c = self._op, self._op.config
        assert isinstance(c, MoeGateConfig)
        x, w = self._values(op.input), self._values(op.output)
        self._require(1 <= c.k <= x.width and (w.width, w.planes) == (1, c.k), f"{c.k} of {x.width} experts write {w.planes} planes of {w.width} weights")
        self._require(self.layout.node.buffers[c.indexes_buffer].size.x == c.k, f"{c.k} experts need as many indexes a row")
        deal = "rows", 1
        uses = [_Use(self._memory(op.input), False, deal), _Use(self._memory(op.output), True, deal), _Use(("BUFFER", c.indexes_buffer), True, deal)]
        indexes = self.layout.address("indexes", c.indexes_buffer)
        self._record(
            Kind.GATE, uses, x=x.address, x_row=x.row, n=x.width, k=c.k, normalise=c.norm_topk, indexes=indexes, weights=w.address, weights_row=w.row, weights_plane=w.plane
        )
