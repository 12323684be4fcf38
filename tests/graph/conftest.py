"""Small models of each architecture."""

from dataclasses import replace

import pytest

from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.types import FloatType, RopeType


@pytest.fixture
def llama() -> ModelSpec:
    return ModelSpec(
        Architecture.LLAMA, dim=128, hidden_dim=192, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=32, vocab_size=300, seq_len=64,
        weight_type=FloatType.Q40,
    )  # fmt: skip


@pytest.fixture
def qwen3(llama: ModelSpec) -> ModelSpec:
    return replace(llama, arch=Architecture.QWEN3, rope_type=RopeType.FALCON)


@pytest.fixture
def qwen3_moe(qwen3: ModelSpec) -> ModelSpec:
    return replace(qwen3, arch=Architecture.QWEN3_MOE, n_experts=8, n_active_experts=3, moe_hidden_dim=96)
