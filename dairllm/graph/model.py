"""What a model is, apart from the file that holds it: the numbers from which its graph and its tensors follow."""

from dataclasses import dataclass
from enum import IntEnum

from dairllm.graph.types import FloatType, RopeType

__all__ = ["Architecture", "HiddenAct", "ModelSpec"]


class Architecture(IntEnum):
    """Values of the `.m` header's key 1."""

    LLAMA = 0xABCD00
    QWEN3 = 0xABCD01
    QWEN3_MOE = 0xABCD02


class HiddenAct(IntEnum):
    GELU = 0
    SILU = 1


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Dimensions and constants of a model; `seq_len` is the context length in use, at most the file's."""

    arch: Architecture
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    seq_len: int
    weight_type: FloatType
    hidden_act: HiddenAct = HiddenAct.SILU
    norm_epsilon: float = 1e-5
    rope_type: RopeType = RopeType.LLAMA
    rope_theta: float = 10000.0
    rope_scaling_factor: float = 1.0
    rope_low_freq_factor: float = 0.0
    rope_high_freq_factor: float = 0.0
    rope_orig_max_seq_len: int = 0
    n_experts: int = 0
    n_active_experts: int = 0
    moe_hidden_dim: int = 0

    @property
    def q_dim(self) -> int:
        return self.head_dim * self.n_heads

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.n_kv_heads

    @property
    def ff_dim(self) -> int:
        """Width of one feed-forward block: of an expert where there are experts."""
        return self.moe_hidden_dim if self.n_experts else self.hidden_dim

    @property
    def has_qk_norm(self) -> bool:
        """Qwen3 normalises each head of q and k."""
        return self.arch != Architecture.LLAMA
