"""A small GGUF file of the architecture llama, every part of which can be changed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld"]


def byte_characters() -> list[str]:
    """GPT-2's stand-ins of all bytes, in its order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(value) for value in printable] + [chr(256 + place) for place in range(256 - len(printable))]


TOKENS = [*SPECIAL, *byte_characters(), *[merge.replace(" ", "") for merge in MERGES]]
TYPES = [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL))

METADATA: dict[str, Any] = {
    "llama.context_length": 512,
    "llama.embedding_length": DIM,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.rope.freq_base": 100000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}


def tensor_values(vocab: int = len(TOKENS)) -> dict[str, np.ndarray]:
    """All tensors of the file, by GGUF's names."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, DIM), "output_norm.weight": (DIM,), "output.weight": (vocab, DIM)}
    for layer in range(LAYERS):
        for name, shape in {
            "attn_q": (HEADS * HEAD_DIM, DIM),
            "attn_k": (KV_HEADS * HEAD_DIM, DIM),
            "attn_v": (KV_HEADS * HEAD_DIM, DIM),
            "attn_output": (DIM, HEADS * HEAD_DIM),
            "ffn_gate": (HIDDEN, DIM),
            "ffn_down": (DIM, HIDDEN),
            "ffn_up": (HIDDEN, DIM),
            "attn_norm": (DIM,),
            "ffn_norm": (DIM,),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    random = np.random.default_rng(3)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    *,
    arch: str = "llama",
    weight: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    blocks: Mapping[str, np.ndarray] | None = None,
    block_types: Mapping[str, str] | None = None,
) -> Path:
    """Write the file; matrices as `weight` says. What `metadata` and `tensors` name is changed, or left out where it is None.

    `blocks` are tensors of the type `weight`, or what `block_types` says, as they are to be stored: uint8 [rows, row_bytes].
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (METADATA | dict(metadata or {})).items():
        if value is None:
            continue
        add: dict[type, Callable[[str, Any], None]] = {
            str: writer.add_string,
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    kind = gguf.GGMLQuantizationType[weight]
    for name, values in (tensor_values() | dict(tensors or {})).items():
        if values is None:
            continue
        if blocks and name in blocks:
            writer.add_tensor(name, blocks[name], raw_dtype=gguf.GGMLQuantizationType[(block_types or {}).get(name, weight)])
        elif values.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    """`make_gguf(weight="Q4_0", metadata={...}, tensors={...})` writes the file and gives its path; see `write_gguf`."""

    def make(**changes: Any) -> Path:
        return write_gguf(tmp_path / "source.gguf", **changes)

    return make


@pytest.fixture(scope="session")
def gguf_values() -> dict[str, np.ndarray]:
    """What the file's tensors are made of."""
    return tensor_values()
