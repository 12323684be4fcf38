"""Graph ops to instructions: what each op takes and gives, checked against the sizes it names."""

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from dairllm.engine.area import Area, AreaError
from dairllm.engine.assembler import Assembler
from dairllm.engine.memory import Layout
from dairllm.engine.operands import Operands
from dairllm.engine.pieces import Piece, matmul_pieces
from dairllm.engine.rows import Rows
from dairllm.engine.step import Deal, Use, reads, writes
from dairllm.engine.tables import RopeTables
from dairllm.engine.weights import Weights
from dairllm.graph.types import (
    BLOCK_VALUES,
    AttentionConfig,
    FloatType,
    InvRmsConfig,
    MatmulConfig,
    MoeGateConfig,
    MulConfig,
    NoConfig,
    Op,
    OpCode,
    PointerSource,
    PointerType,
    RmsNormConfig,
    RopeConfig,
    RopeType,
    ScaleConfig,
    ShiftConfig,
    row_bytes,
)
from dairllm.kernels.instructions import ALWAYS_ROWS, Kind
from dairllm.kernels.panels import row_panel_bytes
from dairllm.kernels.sizes import CHUNK, attention_scratch_bytes, experts_scratch_bytes, tile_scratch_bytes

__all__ = ["Emitter"]

CLAIMED_BYTES = 2 << 20
"""Of weights that a row goes through: threads claim the outputs of such a matmul, a few at a time. Those of a smaller one are dealt:
waiting for the slowest costs less than a barrier, and ops on the same columns that are dealt alike do without."""

_CAST = {
    (FloatType.F32, FloatType.F32): Kind.COPY,
    (FloatType.F32, FloatType.Q80): Kind.TO_BLOCKS,
    (FloatType.Q80, FloatType.F32): Kind.FROM_BLOCKS,
}


class Emitter:
    """Compiles ops one after the other.

    Args:
        layout: allocated.
        weights: where the ops' weights are.
        tables: RoPE tables.
        scratch: what a thread works with; where it lies is no instruction's business.
        piece_bytes: matmuls whose weights take more of the file are computed in pieces; None: never.

    Attributes:
        assembler: the program so far.
        pieces: (instruction, piece) of each matmul.
        embeddings: (instruction, op) of each embedding.
        seq_len: positions that all ops have room for; None where none has a limit.
    """

    def __init__(self, layout: Layout, weights: Weights, tables: RopeTables, scratch: Area, piece_bytes: int | None = None) -> None:
        self.layout, self.weights, self.tables, self.scratch, self.piece_bytes = layout, weights, tables, scratch, piece_bytes
        self.assembler = Assembler()
        self.pieces: list[tuple[int, Piece]] = []
        self.embeddings: list[tuple[int, Op]] = []
        self.seq_len: int | None = None

    def emit(self, op: Op) -> None:
        """Append an op's instructions.

        Raises:
            GraphError: its sizes contradict each other, or it is one that we cannot compute.
        """
        operands = Operands(op, self.layout, self.weights)
        try:
            self._EMIT[op.code](self, operands)
        except AreaError as error:
            raise operands.error(str(error)) from None

    def _limit_positions(self, o: Operands, seq_len: int) -> None:
        o.require(seq_len >= 1, "it has room for no position")
        self.seq_len = seq_len if self.seq_len is None else min(self.seq_len, seq_len)

    # ---------------------------------------------------------------------------------------------------------- column by column
    def _map(self, kind: Kind, o: Operands, x: Rows | None = None, n_planes: int = 0, other: Use | None = None, **extra: int) -> None:
        if kind in (Kind.SILU, Kind.GELU):
            o.config(NoConfig)
        x = x or o.values(o.op.input)
        y = o.rows(o.op.output, FloatType.Q80 if kind == Kind.TO_BLOCKS else FloatType.F32)
        n, n_planes = x.width, n_planes or x.planes
        same = n == y.width and y.planes == n_planes
        o.require(same, f"{x.planes} planes of {n} values become {y.planes} of {y.width}")
        uses = [reads(o.input, ("columns", n)), writes(o.output, ("columns", n))] + ([other] if other else [])
        operands = x.plane_fields("x", n, n_planes) | y.plane_fields("y", n, n_planes)
        self.assembler.add(kind, uses, **operands, n=n, planes=n_planes, **extra)

    def _mul(self, o: Operands) -> None:
        index = o.config(MulConfig).multiplier_buffer
        m, x = o.buffer(index), o.values(o.op.input)
        same = (m.width, m.planes) == (x.width, x.planes)
        o.require(same, f"it multiplies {x.planes} planes of {x.width} values by {m.planes} of {m.width}")
        other = reads(("BUFFER", index), ("columns", x.width))
        self._map(Kind.MUL, o, x, other=other, **m.plane_fields("factor", x.width, x.planes))

    def _scale(self, o: Operands) -> None:
        index = o.config(ScaleConfig).scale_buffer
        s, x = o.buffer(index), o.values(o.op.input)
        o.require((s.width, s.planes) == (1, x.planes), f"it scales {x.planes} planes by {s.planes} of {s.width} values")
        self._map(Kind.SCALE, o, x, other=reads(("BUFFER", index)), **s.plane_fields("factor", 1, x.planes))

    def _cast(self, o: Operands) -> None:
        o.config(NoConfig)
        o.require(not o.is_packed(o.op.input), "packed activations cannot be cast")
        x = o.rows(o.op.input, FloatType.F32, FloatType.Q80)
        if o.is_packed(o.op.output):
            self._pack(o, x, repeat=False)
            return
        y = o.rows(o.op.output, FloatType.F32, FloatType.Q80)
        kind = _CAST.get((x.float_type, y.float_type))
        if kind is None:
            raise o.error(f"there is no cast from {x.float_type.name} to {y.float_type.name}")
        self._map(kind, o, x)

    def _repeat_z(self, o: Operands) -> None:
        o.config(NoConfig)
        x = o.values(o.op.input)
        o.require(x.planes == 1, f"it repeats one plane, not {x.planes}")
        if o.is_packed(o.op.output):
            o.require(o.is_repeated(o.op.output), "its output is written by other ops as well")
            self._pack(o, x, repeat=True)
        else:
            self._map(Kind.COPY, o, x, n_planes=o.values(o.op.output).planes)

    def _pack(self, o: Operands, x: Rows, repeat: bool) -> None:
        """Rows into panels. Repeated planes are one: all read the same panels."""
        y = o.packed(o.op.output)
        same = x.width == y.width and (repeat or x.planes == y.planes)
        o.require(same, f"{x.planes} planes of {x.width} values become {y.planes} of {y.width}")
        n, n_planes, deal = x.width, 1 if repeat else x.planes, ("columns", x.width)
        self.assembler.add(
            Kind.PACK if x.float_type == FloatType.F32 else Kind.PACK_BLOCKS,
            [reads(o.input, deal), writes(o.output, deal)],
            **x.plane_fields("x", n, n_planes),
            **y.panel_plane_fields("panels", n, n_planes),
            **y.tile_fields(n),
            n=n,
            planes=n_planes,
            flags=ALWAYS_ROWS if y.always_rows else 0,
        )

    def _merge_add(self, o: Operands) -> None:
        o.config(NoConfig)
        x, y = o.rows(o.op.input, FloatType.F32, FloatType.Q80), o.values(o.op.output)
        o.require(x.width % y.width == 0 and x.planes == y.planes == 1, f"{x.width} values do not divide into slices of {y.width}")
        whole = x.float_type == FloatType.F32 or y.width % BLOCK_VALUES == 0
        o.require(whole, f"slices of {y.width} values are not whole blocks")
        n, deal = y.width, ("columns", y.width)
        length, n_slices = row_bytes(x.float_type, n), x.width // n
        stride = x.slice_stride or length
        self.assembler.add(
            Kind.MERGE_ADD_F32 if x.float_type == FloatType.F32 else Kind.MERGE_ADD_BLOCKS,
            [reads(o.input, deal), writes(o.output, deal)],
            x=x.area.at(x.offset, length, (x.n_rows, x.row), (n_slices, stride)),
            x_row=x.row,
            x_slice=stride,
            n_slices=n_slices,
            **y.fields("y", n),
            n=n,
        )

    def _merge_sum(self, o: Operands) -> None:
        o.config(NoConfig)
        x, y = o.values(o.op.input), o.values(o.op.output)
        o.require(x.width == y.width and y.planes == 1, f"{x.planes} planes of {x.width} values become {y.planes} of {y.width}")
        n, deal = y.width, ("columns", y.width)
        uses = [reads(o.input, deal), writes(o.output, deal)]
        self.assembler.add(Kind.MERGE_SUM, uses, **x.plane_fields("x", n, x.planes), planes=x.planes, **y.fields("y", n), n=n)

    def _embedding(self, o: Operands) -> None:
        o.config(NoConfig)
        tokens, y, vocab = o.values(o.op.input), o.values(o.op.output), o.op.weight_size.y
        o.require(tokens.width == 1 and tokens.row == 4 and y.planes == 1, "it takes one token a row, from a pipe")
        o.require(vocab >= 1, "its table is empty")
        table = o.weight(FloatType.F32, 1, vocab, y.width).area.at(0, 4 * vocab * y.width)
        uses, fields = [reads(o.input), writes(o.output, ("columns", y.width))], y.fields("y", y.width)
        instruction = self.assembler.add(Kind.EMBED, uses, tokens=tokens.at(0, 1), table=table, vocab=vocab, n=y.width, **fields)
        self.embeddings.append((instruction, o.op))

    # --------------------------------------------------------------------------------------------------------------------- norms
    def _inv_rms(self, o: Operands) -> None:
        c = o.config(InvRmsConfig)
        x, y = o.values(o.op.input), o.values(o.op.output)
        fits = x.planes == y.planes == 1 and 1 <= c.n_columns <= y.width and x.width % c.n_columns == 0
        o.require(fits, f"{x.width} values have no {c.n_columns} equal parts, or {y.width} places for them")
        self.assembler.add(
            Kind.INV_RMS,
            [reads(o.input), writes(o.output, ("rows", c.n_columns))],
            **x.fields("x", x.width),
            **y.fields("y", c.n_columns),
            n_columns=c.n_columns,
            width=x.width // c.n_columns,
            epsilon_bits=int(np.float32(c.epsilon).view(np.int32)),
        )

    def _rms_norm(self, o: Operands) -> None:
        c = o.config(RmsNormConfig)
        x, y, inverse = o.values(o.op.input), o.values(o.op.output), o.buffer(c.inv_rms_buffer)
        o.require(x.width == y.width and x.planes == y.planes == inverse.planes == 1, f"{x.width} values become {y.width}")
        o.require(1 <= c.n_columns <= inverse.width and x.width % c.n_columns == 0, f"{x.width} values have no {c.n_columns} equal parts")
        n, width, deal = x.width, x.width // c.n_columns, ("columns", x.width)
        weights = o.weight(FloatType.F32, 1, 1, width).area.at(0, 4 * width)
        uses = [reads(o.input, deal), reads(("BUFFER", c.inv_rms_buffer)), writes(o.output, deal)]
        fields = x.fields("x", n) | inverse.fields("inverse", c.n_columns) | y.fields("y", n)
        self.assembler.add(Kind.RMS_NORM, uses, **fields, weights=weights, n_columns=c.n_columns, width=width)

    # ------------------------------------------------------------------------------------------------------------------- matmuls
    def _matmul(self, o: Operands) -> None:
        c, size = o.config(MatmulConfig), o.op.weight_size
        y, experts = o.values(o.op.output), c.n_experts
        k = c.n_active_experts if experts else 1
        quantized = size.float_type in (FloatType.Q40, FloatType.Q80)
        o.require(quantized or size.float_type == FloatType.F32, f"there are no kernels for weights of type {size.float_type.name}")
        o.require(size.x == y.width, f"its weight has {size.x} outputs, its output {y.width} values")
        o.require(y.planes == k and (not experts or 1 <= k <= experts), f"{k} of {experts} experts write {y.planes} planes")
        w, length = o.weight(size.float_type, max(experts, 1), size.y, size.x), row_bytes(size.float_type, size.y)
        pieces = matmul_pieces(o.op, w, self.piece_bytes)
        claimed = k * size.x * length >= CLAIMED_BYTES
        # threads share out each piece anew: otherwise than the ops around them
        uses = [reads(o.input), writes(o.output, ("columns", y.width) if len(pieces) == 1 and not claimed else None)]
        fields = {"weights_row": w.row, "y_row": y.row, "claimed": int(claimed)}
        if experts:
            uses.append(reads(("BUFFER", c.expert_indexes_buffer)))
            indexes = o.expert_indexes(c.expert_indexes_buffer, k)
            fields |= {"weights_expert": w.expert, "y_plane": y.plane, "indexes": indexes, "k": k, "n_experts": experts}

        def add(kind: Kind, scratch: int, **operand: int) -> None:
            self.scratch.at(0, scratch)
            for piece in pieces:
                rows = piece.first, piece.count
                place = {"weights": w.at(*rows, length, max(experts, 1)), "y": y.at(*rows, k), "d": piece.count}
                self.pieces.append((self.assembler.add(kind, uses, **operand, **place, **fields), piece))

        if not quantized:
            x = o.values(o.op.input)
            same = (x.width, x.planes) == (size.y, k)
            o.require(same, f"its weight has {size.y} inputs, its input {x.planes} planes of {x.width} values")
            if experts:
                operand = {"x": x.at(0, size.y, k), "x_row": x.row, "x_plane": x.plane}
                add(Kind.EXPERTS_F32, experts_scratch_bytes(4 * size.y), **operand, n=size.y)
            else:
                add(Kind.MATMUL_F32, 0, **x.fields("x", size.y), n=size.y)
            return
        o.require(o.is_packed(o.op.input), f"{size.float_type.name} weights take Q80 activations from a buffer that only matmuls read")
        p, blocks = o.packed(o.op.input), size.y // BLOCK_VALUES
        o.require((p.width, p.planes) == (size.y, k), f"its weight has {size.y} inputs, its input {p.planes} planes of {p.width} values")
        q80 = size.float_type == FloatType.Q80
        if experts:
            operand = p.panel_plane_fields("x", size.y, k, repeated=o.is_repeated(o.op.input))
            kind, scratch = Kind.EXPERTS_Q80 if q80 else Kind.EXPERTS_Q40, experts_scratch_bytes(row_panel_bytes(blocks))
            add(kind, scratch, **operand, n=blocks)
        else:
            operand = p.panel_fields("panels", size.y) | p.tile_fields(size.y)
            add(Kind.MATMUL_Q80 if q80 else Kind.MATMUL_Q40, tile_scratch_bytes(blocks), **operand, n_blocks=blocks)

    # ----------------------------------------------------------------------------------------------------------------- attention
    def _rope(self, o: Operands) -> None:
        c = o.config(RopeConfig)
        o.require(o.op.input == o.op.output, "rope works in place")
        x = o.values(o.op.input)
        heads = c.head_dim >= 2 and c.head_dim % 2 == 0 and x.width % c.head_dim == 0 and x.planes == 1
        o.require(heads, f"{x.width} values are not whole heads of {c.head_dim}")
        halves = c.type == RopeType.FALCON
        begin = 0 if halves else c.q_dim_start if c.is_q else c.kv_dim_start  # FALCON leaves them uninitialised
        o.require(begin % c.head_dim == 0, f"its slice begins inside a head of {c.head_dim}")
        table = self.tables.area(c)
        self._limit_positions(o, table.nbytes // (4 * c.head_dim))
        deal: Deal = ("heads", x.width // c.head_dim) if halves else ("columns", x.width)
        self.assembler.add(
            Kind.ROPE_HALVES if halves else Kind.ROPE_NEIGHBOURS,
            [writes(o.input, deal)],
            **x.fields("x", x.width),
            n=x.width,
            head_dim=c.head_dim,
            table=table.at(0, table.nbytes),
            positions=o.positions(c.position_pipe),
        )

    def _shift(self, o: Operands) -> None:
        c, out = o.config(ShiftConfig), o.op.output
        x = o.values(o.op.input)
        o.require(out.source == PointerSource.BUFFER and out.type == PointerType.RAW, "it writes into a cache, by a raw pointer")
        cache = o.cache(out.index)
        o.require(x.width == cache.width and x.planes == 1, f"rows of {x.width} values go into a cache of {cache.width}")
        self._limit_positions(o, cache.positions)
        deal = "columns", x.width
        self.assembler.add(
            Kind.SHIFT,
            [reads(o.input, deal), writes(o.output, deal)],
            **x.fields("x", x.width),
            n=x.width,
            head_dim=cache.head_dim,
            cache=cache.at(x.width // cache.head_dim, cache.positions),
            head_stride=cache.head_stride,
            positions=o.positions(c.position_pipe),
            cache_type=cache.float_type,
        )

    def _attention(self, o: Operands) -> None:
        c = o.config(AttentionConfig)
        q, y = o.buffer(c.query_buffer), o.values(o.op.output)
        keys, values = o.cache(c.key_cache_buffer), o.cache(c.value_cache_buffer)
        same = (keys.width, keys.positions) == (values.width, values.positions)
        o.require(same, f"its caches have {keys.positions} positions of {keys.width} and {values.positions} of {values.width} values")
        shared = 1 <= c.n_kv_heads <= c.n_heads and c.n_heads % c.n_kv_heads == 0
        o.require(shared, f"{c.n_heads} heads do not share {c.n_kv_heads} KV heads evenly")
        n, width = c.n_heads_0, c.n_heads_0 * c.head_dim
        o.require(n >= 1 and q.width == y.width == width, f"{n} heads of {c.head_dim} are not {q.width} and {y.width} values")
        o.require(q.planes == y.planes == 1, "it takes one plane")
        group = c.n_heads // c.n_kv_heads
        n_kv = -(-n // group)
        o.require(n_kv * c.head_dim <= keys.width, f"{n} heads need {n_kv} KV heads, its caches have {keys.width // c.head_dim}")
        self._limit_positions(o, keys.positions)
        group, chunks = min(group, n), -(-keys.positions // CHUNK)
        heads = n_kv * chunks * group
        self.scratch.at(0, attention_scratch_bytes(group, c.head_dim, chunks))
        fields = {
            **q.fields("q", width),
            **y.fields("y", width),
            "n_heads": n,
            "group": group,
            "head_dim": c.head_dim,
            "keys": keys.at(n_kv, chunks * CHUNK),
            "values": values.at(n_kv, chunks * CHUNK),
            "head_stride": keys.head_stride,
            "positions": o.positions(c.position_pipe),
            "parts": o.between("parts", 4 * heads * c.head_dim),
            "stats": o.between("stats", 8 * heads),
            "max_chunks": chunks,
            "cache_type": keys.float_type,
        }
        taken = [reads(("BUFFER", i)) for i in (c.query_buffer, c.key_cache_buffer, c.value_cache_buffer)]
        parts = "parts", 0
        self.assembler.add(Kind.ATTEND, [*taken, writes(o.output), writes(parts)], **fields)
        self.assembler.add(Kind.FOLD, [reads(parts), writes(o.output, ("heads", n))], **fields)

    # ------------------------------------------------------------------------------------------------------------------- experts
    def _softmax(self, o: Operands) -> None:
        o.config(NoConfig)
        o.require(o.op.input == o.op.output, "softmax works in place")
        x = o.values(o.op.input)
        o.require(x.planes == 1, "softmax takes one plane")
        self.assembler.add(Kind.SOFTMAX, [writes(o.input, ("rows", 1))], **x.fields("x", x.width), n=x.width)

    def _moe_gate(self, o: Operands) -> None:
        c = o.config(MoeGateConfig)
        x, w = o.values(o.op.input), o.values(o.op.output)
        fits = 1 <= c.k <= x.width and x.planes == 1 and (w.width, w.planes) == (1, c.k)
        o.require(fits, f"{c.k} of {x.width} experts write {w.planes} planes of {w.width} weights")
        deal = "rows", 1
        self.assembler.add(
            Kind.GATE,
            [reads(o.input, deal), writes(o.output, deal), writes(("BUFFER", c.indexes_buffer), deal)],
            **x.fields("x", x.width),
            n=x.width,
            k=c.k,
            normalise=c.norm_topk,
            indexes=o.expert_indexes(c.indexes_buffer, c.k),
            **w.plane_fields("weights", 1, c.k),
        )

    # functions and not bound methods: those would tie the emitter, and all memory that it knows, into a cycle
    _EMIT: ClassVar[dict[OpCode, Callable[["Emitter", Operands], None]]] = {
        OpCode.MERGE_ADD: _merge_add,
        OpCode.MERGE_SUM: _merge_sum,
        OpCode.EMBEDDING: _embedding,
        OpCode.INV_RMS: _inv_rms,
        OpCode.RMS_NORM: _rms_norm,
        OpCode.MATMUL: _matmul,
        OpCode.ROPE: _rope,
        OpCode.MULTIHEAD_ATT: _attention,
        OpCode.GELU: lambda self, o: self._map(Kind.GELU, o),
        OpCode.SILU: lambda self, o: self._map(Kind.SILU, o),
        OpCode.MUL: _mul,
        OpCode.SCALE: _scale,
        OpCode.CAST: _cast,
        OpCode.REPEAT_Z: _repeat_z,
        OpCode.SHIFT: _shift,
        OpCode.SOFTMAX: _softmax,
        OpCode.MOE_GATE: _moe_gate,
    }
