"""The graph of a model for n nodes with any shares: for equal ones, byte for byte what a C++ root builds.

    segment 0            (root: TOK -> embedding -> X), then X goes to all
    segment 1 + 2 layer  x += the partial sums in ZQ; norm; q, k, v; rope; cache; attention; wo -> its slice of ZQ, then all to all
    segment 2 + 2 layer  x += the partial sums in ZQ; norm; feed-forward block or experts -> its slice of ZQ, then all to all
    last segment         x += the partial sums in ZQ; norm; classifier rows -> its slice of LG, then to the root

Pipes: POS and TOK (one value a row), X (a row of the embedding), LG (logits), ZQ (each node's partial sum of a whole row, side by side).
All nodes have equally wide slices of LG, the last ones filled up with rows of zeros.
Quantized weights meet activations in Q80, F32 weights meet F32; only ZQ, which crosses the wire, follows `sync`. (A C++ root can only
have these two alike.)
"""

import struct

from dairllm.errors import GraphError
from dairllm.graph.model import Architecture, HiddenAct, ModelSpec
from dairllm.graph.slicing import Share, Span, equal_shares
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
    row_bytes,
)

__all__ = ["LOGITS_PIPE", "N_BATCHES", "POSITION_PIPE", "TOKEN_PIPE", "build_graph", "build_network", "build_node"]

N_BATCHES = 32
"""Rows of a batch, where nothing else is asked for: a C++ root knows no other number."""

POSITION_PIPE, TOKEN_PIPE, _X_PIPE, LOGITS_PIPE, _ZQ_PIPE = range(5)


def build_graph(spec: ModelSpec, n_nodes: int, sync: FloatType, n_batches: int = N_BATCHES) -> tuple[NetworkConfig, tuple[NodeConfig, ...]]:
    """The graph of a model for `n_nodes` equal nodes, the root first.

    Args:
        spec: the model; its `seq_len` is the context length that KV caches are made for.
        n_nodes: root included; 1 is a local run.
        sync: F32 or Q80: how partial sums cross the wire.
        n_batches: rows that a batch can have.

    Raises:
        GraphError: the model cannot be divided so, or is none that we have a graph for.
    """
    shares = equal_shares(spec, n_nodes)
    network = build_network(spec, shares, sync, n_batches)
    return network, tuple(build_node(spec, network, node, share) for node, share in enumerate(shares))


def build_network(spec: ModelSpec, shares: tuple[Share, ...], sync: FloatType, n_batches: int = N_BATCHES) -> NetworkConfig:
    """What all nodes share.

    Raises:
        GraphError: as ``build_graph``.
    """
    _check(spec, sync, n_batches)
    n_nodes = len(shares)
    logits = -(-spec.vocab_size // n_nodes)
    pipes = (
        Pipe("POS", _plane(FloatType.F32, n_batches, 1)),
        Pipe("TOK", _plane(FloatType.F32, n_batches, 1)),
        Pipe("X", _plane(FloatType.F32, n_batches, spec.dim)),
        Pipe("LG", _plane(FloatType.F32, n_batches, logits * n_nodes)),
        Pipe("ZQ", _plane(sync, n_batches, spec.dim * n_nodes)),
    )
    return NetworkConfig(n_batches, n_nodes, pipes, (POSITION_PIPE,))


def build_node(spec: ModelSpec, network: NetworkConfig, node: int, share: Share) -> NodeConfig:
    """The graph of one node, for any share of ``graph.slicing``; its classifier rows are as many as its slice of LG is wide."""
    builder = _NodeBuilder(spec, network, node, share)
    segments = [builder.start()]
    for layer in range(spec.n_layers):
        segments += [builder.attention(layer), builder.feed_forward(layer)]
    segments.append(builder.end())
    return NodeConfig(node, tuple(builder.buffers), tuple(segments))


def _check(spec: ModelSpec, sync: FloatType, n_batches: int) -> None:
    """Raise GraphError for a model that no share can make a graph of."""
    if n_batches < 1:
        raise GraphError(f"a batch of {n_batches} rows")
    if sync not in (FloatType.F32, FloatType.Q80):
        raise GraphError(f"partial sums cross the wire as F32 or Q80, not {sync.name}")
    if spec.weight_type not in (FloatType.F32, FloatType.Q40, FloatType.Q80):
        raise GraphError(f"there is no graph for {spec.weight_type.name} weights")
    if (spec.arch == Architecture.QWEN3_MOE) != (spec.n_experts > 0):
        raise GraphError(f"{spec.arch.name} with {spec.n_experts} experts")
    if spec.n_active_experts > spec.n_experts:
        raise GraphError(f"{spec.n_active_experts} active experts of {spec.n_experts}")
    if spec.n_heads % spec.n_kv_heads:
        raise GraphError(f"{spec.n_heads} query heads cannot share {spec.n_kv_heads} KV heads")
    for what, float_type in (("weights", spec.weight_type), ("partial sums", sync)):
        try:
            row_bytes(float_type, spec.dim)
        except ValueError as error:
            raise GraphError(f"{float_type.name} {what}: {error}") from error


def _plane(float_type: FloatType, y: int, x: int) -> Size:
    return Size(float_type, 1, y, x)


def _pipe(index: int, kind: PointerType = PointerType.BATCH) -> Pointer:
    return Pointer(PointerSource.PIPE, index, kind)


def _buffer(index: int, kind: PointerType = PointerType.BATCH) -> Pointer:
    return Pointer(PointerSource.BUFFER, index, kind)


def _single(value: float) -> float:
    """The float32 nearest to `value`: a node that got it over the wire and one that built it here must agree."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    single: float = rounded
    return single


class _NodeBuilder:
    """Builds one node's segments. Buffers get their numbers in the order in which they are asked for, KV caches layer by layer."""

    def __init__(self, spec: ModelSpec, network: NetworkConfig, node: int, share: Share) -> None:
        self.spec, self.n_nodes, self.n_batches, self.node, self.share = spec, network.n_nodes, network.n_batches, node, share
        self.buffers: list[Buffer] = []
        self.ops: list[Op] = []
        self.layer = 0
        self.q_width, self.kv_width = share.n_heads * spec.head_dim, share.n_kv_heads * spec.head_dim
        self.logits_width = network.pipes[LOGITS_PIPE].size.x // network.n_nodes
        self._allot()

    # Buffers

    def _allot(self) -> None:
        """All buffers but the KV caches. Dense models have those for experts too, of one expert, and the reverse."""
        spec, share = self.spec, self.share
        packed = FloatType.F32 if spec.weight_type == FloatType.F32 else FloatType.Q80  # what weights of this type are multiplied with
        self.rope_cache_size = self._rope_cache()
        active, ffn = max(spec.n_active_experts, 1), share.ffn.size

        self.x = self._rows("x", spec.dim)
        self.y = self._rows("y", spec.dim)
        self.yq = self._packed("q_y", self.y, packed)
        self.z = self._rows("z", self.q_width * self.n_nodes)
        self.zq = self._add("q_z_slice", _plane(packed, self.n_batches, self.q_width))
        self.q = self._rows("q", self.q_width)
        self.k = self._rows("k_temp", self.kv_width)
        self.v = self._rows("v_temp", self.kv_width)
        self.inv_rms = self._rows("inv_rms", max(share.n_heads, share.n_kv_heads) if spec.has_qk_norm else 1)
        self.rope_cache = self._add("rope_cache", self.rope_cache_size)
        self.att = self._rows("att", share.n_heads * spec.seq_len)
        self.logits = self._rows("lg", self.logits_width)
        self.d = self._rows("d", ffn)
        self.dq = self._packed("q_d", self.d, packed)
        self.l = self._rows("l", ffn)
        self.gate = self._rows("gt", max(spec.n_experts, 1))
        self.expert_indexes = self._rows("act_exp_ix", active)
        self.moe_y = self._rows("moe_y", spec.dim, active)
        self.moe_yq = self._packed("q_moe_y", self.moe_y, packed)
        self.moe_d = self._rows("moe_d", ffn, active)
        self.moe_dq = self._packed("q_moe_d", self.moe_d, packed)
        self.moe_l = self._rows("moe_l", ffn, active)
        self.moe_s = self._rows("moe_s", 1, active)

    def _add(self, name: str, size: Size) -> int:
        self.buffers.append(Buffer(name, size))
        return len(self.buffers) - 1

    def _rows(self, name: str, width: int, planes: int = 1) -> int:
        return self._add(name, Size(FloatType.F32, planes, self.n_batches, width))

    def _packed(self, name: str, values: int, float_type: FloatType) -> int:
        """Where the values of buffer `values` stand as matmul input: the buffer itself where that takes F32."""
        if float_type == FloatType.F32:
            return values
        size = self.buffers[values].size
        return self._add(name, Size(float_type, size.z, size.y, size.x))

    def _rope_cache(self) -> Size:
        """One row a position: of a head where all heads turn alike (falcon), else of all from the first k to the last q of this node."""
        q, k = self._rope_places()
        return _plane(FloatType.F32, self.spec.seq_len, self.spec.head_dim if self.spec.rope_type == RopeType.FALCON else q.stop - k.start)

    def _rope_places(self) -> tuple[Span, Span]:
        """Where this node's q and k are among all, or, where its heads do not lie together, as if they were the first: heads of all
        places turn alike, and C++ fills one cache from k's beginning to q's end, which must hold both."""
        share, head_dim = self.share, self.spec.head_dim
        if len(share.heads) == len(share.kv_heads) == 1:
            return share.heads[0].times(head_dim), share.kv_heads[0].times(head_dim)
        return Span(0, self.q_width), Span(0, self.kv_width)

    # Segments

    def start(self) -> Segment:
        if self.node == 0:
            weight = _plane(FloatType.F32, self.spec.vocab_size, self.spec.dim)
            self._op(OpCode.EMBEDDING, "embedding", _pipe(TOKEN_PIPE), _pipe(_X_PIPE), weight=weight)
        return self._segment(_X_PIPE, SyncType.WITH_ROOT)

    def attention(self, layer: int) -> Segment:
        spec, self.layer = self.spec, layer
        cache = _plane(FloatType.F32, spec.seq_len, self.kv_width)
        keys, values = self._add("k", cache), self._add("v", cache)
        if layer == 0:
            self._cast("block_cast_x", _pipe(_X_PIPE), _buffer(self.x))
        else:
            self._op(OpCode.MERGE_ADD, "block_merge_add", _pipe(_ZQ_PIPE), _buffer(self.x))
        self._norm("block_norm_pre_0", "block_norm_0")
        self._pack("block_cast_y", self.y, self.yq)
        self._matmul("block_matmul_q", self.yq, self.q, spec.dim, self.q_width)
        self._matmul("block_matmul_k", self.yq, self.k, spec.dim, self.kv_width)
        self._matmul("block_matmul_v", self.yq, self.v, spec.dim, self.kv_width)
        if spec.has_qk_norm:
            self._head_norm("q", self.q, self.share.n_heads)
            self._head_norm("k", self.k, self.share.n_kv_heads)
        self._op(OpCode.ROPE, "block_rope_q", _buffer(self.q), _buffer(self.q), self._rope(is_q=1))
        self._op(OpCode.ROPE, "block_rope_k", _buffer(self.k), _buffer(self.k), self._rope(is_q=0))
        for name, source, target in (("block_shift_k", self.k, keys), ("block_shift_v", self.v, values)):
            self._op(OpCode.SHIFT, name, _buffer(source), _buffer(target, PointerType.RAW), ShiftConfig(POSITION_PIPE))
        z = _buffer(self.z, PointerType.BATCHED_SLICE)
        self._op(OpCode.MULTIHEAD_ATT, "block_multihead_att", z, z, self._attention_config(keys, values))
        self._cast("block_cast_y2", z, _buffer(self.zq))
        self._matmul("block_matmul_wo", self.zq, self.y, self.q_width, spec.dim)
        return self._partial_sum("block_cast_d")

    def feed_forward(self, layer: int) -> Segment:
        self.layer = layer
        self._op(OpCode.MERGE_ADD, "block_merge_add2", _pipe(_ZQ_PIPE), _buffer(self.x))
        self._norm("block_norm_pre_1", "block_norm_1")
        if self.spec.n_experts:
            self._experts()
        else:
            self._pack("block_cast_y3", self.y, self.yq)
            self._gated_block(self.yq, self.d, self.l, self.dq, self.y, MatmulConfig(0, 0, self.expert_indexes))
        return self._partial_sum("block_cast_d3")

    def end(self) -> Segment:
        self.layer = 0
        self._op(OpCode.MERGE_ADD, "final_merge_add", _pipe(_ZQ_PIPE), _buffer(self.x))
        self._norm("final_norm_pre", "final_norm")
        self._pack("final_cast_y", self.y, self.yq)
        self._matmul("final_matmul_logits", self.yq, self.logits, self.spec.dim, self.logits_width, MatmulConfig(0, 0, 0))
        self._cast("final_cast_logits", _buffer(self.logits), _pipe(LOGITS_PIPE, PointerType.BATCHED_SLICE))
        return self._segment(LOGITS_PIPE, SyncType.NODE_SLICES_EXCEPT_ROOT)

    # Parts of segments

    def _experts(self) -> None:
        spec = self.spec
        self._op(OpCode.REPEAT_Z, "block_moe_y_repeat", _buffer(self.y), _buffer(self.moe_yq))
        gate = _buffer(self.gate)
        weight = _plane(FloatType.F32, spec.dim, spec.n_experts)
        self._op(OpCode.MATMUL, "block_moe_gate", _buffer(self.y), gate, MatmulConfig(0, 0, self.expert_indexes), weight)
        self._op(OpCode.SOFTMAX, "block_moe_softmax", gate, gate)
        self._op(
            OpCode.MOE_GATE, "block_moe_gate2", gate, _buffer(self.moe_s), MoeGateConfig(spec.n_active_experts, 1, self.expert_indexes)
        )
        config = MatmulConfig(spec.n_experts, spec.n_active_experts, self.expert_indexes)
        self._gated_block(self.moe_yq, self.moe_d, self.moe_l, self.moe_dq, self.moe_y, config)
        moe_y = _buffer(self.moe_y)
        self._op(OpCode.SCALE, "block_moe_scale", moe_y, moe_y, ScaleConfig(self.moe_s))
        self._op(OpCode.MERGE_SUM, "block_moe_merge_sum", moe_y, _buffer(self.y))

    def _gated_block(self, source: int, d: int, l: int, dq: int, target: int, config: MatmulConfig) -> None:  # noqa: E741  # the graph's name
        """target = w2 (act(w1 source) * (w3 source))."""
        dim, ffn = self.spec.dim, self.share.ffn.size
        self._matmul("block_matmul_w1", source, d, dim, ffn, config)
        self._matmul("block_matmul_w3", source, l, dim, ffn, config)
        act = OpCode.GELU if self.spec.hidden_act == HiddenAct.GELU else OpCode.SILU
        self._op(act, "block_act", _buffer(d), _buffer(d))
        self._op(OpCode.MUL, "block_mul", _buffer(d), _buffer(d), MulConfig(l))
        self._pack("block_cast_d2", d, dq)
        self._matmul("block_matmul_w2", dq, target, ffn, dim, config)

    def _norm(self, inverse_name: str, name: str) -> None:
        """y = the norm of x, with a weight."""
        self._op(OpCode.INV_RMS, inverse_name, _buffer(self.x), _buffer(self.inv_rms), InvRmsConfig(_single(self.spec.norm_epsilon), 1))
        weight = _plane(FloatType.F32, 1, self.spec.dim)
        self._op(OpCode.RMS_NORM, name, _buffer(self.x), _buffer(self.y), RmsNormConfig(self.inv_rms, 1), weight)

    def _head_norm(self, name: str, buffer: int, n_heads: int) -> None:
        """Each head of q or k by itself, all with the same weight."""
        rows, epsilon = _buffer(buffer), _single(self.spec.norm_epsilon)
        self._op(OpCode.INV_RMS, f"block_norm_pre_{name}", rows, _buffer(self.inv_rms), InvRmsConfig(epsilon, n_heads))
        weight = _plane(FloatType.F32, 1, self.spec.head_dim)
        self._op(OpCode.RMS_NORM, f"block_norm_{name}", rows, rows, RmsNormConfig(self.inv_rms, n_heads), weight)

    def _partial_sum(self, name: str) -> Segment:
        """This node's part of the sum that all nodes need goes into its slice of ZQ."""
        self._cast(name, _buffer(self.y), _pipe(_ZQ_PIPE, PointerType.BATCHED_SLICE))
        return self._segment(_ZQ_PIPE, SyncType.NODE_SLICES)

    # Ops

    def _op(
        self, code: OpCode, name: str, source: Pointer, target: Pointer, config: OpConfig | None = None, weight: Size | None = None
    ) -> None:
        self.ops.append(Op(code, name, self.layer, source, target, weight or Size.none(), config or NoConfig()))

    def _cast(self, name: str, source: Pointer, target: Pointer) -> None:
        self._op(OpCode.CAST, name, source, target)

    def _pack(self, name: str, source: int, target: int) -> None:
        """Values to what a matmul takes, where that is something else."""
        if source != target:
            self._cast(name, _buffer(source), _buffer(target))

    def _matmul(self, name: str, source: int, target: int, inputs: int, outputs: int, config: MatmulConfig | None = None) -> None:
        config = config or MatmulConfig(0, 0, self.expert_indexes)
        weight = Size(self.spec.weight_type, max(config.n_experts, 1), inputs, outputs)
        self._op(OpCode.MATMUL, name, _buffer(source), _buffer(target), config, weight)

    def _segment(self, pipe: int, kind: SyncType) -> Segment:
        ops, self.ops = tuple(self.ops), []
        return Segment(ops, (Sync(pipe, kind),))

    # Configurations

    def _attention_config(self, keys: int, values: int) -> AttentionConfig:
        spec = self.spec
        return AttentionConfig(
            n_heads=spec.n_heads,
            n_heads_0=self.share.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            seq_len=spec.seq_len,
            q_slice_d0=self.q_width,
            kv_dim_0=self.kv_width,
            position_pipe=POSITION_PIPE,
            query_buffer=self.q,
            key_cache_buffer=keys,
            value_cache_buffer=values,
            att_buffer=self.att,
        )

    def _rope(self, is_q: int) -> RopeConfig:
        """Falcon has no use for where q and k begin, and C++ leaves those fields as it finds them."""
        spec = self.spec
        q, k = self._rope_places()
        placed = spec.rope_type != RopeType.FALCON
        return RopeConfig(
            type=spec.rope_type,
            is_q=is_q,
            position_pipe=POSITION_PIPE,
            rope_cache_buffer=self.rope_cache,
            scaling_factor=_single(spec.rope_scaling_factor),
            low_freq_factor=_single(spec.rope_low_freq_factor),
            high_freq_factor=_single(spec.rope_high_freq_factor),
            orig_max_seq_len=spec.rope_orig_max_seq_len,
            q_dim_0=self.q_width,
            q_dim_start=q.start if placed else 0,
            q_dim_end=q.stop if placed else 0,
            q_shift=q.start - k.start if placed else 0,
            kv_dim=spec.kv_dim,
            kv_dim_0=self.kv_width,
            kv_dim_start=k.start if placed else 0,
            slice_dim=q.stop - k.start if placed else 0,
            seq_len=spec.seq_len,
            head_dim=spec.head_dim,
            n_kv_heads=spec.n_kv_heads,
            theta=_single(spec.rope_theta),
            cache_size=self.rope_cache_size,
        )
