"""A whole graph, op by op, in numpy: what a node, or a cluster of nodes in lockstep, computes of any configuration.

It knows nothing of how the engine lays out memory or deals ops to threads: pipes and buffers are arrays of the sizes that the
configuration names, ops are calls of dairllm.kernels.reference (any order of sums) or of tests.kernels.exact (the defined order, to the
bit), and syncs copy rows between nodes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from dairllm.engine.rope import rope_table
from dairllm.formats.model_file import ModelFile, node_slice
from dairllm.graph.types import (
    AttentionConfig,
    FloatType,
    InvRmsConfig,
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
    RopeConfig,
    ScaleConfig,
    ShiftConfig,
    Size,
    Sync,
    SyncType,
    row_bytes,
)
from dairllm.kernels import reference

__all__ = ["POSITION_PIPE", "TOKEN_PIPE", "OracleCluster", "OracleNode", "Weights", "file_weights"]

Array = npt.NDArray[Any]
Weights = Callable[[int, Op], Array]
"""(node number, op) -> the op's weight as that node holds it: [outputs, row], of experts [experts, outputs, row], of an embedding
[vocab, row], of a norm [width]; rows are float32 values or uint8 blocks."""

POSITION_PIPE, TOKEN_PIPE = 0, 1


def file_weights(model: ModelFile, n_nodes: int) -> Weights:
    """Equal shares of a model file's tensors."""

    def piece(node: int, op: Op, expert: int) -> Array:
        tensor = model.tensor(op.name, op.index, expert)
        part = node_slice(tensor, model.spec, node, n_nodes)
        rows = [model.raw[part.offset + r * part.stride :][: part.slice_row_bytes] for r in range(part.n_rows)]
        raw = np.stack(rows)
        raw = raw.view("<f4").astype(np.float32) if tensor.float_type == FloatType.F32 else raw
        return raw if len(tensor.shape) == 2 else raw[0]

    def weights(node: int, op: Op) -> Array:
        experts = op.weight_size.z if op.code == OpCode.MATMUL and isinstance(op.config, MatmulConfig) and op.config.n_experts else 0
        return np.stack([piece(node, op, e) for e in range(experts)]) if experts else piece(node, op, 0)

    return weights


def _allocate(size: Size) -> Array:
    """[z, y, values] float32 or float16, or [z, y, bytes] uint8 of blocks."""
    if size.float_type in (FloatType.F32, FloatType.F16):
        return np.zeros((size.z, size.y, size.x), np.float32 if size.float_type == FloatType.F32 else np.float16)
    return np.zeros((size.z, size.y, row_bytes(size.float_type, size.x)), np.uint8)


class OracleNode:
    """One node's pipes, buffers and ops."""

    def __init__(
        self, network: NetworkConfig, node: NodeConfig, weights: Weights, arithmetic: ModuleType, kv_cache: FloatType = FloatType.F32
    ) -> None:
        self.network, self.node, self.arithmetic, self.kv_cache = network, node, arithmetic, kv_cache
        self.pipes = [_allocate(pipe.size) for pipe in network.pipes]
        caches = {
            index
            for segment in node.segments
            for op in segment.ops
            if isinstance(op.config, AttentionConfig)
            for index in (op.config.key_cache_buffer, op.config.value_cache_buffer)
        }
        self.buffers = [
            _allocate(dataclasses.replace(buffer.size, float_type=kv_cache) if i in caches else buffer.size)
            for i, buffer in enumerate(node.buffers)
        ]
        self._get_weight, self._weights = weights, dict[tuple[str, int], Array]()
        self._tables: dict[RopeConfig, Array] = {}
        self._ops: Mapping[OpCode, Callable[[Op, int], None]] = {
            OpCode.MERGE_ADD: self._merge_add,
            OpCode.MERGE_SUM: self._merge_sum,
            OpCode.EMBEDDING: self._embedding,
            OpCode.INV_RMS: self._inv_rms,
            OpCode.RMS_NORM: self._rms_norm,
            OpCode.MATMUL: self._matmul,
            OpCode.ROPE: self._rope,
            OpCode.MULTIHEAD_ATT: self._attention,
            OpCode.GELU: self._gelu,
            OpCode.SILU: self._silu,
            OpCode.MUL: self._mul,
            OpCode.SCALE: self._scale,
            OpCode.CAST: self._cast,
            OpCode.REPEAT_Z: self._repeat_z,
            OpCode.SHIFT: self._shift,
            OpCode.SOFTMAX: self._softmax,
            OpCode.MOE_GATE: self._moe_gate,
        }

    def run(self, segment: int, rows: int) -> None:
        """All ops of a segment, for rows 0..rows - 1 of the batch."""
        for op in self.node.segments[segment].ops:
            self._ops[op.code](op, rows)

    # ---------------------------------------------------------------------------------------------------------------------- operands
    def _place(self, pointer: Pointer) -> tuple[Array, Size]:
        if pointer.source == PointerSource.PIPE:
            return self.pipes[pointer.index], self.network.pipes[pointer.index].size
        return self.buffers[pointer.index], self.node.buffers[pointer.index].size

    def _rows(self, pointer: Pointer, rows: int) -> tuple[Array, FloatType]:
        """A writable view [planes, rows, values or bytes]; a batched slice is this node's part of each row."""
        array, size = self._place(pointer)
        assert pointer.type != PointerType.RAW
        if pointer.type == PointerType.BATCHED_SLICE:
            width = array.shape[2] // self.network.n_nodes
            assert width * self.network.n_nodes == array.shape[2]
            array = array[:, :, self.node.node * width : (self.node.node + 1) * width]
        return array[:, :rows], size.float_type

    def _values(self, pointer: Pointer, rows: int) -> Array:
        array, float_type = self._rows(pointer, rows)
        assert float_type == FloatType.F32
        return array

    def _write(self, pointer: Pointer, rows: int, values: Array) -> None:
        array, _ = self._rows(pointer, rows)
        assert array.shape == values.shape
        assert array.dtype == values.dtype
        array[...] = values

    def _weight(self, op: Op) -> Array:
        key = op.name, op.index
        if key not in self._weights:
            self._weights[key] = self._get_weight(self.node.node, op)
        return self._weights[key]

    def _positions(self, pipe: int, rows: int) -> Array:
        return self.pipes[pipe][0, :rows, 0].astype(np.int64)

    def _table(self, config: RopeConfig, positions: Array) -> Array:
        if config not in self._tables:
            self._tables[config] = rope_table(config)
        return self._tables[config][positions]

    # --------------------------------------------------------------------------------------------------------------------------- ops
    def _merge_add(self, op: Op, rows: int) -> None:
        x, x_type = self._rows(op.input, rows)
        self._write(op.output, rows, self.arithmetic.merge_add(self._values(op.output, rows), x, x_type))

    def _merge_sum(self, op: Op, rows: int) -> None:
        self._write(op.output, rows, self.arithmetic.merge_sum(self._values(op.input, rows))[None])

    def _embedding(self, op: Op, rows: int) -> None:
        tokens = self._values(op.input, rows)[0, :, 0].astype(np.int64)
        _, target = self._rows(op.output, rows)
        row = self.arithmetic.embedding(self._weight(op), tokens)
        self._write(op.output, rows, self.arithmetic.cast(row, FloatType.F32, target)[None])

    def _inv_rms(self, op: Op, rows: int) -> None:
        assert isinstance(op.config, InvRmsConfig)
        out = self._values(op.output, rows)
        out[..., : op.config.n_columns] = self.arithmetic.inv_rms(self._values(op.input, rows), op.config.epsilon, op.config.n_columns)

    def _rms_norm(self, op: Op, rows: int) -> None:
        assert isinstance(op.config, RmsNormConfig)
        inverse = self.buffers[op.config.inv_rms_buffer][:, :rows, : op.config.n_columns]
        self._write(op.output, rows, self.arithmetic.rms_norm(self._values(op.input, rows), inverse, self._weight(op)))

    def _matmul(self, op: Op, rows: int) -> None:
        assert isinstance(op.config, MatmulConfig)
        x, x_type = self._rows(op.input, rows)
        weight, weight_type = self._weight(op), op.weight_size.float_type
        if op.config.n_experts:
            active = self.buffers[op.config.expert_indexes_buffer][0, :rows].astype(np.int64)
            out = self.arithmetic.expert_matmul(weight, weight_type, x, x_type, active)
        else:
            out = self.arithmetic.matmul(weight, weight_type, x, x_type)
        self._write(op.output, rows, out)

    def _rope(self, op: Op, rows: int) -> None:
        assert isinstance(op.config, RopeConfig)
        assert op.input == op.output
        table = self._table(op.config, self._positions(op.config.position_pipe, rows))
        self._write(op.output, rows, self.arithmetic.rope(self._values(op.input, rows)[0], table, op.config.type)[None])

    def _shift(self, op: Op, rows: int) -> None:
        assert isinstance(op.config, ShiftConfig)
        assert op.output.type == PointerType.RAW
        x = self._values(op.input, rows)[0]
        cache, _ = self._place(op.output)
        self.arithmetic.shift(cache[0], x, self._positions(op.config.position_pipe, rows), self.kv_cache)

    def _attention(self, op: Op, rows: int) -> None:
        c = op.config
        assert isinstance(c, AttentionConfig)
        keys, values = (self.buffers[i][0] for i in (c.key_cache_buffer, c.value_cache_buffer))
        query = self.buffers[c.query_buffer][0, :rows]
        positions = self._positions(c.position_pipe, rows)
        out = self.arithmetic.attention(query, keys, values, positions, c.head_dim, c.n_heads // c.n_kv_heads, self.kv_cache)
        self._write(op.output, rows, out[None])

    def _gelu(self, op: Op, rows: int) -> None:
        self._write(op.output, rows, self.arithmetic.gelu(self._values(op.input, rows)))

    def _silu(self, op: Op, rows: int) -> None:
        self._write(op.output, rows, self.arithmetic.silu(self._values(op.input, rows)))

    def _mul(self, op: Op, rows: int) -> None:
        assert isinstance(op.config, MulConfig)
        multiplier = self.buffers[op.config.multiplier_buffer][:, :rows]
        self._write(op.output, rows, self.arithmetic.mul(self._values(op.input, rows), multiplier))

    def _scale(self, op: Op, rows: int) -> None:
        assert isinstance(op.config, ScaleConfig)
        factors = self.buffers[op.config.scale_buffer][:, :rows, 0]
        self._write(op.output, rows, self.arithmetic.scale(self._values(op.input, rows), factors))

    def _cast(self, op: Op, rows: int) -> None:
        x, source = self._rows(op.input, rows)
        _, target = self._rows(op.output, rows)
        self._write(op.output, rows, self.arithmetic.cast(x, source, target))

    def _repeat_z(self, op: Op, rows: int) -> None:
        x, source = self._rows(op.input, rows)
        out, target = self._rows(op.output, rows)
        self._write(op.output, rows, self.arithmetic.repeat_z(x[0], source, target, len(out)))

    def _softmax(self, op: Op, rows: int) -> None:
        self._write(op.output, rows, self.arithmetic.softmax(self._values(op.input, rows)))

    def _moe_gate(self, op: Op, rows: int) -> None:
        c = op.config
        assert isinstance(c, MoeGateConfig)
        indexes, weights = self.arithmetic.moe_gate(self._values(op.input, rows)[0], c.k, bool(c.norm_topk))
        self.buffers[c.indexes_buffer][0, :rows] = indexes
        self._write(op.output, rows, weights.T[..., None])


class OracleCluster:
    """All nodes of a network, segment by segment in lockstep, syncs included.

    Args:
        network: shared by all.
        nodes: in order; node 0 is the root.
        weights: where ops' weights come from.
        arithmetic: dairllm.kernels.reference, or a module of the same functions.
        kv_cache: how all nodes keep their KV caches.
    """

    def __init__(
        self,
        network: NetworkConfig,
        nodes: Sequence[NodeConfig],
        weights: Weights,
        arithmetic: ModuleType = reference,
        kv_cache: FloatType = FloatType.F32,
    ) -> None:
        assert [node.node for node in nodes] == list(range(network.n_nodes))
        assert len({tuple(segment.syncs for segment in node.segments) for node in nodes}) == 1, "nodes in lockstep sync alike"
        self.network = network
        self.nodes = [OracleNode(network, node, weights, arithmetic, kv_cache) for node in nodes]

    def run(self, tokens: Sequence[int], position: int, logits_pipe: int = 3) -> npt.NDArray[np.float32]:
        """One control packet: `tokens`, a row each, at position, position + 1, ...

        Returns:
            The root's rows of the logits pipe, float32 [rows, vocab].
        """
        rows = len(tokens)
        assert 1 <= rows <= self.network.n_batches
        self.nodes[0].pipes[TOKEN_PIPE][0, :rows, 0] = tokens
        for node in self.nodes:
            node.pipes[POSITION_PIPE][0, :rows, 0] = np.arange(position, position + rows)
        for number, segment in enumerate(self.nodes[0].node.segments):
            for node in self.nodes:
                node.run(number, rows)
            for sync in segment.syncs:
                self._sync(sync, rows)
        return self.nodes[0].pipes[logits_pipe][0, :rows].copy()

    def feed(self, tokens: Sequence[int], batch: int = 1) -> npt.NDArray[np.float32]:
        """A whole text from position 0 on, `batch` rows at a time: the logits of every row."""
        return np.concatenate([self.run(tokens[i : i + batch], i) for i in range(0, len(tokens), batch)])

    def _sync(self, sync: Sync, rows: int) -> None:
        pipes = [node.pipes[sync.pipe][0, :rows] for node in self.nodes]
        if sync.type == SyncType.WITH_ROOT:
            for pipe in pipes[1:]:
                pipe[...] = pipes[0]
            return
        receivers = pipes[:1] if sync.type == SyncType.NODE_SLICES_EXCEPT_ROOT else pipes
        width = pipes[0].shape[1] // len(pipes)
        for number, source in enumerate(pipes):
            part = slice(number * width, (number + 1) * width)
            for pipe in receivers:
                pipe[:, part] = source[:, part]
