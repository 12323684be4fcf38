from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dairllm.errors import FormatError
from dairllm.formats.gguf import GgufFile
from dairllm.formats.gguf_llama import llama_spec, tensor_sources
from dairllm.formats.model_layout import tensor_layout
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.types import FloatType, RopeType

MakeGguf = Callable[..., Path]


def read(path: Path) -> ModelSpec:
    with GgufFile.open(path) as file:
        spec = llama_spec(file, FloatType.F32)
        tensor_sources(file, tensor_layout(spec, 0))
        return spec


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """As llama.cpp's converter makes them, frequency by frequency."""
    factors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (pair / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_the_numbers(make_gguf: MakeGguf) -> None:
    assert read(make_gguf()) == ModelSpec(
        arch=Architecture.LLAMA,
        dim=64,
        hidden_dim=96,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        vocab_size=268,
        seq_len=512,
        weight_type=FloatType.F32,
        rope_theta=100000.0,
    )


def test_what_is_not_said(make_gguf: MakeGguf) -> None:
    spec = read(make_gguf(metadata={"llama.rope.freq_base": None, "llama.rope.dimension_count": None}))
    assert (spec.rope_theta, spec.head_dim) == (10000.0, 16)


def test_epsilon_is_a_float32_in_the_file(make_gguf: MakeGguf) -> None:
    assert read(make_gguf(metadata={"llama.attention.layer_norm_rms_epsilon": 1e-6})).norm_epsilon == 1e-6


def test_a_sliding_window_bounds_the_context(make_gguf: MakeGguf) -> None:
    assert read(make_gguf(metadata={"llama.attention.sliding_window": 128})).seq_len == 128
    assert read(make_gguf(metadata={"llama.attention.sliding_window": 4096})).seq_len == 512


@pytest.mark.parametrize("factor", [8, 32])
def test_the_rope_scaling_of_llama_3_1_is_recognised(make_gguf: MakeGguf, factor: int) -> None:
    factors = llama3_factors(16, 500000.0, factor)
    assert np.unique(factors).size > 1
    spec = read(make_gguf(metadata={"llama.rope.freq_base": 500000.0}, tensors={"rope_freqs.weight": factors}))
    assert spec.rope_type == RopeType.LLAMA3_1
    assert (spec.rope_scaling_factor, spec.rope_low_freq_factor, spec.rope_high_freq_factor) == (factor, 1.0, 4.0)
    assert spec.rope_orig_max_seq_len == 8192


def test_rope_factors_of_one_are_none(make_gguf: MakeGguf) -> None:
    spec = read(make_gguf(tensors={"rope_freqs.weight": np.ones(8, np.float32)}))
    assert (spec.rope_type, spec.rope_scaling_factor) == (RopeType.LLAMA, 1.0)


@pytest.mark.parametrize("factors", [[1, 2, 3, 4, 5, 6, 7, 8], [0] * 8, [float("nan")] * 8, [1.5] * 8])
def test_other_rope_factors_are_refused(make_gguf: MakeGguf, factors: list[float]) -> None:
    with pytest.raises(FormatError, match=r"tensor rope_freqs.weight that says Llama 3.1's rope scaling"):
        read(make_gguf(tensors={"rope_freqs.weight": np.array(factors, np.float32)}))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "without experts, found 8 experts"),
        ({"split.count": 3}, "a whole model in one file"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "no rope scaling but.*found type yarn, factor 4"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "found type linear, factor 2"),
        ({"llama.rope.scale_linear": 4.0}, "factor 4"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "no scaling of attention"),
        ({"llama.attention.layer_norm_rms_epsilon": 1e-4}, "a norm epsilon of 1e-5 or 1e-6.*found 0.0001"),
        ({"llama.attention.key_length": 32}, "value_length|dimension_count"),
        ({"llama.rope.dimension_count": 8}, "dimension_count equal to the width of a head, 16, found 8"),
        ({"llama.attention.head_count_kv": [2, 2]}, "an integer as llama.attention.head_count_kv"),
        ({"llama.attention.head_count": 0}, "a width and heads"),
        ({"llama.logit_scale": 0.5}, "no logit_scale"),
        ({"llama.use_parallel_residual": True}, "no use_parallel_residual"),
        ({"llama.feed_forward_length": 128}, "of shape"),
        ({"llama.block_count": 3}, "a tensor blk.2.attn_q.weight, found none of that name"),
        ({"llama.block_count": 1}, "no tensors but those of a llama model.*blk.1"),
        ({"llama.context_length": None}, "metadata llama.context_length"),
    ],
)
def test_what_cannot_be_said_is_refused(make_gguf: MakeGguf, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(make_gguf(metadata=metadata))


def test_harmless_metadata_are_no_obstacle(make_gguf: MakeGguf) -> None:
    none = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.logit_scale": 0.0, "split.count": 1, "general.name": "x"}
    assert read(make_gguf(metadata=none)).seq_len == 512


def test_another_architecture_is_named(make_gguf: MakeGguf) -> None:
    with pytest.raises(FormatError, match="a model of the architecture llama, found qwen2"):
        read(make_gguf(arch="qwen2"))


def test_unknown_tensors_are_named(make_gguf: MakeGguf) -> None:
    biases = {f"blk.{layer}.attn_{name}.bias": np.zeros(64, np.float32) for layer in range(2) for name in "qkv"}
    with pytest.raises(FormatError, match=r"found blk.0.attn_q.bias, blk.0.attn_k.bias, blk.0.attn_v.bias and 3 more"):
        read(make_gguf(tensors=biases))


def test_a_missing_tensor_and_one_of_another_shape(make_gguf: MakeGguf) -> None:
    with pytest.raises(FormatError, match=r"a tensor blk.1.ffn_up.weight, found none"):
        read(make_gguf(tensors={"blk.1.ffn_up.weight": None}))
    with pytest.raises(FormatError, match=r"tensor blk.1.ffn_up.weight of shape \(96, 64\) \(rows, columns\), found \(64, 96\)"):
        read(make_gguf(tensors={"blk.1.ffn_up.weight": np.zeros((64, 96), np.float32)}))
