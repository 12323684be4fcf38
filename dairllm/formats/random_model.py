"""Models and vocabularies of random numbers, for tests and benchmarks: any architecture, any shape, any type of weights.

The same seed gives the same file. Quantized weights are made as blocks, not rounded from values, so that a file of a billion weights
takes seconds; they have the spread that trained weights of their shape have, and no mean.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dairllm.formats.model_layout import Tensor
from dairllm.formats.model_writer import ModelWriter
from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.types import BLOCK_VALUES, FloatType, RopeType, row_bytes

__all__ = ["byte_vocabulary", "small_spec", "write_random_model"]

_CHUNK_BYTES = 1 << 24
_GAIN = 1.6
"""Of a matmul: keeps activations from dying out over layers without letting them run away."""

_NIBBLE_SPREAD = np.sqrt((16**2 - 1) / 12 + 0.25)  # of -8..7, evenly, about zero
_BYTE_SPREAD = np.sqrt((255**2 - 1) / 12)  # of -127..127, evenly


def small_spec(arch: Architecture = Architecture.LLAMA, weight_type: FloatType = FloatType.Q40, **changes: Any) -> ModelSpec:
    """A spec of a model that takes a moment to run, with any field changed: `small_spec(dim=128, n_layers=3)`.

    `head_dim` follows from `dim` and `n_heads` unless it is given; Qwen3 has its own rope and epsilon; Qwen3-MoE has 8 experts, 3 active.
    """
    spec = ModelSpec(
        arch=arch,
        dim=64,
        hidden_dim=128,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        vocab_size=320,
        seq_len=256,
        weight_type=weight_type,
    )
    if arch != Architecture.LLAMA:
        spec = replace(spec, rope_type=RopeType.FALCON, rope_theta=1e6, norm_epsilon=1e-6, head_dim=32)
    elif "head_dim" not in changes:
        changes["head_dim"] = changes.get("dim", spec.dim) // changes.get("n_heads", spec.n_heads)
    if arch == Architecture.QWEN3_MOE:
        spec = replace(spec, n_experts=8, n_active_experts=3, moe_hidden_dim=64)
    return replace(spec, **changes)


def write_random_model(path: str | Path, spec: ModelSpec, seed: int = 0) -> None:
    """Write a `.m` file of random weights.

    Raises:
        FormatError: `spec` contradicts itself.
        OSError: it cannot be written.
    """
    with ModelWriter(path, spec) as model:
        for number, tensor in enumerate(model.tensors):
            random = np.random.default_rng([seed, number])
            model.write_tensor(tensor.name, _pieces(tensor, random), tensor.layer, tensor.expert)


def byte_vocabulary(vocab_size: int, chat_template: str | None = None) -> TokenizerFile:
    """A vocabulary for any text: all bytes, some common pairs, made-up words, and three special tokens at the end (begin, end, turn).

    Raises:
        ValueError: `vocab_size` is less than 259.
    """
    special = [b"<|begin|>", b"<|end|>", b"<|turn|>"]
    n_words = vocab_size - 256 - len(special)
    if n_words < 0:
        raise ValueError(f"a vocabulary of all bytes and three special tokens has more than {vocab_size} tokens")
    pairs = [b"th", b"he", b"in", b"er", b"an", b"re", b"on", b"at", b"en", b"nd", b"ti", b"es", b"or", b"te", b"of", b"ed"]
    words = pairs[:n_words] + [f" w{number}".encode() for number in range(n_words - len(pairs))]
    pieces = [bytes([value]) for value in range(256)] + words + special
    bos_id = vocab_size - len(special)
    return TokenizerFile(
        pieces=tuple(pieces),
        scores=tuple(-float(token) for token in range(vocab_size)),
        bos_id=bos_id,
        eos_ids=(bos_id + 1,),
        add_bos=True,
        chat_template=chat_template,
        max_token_length=max(map(len, pieces)),
    )


def _pieces(tensor: Tensor, random: np.random.Generator) -> Iterator[npt.NDArray[Any]]:
    step = max(1, _CHUNK_BYTES // tensor.row_bytes)
    for first in range(0, tensor.n_rows, step):
        yield _rows(tensor, min(step, tensor.n_rows - first), random)


def _rows(tensor: Tensor, count: int, random: np.random.Generator) -> npt.NDArray[Any]:
    if "norm" in tensor.name:
        return np.float32(1) + np.float32(0.1) * random.standard_normal((count, tensor.n_columns), np.float32)
    if tensor.name == "embedding":
        return random.standard_normal((count, tensor.n_columns), np.float32)
    spread = _GAIN / np.sqrt(tensor.n_columns)
    if tensor.float_type == FloatType.F32:
        return random.standard_normal((count, tensor.n_columns), np.float32) * np.float32(spread)
    block_bytes = row_bytes(tensor.float_type, BLOCK_VALUES)
    blocks = np.frombuffer(random.bytes(count * tensor.row_bytes), np.uint8).reshape(-1, block_bytes).copy()
    if tensor.float_type == FloatType.Q40:
        scale = np.full((len(blocks), 1), spread / _NIBBLE_SPREAD, "<f2")
        scale[random.random(len(blocks)) < 0.5] *= -1  # the nibble 0 is -8, and no nibble is 8
    else:
        scale = np.full((len(blocks), 1), spread / _BYTE_SPREAD, "<f2")
        values = blocks[:, 2:].view(np.int8)
        np.maximum(values, -127, out=values)  # quantizing never gives -128
    blocks[:, :2] = scale.view(np.uint8)
    return blocks.reshape(count, tensor.row_bytes)
