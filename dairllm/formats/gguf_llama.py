"""GGUF's architecture `llama` in the terms of a `.m` file: which numbers and which tensors go where.

q and k are in the order of neighbouring rotary pairs in both formats, so every tensor goes over as it is. Whatever a `.m` file cannot say
is refused: a model that runs must be the model that was trained.
"""

import math
from collections.abc import Callable

import numpy as np

from dairllm.errors import FormatError, printable
from dairllm.formats.gguf import GgufFile, GgufTensor
from dairllm.formats.model_layout import Tensor
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.types import BLOCK_VALUES, FloatType, RopeType

__all__ = ["TensorSources", "llama_spec", "nearest_weight_type", "tensor_sources"]

TensorSources = Callable[[Tensor], GgufTensor]
"""The GGUF tensor that a tensor of the `.m` file is made of."""

_OUTSIDE = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "final_matmul_logits": "output.weight"}
_IN_LAYER = {
    "block_matmul_q": "attn_q.weight",
    "block_matmul_k": "attn_k.weight",
    "block_matmul_v": "attn_v.weight",
    "block_matmul_wo": "attn_output.weight",
    "block_matmul_w1": "ffn_gate.weight",
    "block_matmul_w2": "ffn_down.weight",
    "block_matmul_w3": "ffn_up.weight",
    "block_norm_0": "attn_norm.weight",
    "block_norm_1": "ffn_norm.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"

_CHANGES_THE_SUMS = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "use_parallel_residual",
)
"""Hyperparameters for which neither a `.m` file nor the graph has a place, unless they are zero."""

_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_LENGTH = 1, 4, 8192
"""Constants of Llama 3.1's rope scaling, the same in all models that have it."""


def llama_spec(file: GgufFile, weight_type: FloatType) -> ModelSpec:
    """The model that a GGUF file of the architecture `llama` holds.

    Args:
        file: the file.
        weight_type: what its weights are to be stored as.

    Raises:
        FormatError: it is of another architecture, or has something that a `.m` file cannot say.
    """
    arch = file.text("general.architecture")
    if arch != "llama":
        raise FormatError(file.path, None, "a model of the architecture llama", printable(arch))
    if file.integer("split.count", 1) > 1:
        raise FormatError(file.path, None, "a whole model in one file (llama-gguf-split --merge makes it)", "one part of a split model")
    if file.integer("llama.expert_count", 0):
        raise FormatError(file.path, None, "a llama model without experts", f"{file.integer('llama.expert_count')} experts")
    for name in _CHANGES_THE_SUMS:
        value = file.real(f"llama.{name}", 0.0) if name != "use_parallel_residual" else float(file.flag(f"llama.{name}", False))
        if value:
            raise FormatError(file.path, None, f"no {name}, which a .m file cannot say", repr(value))
    dim, n_heads = file.integer("llama.embedding_length"), file.integer("llama.attention.head_count")
    if n_heads < 1 or dim < 1:
        raise FormatError(file.path, None, "a width and heads", f"embedding_length {dim}, head_count {n_heads}")
    head_dim = file.integer("llama.attention.key_length", dim // n_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if file.integer(key, head_dim) != head_dim:
            raise FormatError(file.path, None, f"{key} equal to the width of a head, {head_dim}", str(file.integer(key)))
    theta = file.real("llama.rope.freq_base", 10000.0)
    factor = _rope_factor(file, head_dim, theta)
    return ModelSpec(
        arch=Architecture.LLAMA,
        dim=dim,
        hidden_dim=file.integer("llama.feed_forward_length"),
        n_layers=file.integer("llama.block_count"),
        n_heads=n_heads,
        n_kv_heads=file.integer("llama.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        vocab_size=_tensor(file, _OUTSIDE["embedding"]).n_rows,
        seq_len=_context_length(file),
        weight_type=weight_type,
        norm_epsilon=_epsilon(file),
        rope_type=RopeType.LLAMA if factor == 1 else RopeType.LLAMA3_1,
        rope_theta=theta,
        rope_scaling_factor=float(factor),
        rope_low_freq_factor=0.0 if factor == 1 else float(_LLAMA3_LOW),
        rope_high_freq_factor=0.0 if factor == 1 else float(_LLAMA3_HIGH),
        rope_orig_max_seq_len=0 if factor == 1 else _LLAMA3_LENGTH,
    )


def nearest_weight_type(file: GgufFile) -> FloatType:
    """What a file's weights are stored as so that they stay what they are: Q40 where those of the layers are Q4_0, the same blocks. Else
    Q80, in which all that GGUF has comes out nearly as it was, where Q40 would spoil it; F32 where rows are no whole number of blocks.

    A `.m` file has one type for all weights. So a classifier is Q40 too where the layers are, though llama.cpp gives it more bits.
    """
    matrices = [tensor for name, tensor in file.tensors.items() if name.startswith("blk.") and len(tensor.shape) == 2]
    if any(matrix.n_columns % BLOCK_VALUES for matrix in matrices):
        return FloatType.F32
    return FloatType.Q40 if matrices and all(matrix.type_name == "Q4_0" for matrix in matrices) else FloatType.Q80


def tensor_sources(file: GgufFile, tensors: tuple[Tensor, ...]) -> TensorSources:
    """Find the source of every tensor of a `.m` file. Where there is no classifier, it is the embedding.

    Raises:
        FormatError: one is missing or of another shape, or the GGUF file has tensors that have no place (biases, for instance).
    """
    sources: dict[tuple[str, int], GgufTensor] = {}
    for tensor in tensors:
        name = _OUTSIDE.get(tensor.name) or f"blk.{tensor.layer}.{_IN_LAYER[tensor.name]}"
        if name == "output.weight" and name not in file.tensors:
            name = _OUTSIDE["embedding"]
        source = _tensor(file, name)
        if source.shape != tensor.shape:
            raise FormatError(file.path, source.offset, f"tensor {name} of shape {tensor.shape} (rows, columns)", f"{source.shape}")
        sources[tensor.name, tensor.layer] = source
    used = {source.name for source in sources.values()} | {_ROPE_FACTORS}
    unknown = [name for name in file.tensors if name not in used]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise FormatError(
            file.path, None, "no tensors but those of a llama model without biases", ", ".join(map(printable, unknown[:3])) + more
        )
    return lambda tensor: sources[tensor.name, tensor.layer]


def _tensor(file: GgufFile, name: str) -> GgufTensor:
    try:
        return file.tensors[name]
    except KeyError:
        raise FormatError(file.path, None, f"a tensor {name}", "none of that name") from None


def _epsilon(file: GgufFile) -> float:
    value = file.real("llama.attention.layer_norm_rms_epsilon")
    for known in (1e-5, 1e-6):
        if math.isclose(value, known, rel_tol=1e-5):  # it is stored as a float32
            return known
    raise FormatError(file.path, None, "a norm epsilon of 1e-5 or 1e-6, which is all that a .m file can say", f"{value:g}")


def _context_length(file: GgufFile) -> int:
    """The context length; with sliding-window attention, as long as the window has not begun to slide."""
    length = file.integer("llama.context_length")
    window = file.integer("llama.attention.sliding_window", 0)
    return min(length, window) if window > 0 else length


def _rope_factor(file: GgufFile, head_dim: int, theta: float) -> int:
    """The factor of Llama 3.1's rope scaling, 1 where there is none."""
    kind, linear = file.text("llama.rope.scaling.type", "none"), file.real("llama.rope.scaling.factor", 1.0)
    if kind not in ("none", "linear") or (kind == "linear" and linear != 1.0) or file.real("llama.rope.scale_linear", 1.0) != 1.0:
        found = f"type {kind}, factor {file.real('llama.rope.scale_linear', linear):g}"
        raise FormatError(file.path, None, "no rope scaling but Llama 3.1's, which is all that a .m file can say", found)
    if file.real("llama.rope.scaling.attn_factor", 1.0) != 1.0:
        raise FormatError(file.path, None, "no scaling of attention", f"{file.real('llama.rope.scaling.attn_factor'):g}")
    source = file.tensors.get(_ROPE_FACTORS)
    if source is None:
        return 1
    if source.shape != (head_dim // 2,):
        raise FormatError(file.path, source.offset, f"tensor {_ROPE_FACTORS} of {head_dim // 2} values", f"shape {source.shape}")
    factors = file.rows(source, 0, 1)[0]
    factor = round(float(factors.max())) if np.isfinite(factors).all() else 0
    if factor < 1 or not np.allclose(factors, _llama3_divisors(head_dim, theta, factor), rtol=1e-4):
        expected = f"tensor {_ROPE_FACTORS} that says Llama 3.1's rope scaling (low 1, high 4, original length 8192)"
        raise FormatError(file.path, source.offset, expected, f"values from {factors.min():g} to {factors.max():g}")
    return factor


def _llama3_divisors(head_dim: int, theta: float, factor: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """What Llama 3.1's scaling divides each frequency by: float64 [head_dim / 2].

    Short wavelengths stay, long ones are divided by `factor`, those between go over smoothly.
    """
    with np.errstate(all="ignore"):  # a base that is no number gives none, which are not the file's
        wavelengths = 2 * np.pi * np.float64(theta) ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = (_LLAMA3_LENGTH / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    return 1 / ((1 - np.clip(smooth, 0, 1)) / factor + np.clip(smooth, 0, 1))
