"""The nouns that root and workers agree upon: pipes, buffers, segments, ops (distributed-llama's graph).

A *pipe* is shared between nodes, a *buffer* is a node's own. A *segment* is a run of ops followed by syncs, which move pipe rows
between nodes. Numbers of the enumerations are those of the wire protocol. Nothing here does I/O or checks more than one object:
whether a graph fits together is the business of ``engine.ops``.
"""

from dataclasses import dataclass
from enum import IntEnum

__all__ = [
    "BLOCK_VALUES",
    "AttentionConfig",
    "Buffer",
    "FloatType",
    "InvRmsConfig",
    "MatmulConfig",
    "MoeGateConfig",
    "MulConfig",
    "NetworkConfig",
    "NoConfig",
    "NodeConfig",
    "Op",
    "OpCode",
    "OpConfig",
    "Pipe",
    "Pointer",
    "PointerSource",
    "PointerType",
    "RmsNormConfig",
    "RopeConfig",
    "RopeType",
    "ScaleConfig",
    "Segment",
    "ShiftConfig",
    "Size",
    "Sync",
    "SyncType",
    "row_bytes",
]

BLOCK_VALUES = 32
"""Values of one Q40 or Q80 block."""


class FloatType(IntEnum):
    """How values are stored. Q40: 18 bytes a block of 32 (f16 scale, 16 nibble pairs). Q80: 34 bytes (f16 scale, 32 int8)."""

    NONE = -1
    F32 = 0
    F16 = 1
    Q40 = 2
    Q80 = 3


class SyncType(IntEnum):
    """What a sync moves: the root's row to all; every node's slice to every other; each worker's slice to the root."""

    WITH_ROOT = 0
    NODE_SLICES = 1
    NODE_SLICES_EXCEPT_ROOT = 2


class OpCode(IntEnum):
    MERGE_ADD = 0
    MERGE_SUM = 1
    EMBEDDING = 2
    INV_RMS = 3
    RMS_NORM = 4
    MATMUL = 5
    ROPE = 6
    MULTIHEAD_ATT = 7
    GELU = 8
    SILU = 9
    MUL = 10
    SCALE = 11
    CAST = 12
    REPEAT_Z = 13
    SHIFT = 14
    SOFTMAX = 15
    MOE_GATE = 16


class RopeType(IntEnum):
    """LLAMA: neighbouring pairs. FALCON: pairs half a head apart. LLAMA3_1: neighbouring pairs, frequencies rescaled."""

    LLAMA = 0
    FALCON = 1
    LLAMA3_1 = 2


class PointerSource(IntEnum):
    PIPE = 0
    BUFFER = 1


class PointerType(IntEnum):
    """RAW: the whole thing as one row. BATCH: row b of each plane. BATCHED_SLICE: this node's part of row b."""

    RAW = 0
    BATCH = 1
    BATCHED_SLICE = 2


_BYTES = {FloatType.F32: (1, 4), FloatType.F16: (1, 2), FloatType.Q40: (BLOCK_VALUES, 18), FloatType.Q80: (BLOCK_VALUES, 34)}


def row_bytes(float_type: FloatType, values: int) -> int:
    """Bytes of a row of `values` values; ValueError where a block type does not divide it."""
    if float_type == FloatType.NONE:
        return 0
    per_block, block_bytes = _BYTES[float_type]
    if values % per_block:
        raise ValueError(f"a row of {values} values is not a whole number of {float_type.name} blocks of {per_block}")
    return values // per_block * block_bytes


@dataclass(frozen=True, slots=True)
class Size:
    """z planes of y rows of x values. For a matmul's weight: z experts, y inputs, x outputs (stored [z, x, y])."""

    float_type: FloatType
    z: int
    y: int
    x: int

    @property
    def length(self) -> int:
        """Values in all."""
        return self.z * self.y * self.x

    @property
    def nbytes_xy(self) -> int:
        """Bytes of one plane."""
        return row_bytes(self.float_type, self.y * self.x)

    @property
    def nbytes(self) -> int:
        return self.z * self.nbytes_xy

    @classmethod
    def none(cls) -> "Size":
        """The size of an op without weights."""
        return cls(FloatType.NONE, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Pipe:
    name: str
    size: Size


@dataclass(frozen=True, slots=True)
class Buffer:
    name: str
    size: Size


@dataclass(frozen=True, slots=True)
class Pointer:
    source: PointerSource
    index: int
    type: PointerType


@dataclass(frozen=True, slots=True)
class NoConfig:
    """Embedding, cast, merge_add, merge_sum, silu, gelu, softmax, repeat_z."""


@dataclass(frozen=True, slots=True)
class InvRmsConfig:
    epsilon: float
    n_columns: int


@dataclass(frozen=True, slots=True)
class RmsNormConfig:
    inv_rms_buffer: int
    n_columns: int


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    n_experts: int
    n_active_experts: int
    expert_indexes_buffer: int


@dataclass(frozen=True, slots=True)
class MulConfig:
    multiplier_buffer: int


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    scale_buffer: int


@dataclass(frozen=True, slots=True)
class ShiftConfig:
    position_pipe: int


@dataclass(frozen=True, slots=True)
class MoeGateConfig:
    k: int
    norm_topk: int
    indexes_buffer: int


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    n_heads: int
    n_heads_0: int
    n_kv_heads: int
    head_dim: int
    seq_len: int
    q_slice_d0: int
    kv_dim_0: int
    position_pipe: int
    query_buffer: int
    key_cache_buffer: int
    value_cache_buffer: int
    att_buffer: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Fields in wire order; the slice's fields that FALCON leaves uninitialised are marked by the protocol notes."""

    type: RopeType
    is_q: int
    position_pipe: int
    rope_cache_buffer: int
    scaling_factor: float
    low_freq_factor: float
    high_freq_factor: float
    orig_max_seq_len: int
    q_dim_0: int
    q_dim_start: int
    q_dim_end: int
    q_shift: int
    kv_dim: int
    kv_dim_0: int
    kv_dim_start: int
    slice_dim: int
    seq_len: int
    head_dim: int
    n_kv_heads: int
    theta: float
    cache_size: Size


OpConfig = (
    NoConfig
    | InvRmsConfig
    | RmsNormConfig
    | MatmulConfig
    | MulConfig
    | ScaleConfig
    | ShiftConfig
    | MoeGateConfig
    | AttentionConfig
    | RopeConfig
)


@dataclass(frozen=True, slots=True)
class Op:
    """`index` is the layer; (name, index) names the op's weight on the wire."""

    code: OpCode
    name: str
    index: int
    input: Pointer
    output: Pointer
    weight_size: Size
    config: OpConfig


@dataclass(frozen=True, slots=True)
class Sync:
    pipe: int
    type: SyncType


@dataclass(frozen=True, slots=True)
class Segment:
    ops: tuple[Op, ...]
    syncs: tuple[Sync, ...]


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """What all nodes share. `pre_syncs` are pipe indexes; they move no bytes."""

    n_batches: int
    n_nodes: int
    pipes: tuple[Pipe, ...]
    pre_syncs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """One node's graph; `node` 0 is the root."""

    node: int
    buffers: tuple[Buffer, ...]
    segments: tuple[Segment, ...]
