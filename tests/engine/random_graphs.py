"""Graphs of any shape: ops on pipes and buffers that nearly always fit each other, of widths that divide and widths that do not.

What a model's graph never has is here on purpose: slices into slices, planes, batches up to 64, a node of several, pipes that nobody syncs.
"""

import dataclasses
from enum import IntEnum
from random import Random
from typing import Any, NamedTuple

from dairllm.graph.types import (
    AttentionConfig,
    Buffer,
    FloatType,
    InvRmsConfig,
    MatmulConfig,
    MoeGateConfig,
    MulConfig,
    NetworkConfig,
    NoConfig,
    NodeConfig,
    Op,
    OpCode,
    OpConfig,
    Pipe,
    Pointer,
    PointerSource,
    PointerType,
    RmsNormConfig,
    RopeConfig,
    RopeType,
    ScaleConfig,
    Segment,
    ShiftConfig,
    Size,
    Sync,
    SyncType,
)

__all__ = ["RandomGraph", "mutated", "random_graph"]

BATCHES = (1, 2, 3, 4, 7, 8, 13, 16, 17, 31, 32, 33, 45, 48, 64)
F32, Q40, Q80 = FloatType.F32, FloatType.Q40, FloatType.Q80


class RandomGraph(NamedTuple):
    network: NetworkConfig
    node: NodeConfig
    kv_cache: FloatType


def random_graph(seed: int) -> RandomGraph:
    """The same of one seed wherever it is asked for."""
    rng = Random(seed)  # noqa: S311 - not for secrets
    builder = _Builder(rng)
    for _ in range(rng.randint(1, 6)):
        builder.add()
    network, node = builder.network(), builder.node()
    if rng.random() < 0.15:
        node = mutated(node, rng)
    return RandomGraph(network, node, rng.choice((F32, F32, FloatType.F16, Q80)))


def mutated(value: Any, rng: Random) -> Any:
    """The same value with one number somewhere in it changed."""
    if isinstance(value, IntEnum):
        return rng.choice(list(type(value)))
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        near = [value + 1, value - 1, value * 2, value // 2, value + 32, value - 32, value * 8]
        return max(0, rng.choice([*near, 0, 1, 2, 3, 8, 31, 64, 1 << 16, 2**31 - 1, 2**32 - 1]))
    if isinstance(value, float):
        return rng.choice([0.0, 1.0, -1.0, 1e-30, 1e30, value * 2])
    if isinstance(value, tuple):
        if not value:
            return value
        at = rng.randrange(len(value))
        change = rng.random()
        if change < 0.05:
            return value[:at] + value[at + 1 :]
        if change < 0.1:
            return (*value[:at], rng.choice(value), *value[at:])
        return (*value[:at], mutated(value[at], rng), *value[at + 1 :])
    if not dataclasses.fields(value):
        return value
    field = rng.choice(dataclasses.fields(value))
    return dataclasses.replace(value, **{field.name: mutated(getattr(value, field.name), rng)})


class _Builder:
    """A graph as it grows: each op finds operands that fit it among what is there, or makes new ones."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._n_nodes = rng.choice((1, 2, 2, 3, 4))
        self._batches = rng.choice(BATCHES)
        self._pipes = [Size(F32, 1, self._batches, 1), Size(F32, 1, self._batches, 1)]
        self._buffers: list[Size] = []
        self._segments: list[list[Op]] = [[]]
        self._ops = (
            *(self._map, self._mul, self._scale, self._cast, self._cast_and_matmul, self._matmul_f32, self._merge_add, self._merge_add),
            *(self._merge_sum, self._embedding, self._inv_rms, self._rms_norm, self._rope, self._attention, self._softmax, self._experts),
            *(self._repeat_z, self._norm_and_pack, self._gated),
        )

    def add(self) -> None:
        """One op, or some that belong together."""
        if self._rng.random() < 0.3:
            self._segments.append([])
        self._rng.choice(self._ops)()

    def network(self) -> NetworkConfig:
        pipes = tuple(Pipe(f"P{i}", size) for i, size in enumerate(self._pipes))
        return NetworkConfig(self._batches, self._n_nodes, pipes, ())

    def node(self) -> NodeConfig:
        rng = self._rng
        syncs: list[list[Sync]] = [[] for _ in self._segments]
        for pipe in range(2, len(self._pipes)):
            if rng.random() < 0.7:  # those that move slices alone may be kept by slices
                types = (SyncType.NODE_SLICES, SyncType.NODE_SLICES, SyncType.NODE_SLICES_EXCEPT_ROOT, SyncType.WITH_ROOT)
                rng.choice(syncs).append(Sync(pipe, rng.choice(types)))
        segments = tuple(Segment(tuple(ops), tuple(own)) for ops, own in zip(self._segments, syncs, strict=True))
        buffers = tuple(Buffer(f"b{i}", size) for i, size in enumerate(self._buffers))
        return NodeConfig(rng.randrange(self._n_nodes), buffers, segments)

    # ---------------------------------------------------------------------------------------------------------------- what ops are made of
    def _width(self, blocks: bool = False) -> int:
        rng = self._rng
        if blocks or rng.random() < 0.5:
            return 32 * rng.choice((1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 24))
        return rng.randint(1, 130)

    def _op(self, code: OpCode, x: Pointer, y: Pointer, config: OpConfig, weight: Size | None = None) -> None:
        count = sum(map(len, self._segments))
        self._segments[-1].append(Op(code, f"op{count}", count % 3, x, y, weight or Size.none(), config))

    def _buffer(self, width: int, float_type: FloatType = F32, planes: int = 1, *, new: bool = False) -> Pointer:
        """Whole rows of a buffer."""
        size = Size(float_type, planes, self._batches, width)
        same = [i for i, other in enumerate(self._buffers) if other == size]
        if new or not same or self._rng.random() < 0.5:
            self._buffers.append(size)
            same = [len(self._buffers) - 1]
        return Pointer(PointerSource.BUFFER, self._rng.choice(same), PointerType.BATCH)

    def _rows(self, width: int, float_type: FloatType = F32, planes: int = 1) -> Pointer:
        """Rows of a pipe or a buffer, or slices of rows."""
        rng = self._rng
        if rng.random() < 0.03:
            width += rng.choice((-1, 1, 32))
        if planes > 1 or rng.random() < 0.5:
            pointer = self._buffer(width if planes > 1 or rng.random() < 0.8 else width * self._n_nodes, float_type, planes)
            return dataclasses.replace(pointer, type=self._type(self._buffers[pointer.index].x, width))
        return self._pipe(width * rng.choice((1, self._n_nodes)), float_type, width)

    def _pipe(self, size: int, float_type: FloatType, width: int) -> Pointer:
        wanted = Size(float_type, 1, self._batches, size)
        same = [i for i, other in enumerate(self._pipes) if other == wanted and i > 1]
        if not same or self._rng.random() < 0.4:
            self._pipes.append(wanted)
            same = [len(self._pipes) - 1]
        return Pointer(PointerSource.PIPE, self._rng.choice(same), self._type(size, width))

    def _type(self, size: int, width: int) -> PointerType:
        if self._rng.random() < 0.03:
            return self._rng.choice((PointerType.BATCH, PointerType.BATCHED_SLICE))
        return PointerType.BATCH if size == width else PointerType.BATCHED_SLICE

    def _planes(self) -> int:
        return self._rng.choice((1, 1, 1, 2, 3))

    # ----------------------------------------------------------------------------------------------------------------------------- ops
    def _map(self) -> None:
        width, planes = self._width(), self._planes()
        x = self._rows(width, F32, planes)
        y = x if self._rng.random() < 0.5 else self._rows(width, F32, planes)
        self._op(self._rng.choice((OpCode.SILU, OpCode.GELU, OpCode.CAST)), x, y, NoConfig())

    def _mul(self) -> None:
        width, planes = self._width(), self._planes()
        x, m = self._rows(width, F32, planes), self._buffer(width, F32, planes)
        self._op(OpCode.MUL, x, self._rows(width, F32, planes), MulConfig(m.index))

    def _scale(self) -> None:
        width, planes = self._width(), self._planes()
        x, s = self._rows(width, F32, planes), self._buffer(1, F32, planes)
        self._op(OpCode.SCALE, x, self._rows(width, F32, planes), ScaleConfig(s.index))

    def _cast(self) -> None:
        width, planes = self._width(blocks=True), self._planes()
        types = [F32, Q80]
        self._rng.shuffle(types)
        x, y = (self._rows(width, float_type, planes) for float_type in types)
        self._op(OpCode.CAST, x, y, NoConfig())

    def _matmul(self, x: Pointer, inputs: int, weights: FloatType) -> None:
        outputs = self._rng.choice((self._rng.randint(1, 90), 8 * self._rng.randint(1, 20)))
        size = Size(weights, 1, inputs, outputs)
        self._op(OpCode.MATMUL, x, self._rows(outputs), MatmulConfig(0, 0, 0), size)

    def _cast_and_matmul(self) -> None:
        width = self._width(blocks=True)
        packed = self._buffer(width, Q80)
        self._op(OpCode.CAST, self._rows(width, self._rng.choice((F32, Q80))), packed, NoConfig())
        for _ in range(self._rng.randint(1, 2)):
            self._matmul(packed, width, self._rng.choice((Q40, Q80)))

    def _matmul_f32(self) -> None:
        width = self._width()
        self._matmul(self._rows(width), width, F32)

    def _merge_add(self) -> None:
        rng, float_type = self._rng, self._rng.choice((F32, Q80))
        width, parts = self._width(blocks=float_type == Q80), self._rng.choice((1, 2, 3, 4, self._n_nodes, self._n_nodes))
        x = self._pipe(width * parts, float_type, width * parts) if rng.random() < 0.8 else self._rows(width * parts, float_type)
        if rng.random() < 0.5 and x.source == PointerSource.PIPE:  # what writes it
            part = self._pipes[x.index].x // self._n_nodes
            if part and (float_type == F32 or part % 32 == 0):
                self._op(OpCode.CAST, self._rows(part), dataclasses.replace(x, type=PointerType.BATCHED_SLICE), NoConfig())
        self._op(OpCode.MERGE_ADD, x, self._rows(width), NoConfig())

    def _merge_sum(self) -> None:
        width = self._width()
        self._op(OpCode.MERGE_SUM, self._rows(width, F32, self._rng.randint(1, 4)), self._rows(width), NoConfig())

    def _embedding(self) -> None:
        width = self._width()
        tokens = Pointer(PointerSource.PIPE, self._rng.randint(0, 1), PointerType.BATCH)
        self._op(OpCode.EMBEDDING, tokens, self._rows(width), NoConfig(), Size(F32, 1, self._rng.randint(1, 40), width))

    def _inv_rms(self) -> None:
        columns, width = self._rng.choice((1, 1, 2, 5)), self._width()
        inverse = self._rows(self._rng.choice((columns, columns + 2)))
        self._op(OpCode.INV_RMS, self._rows(columns * width), inverse, InvRmsConfig(self._rng.choice((0.0, 1e-5)), columns))

    def _rms_norm(self) -> None:
        columns, width = self._rng.choice((1, 1, 2, 5)), self._width()
        inverse = self._buffer(columns)
        x, y = self._rows(columns * width), self._rows(columns * width)
        self._op(OpCode.RMS_NORM, x, y, RmsNormConfig(inverse.index, columns), Size(F32, 1, 1, width))

    def _norm_and_pack(self) -> None:
        width = self._width(blocks=True)
        inverse, y, packed = self._buffer(1), self._buffer(width), self._buffer(width, Q80)
        self._op(OpCode.RMS_NORM, self._rows(width), y, RmsNormConfig(inverse.index, 1), Size(F32, 1, 1, width))
        self._op(OpCode.CAST, y, packed, NoConfig())
        self._matmul(packed, width, Q40)

    def _gated(self) -> None:
        width, planes = self._width(blocks=True), self._planes()
        x, m, packed = self._buffer(width, F32, planes), self._buffer(width, F32, planes, new=True), self._buffer(width, Q80, planes)
        self._op(self._rng.choice((OpCode.SILU, OpCode.GELU)), x, x, NoConfig())
        self._op(OpCode.MUL, x, x, MulConfig(m.index))
        self._op(OpCode.CAST, x, packed, NoConfig())

    def _rope(self, x: Pointer | None = None, head_dim: int = 0, positions: int = 0) -> None:
        rng = self._rng
        head_dim = head_dim or 2 * rng.randint(1, 40)
        x = x or self._rows(head_dim * rng.randint(1, 4))
        rope_type, positions = rng.choice(list(RopeType)), positions or rng.choice((self._batches, rng.randint(1, 200)))
        start = head_dim * rng.randint(0, 2)
        sizes = (0, start, start, 0, 0, 0, start, 0, positions, head_dim, 1)
        config = RopeConfig(rope_type, rng.randint(0, 1), 0, 0, 1.0, 0.0, 0.0, 0, *sizes, 1e4, Size.none())
        self._op(OpCode.ROPE, x, x, config)

    def _attention(self) -> None:
        rng = self._rng
        head_dim, heads, group = 8 * rng.choice((1, 2, 3, 4, 4, 8, 12)), rng.randint(1, 5), rng.choice((1, 1, 2, 3, 4))
        n_heads = rng.randint(max(1, group * (heads - 1)), group * heads)  # a node's last KV head may have fewer query heads
        positions = rng.choice((self._batches, 64, 65, 128, rng.randint(1, 300)))
        q, y = self._buffer(n_heads * head_dim), self._rows(n_heads * head_dim)
        caches = []
        for _ in range(2):
            self._buffers.append(Size(F32, 1, positions, heads * head_dim))
            caches.append(len(self._buffers) - 1)
            if rng.random() < 0.9:
                cache = Pointer(PointerSource.BUFFER, caches[-1], PointerType.RAW)
                self._op(OpCode.SHIFT, self._rows(heads * head_dim), cache, ShiftConfig(0))
        if rng.random() < 0.3:
            self._rope(q, head_dim, positions)
        att = self._buffer(1)
        dims = (positions, n_heads * head_dim, heads * head_dim, 0, q.index, *caches, att.index)
        config = AttentionConfig(group * heads * rng.randint(1, 2), n_heads, heads * rng.randint(1, 2), head_dim, *dims)
        self._op(OpCode.MULTIHEAD_ATT, q, y, config)
        if rng.random() < 0.1:  # another view of the same caches
            self._op(OpCode.MULTIHEAD_ATT, q, y, dataclasses.replace(config, head_dim=rng.choice((8, 16, head_dim))))

    def _softmax(self) -> None:
        x = self._rows(self._width())
        self._op(OpCode.SOFTMAX, x, x, NoConfig())

    def _repeat_z(self) -> None:
        float_type = self._rng.choice((F32, Q80))
        width = self._width(blocks=float_type == Q80)
        y = self._buffer(width, float_type, self._rng.randint(1, 3), new=float_type == Q80)
        self._op(OpCode.REPEAT_Z, self._rows(width), y, NoConfig())

    def _experts(self) -> None:
        rng = self._rng
        experts, weights = rng.choice((1, 1, 2, 3, 8)), rng.choice((F32, Q40, Q80))
        active, width, outputs = rng.randint(1, experts), self._width(blocks=True), rng.randint(1, 140)
        scores, chosen = self._rows(experts), self._buffer(1, F32, active)
        self._buffers.append(Size(F32, 1, self._batches, active))
        indexes = len(self._buffers) - 1
        if rng.random() < 0.9:
            self._op(OpCode.MOE_GATE, scores, chosen, MoeGateConfig(active, rng.randint(0, 1), indexes))
        x = self._buffer(width, F32 if weights == F32 else Q80, active, new=True)
        code, planes = (OpCode.REPEAT_Z, 1) if rng.random() < 0.6 else (OpCode.CAST, active)
        self._op(code, self._rows(width, F32, planes), x, NoConfig())
        config, size = MatmulConfig(experts, active, indexes), Size(weights, experts, width, outputs)
        y = self._rows(outputs, F32, active)
        self._op(OpCode.MATMUL, x, y, config, size)
        if rng.random() < 0.7:
            self._op(OpCode.SCALE, y, y, ScaleConfig(chosen.index))
