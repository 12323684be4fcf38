"""The same weights as a GGUF file, so that llama.cpp can be measured on the same model.

Blocks of Q40 and Q80 are the same bytes as those of Q4_0 and Q8_0, and a `.m` file of the Llama architecture has rows of queries and keys
in the order that llama.cpp expects: bytes are copied, nothing is rounded. The vocabulary is made up, since only ids are exchanged.
"""

from pathlib import Path
from typing import Any

from dairllm.errors import ConfigError
from dairllm.formats.gguf import LIBRARY_ADVICE
from dairllm.formats.model_file import ModelFile
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.types import FloatType, RopeType

__all__ = ["gguf_twin"]

_OUTSIDE_LAYERS = {"embedding": "token_embd", "final_norm": "output_norm", "final_matmul_logits": "output"}
_IN_A_LAYER = {
    "block_matmul_q": "attn_q",
    "block_matmul_k": "attn_k",
    "block_matmul_v": "attn_v",
    "block_matmul_wo": "attn_output",
    "block_matmul_w1": "ffn_gate",
    "block_matmul_w2": "ffn_down",
    "block_matmul_w3": "ffn_up",
    "block_norm_0": "attn_norm",
    "block_norm_1": "ffn_norm",
}
"""GGUF's names of a layer's tensors."""

_TYPES = {FloatType.Q40: "Q4_0", FloatType.Q80: "Q8_0"}


def gguf_twin(source: Path, target: Path) -> None:
    """Write the twin of a `.m` file.

    Raises:
        ConfigError: it is a model that has no twin, or the `gguf` library is not installed.
        FormatError: `source` is no whole `.m` file.
        OSError: it cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"writing GGUF files needs the gguf library: {LIBRARY_ADVICE}") from error
    with ModelFile.open(source) as model:
        if model.spec.arch != Architecture.LLAMA or model.spec.rope_type != RopeType.LLAMA:
            raise ConfigError(f"{source}: llama.cpp can be measured on models of the Llama architecture with plain rope only")
        writer = gguf.GGUFWriter(target, "llama")
        _describe(writer, model.spec, gguf.TokenType.NORMAL)
        for tensor in model.tensors:
            name = _OUTSIDE_LAYERS.get(tensor.name) or f"blk.{tensor.layer}.{_IN_A_LAYER[tensor.name]}"
            values = tensor.float_type == FloatType.F32
            kind = None if values else gguf.GGMLQuantizationType[_TYPES[tensor.float_type]]
            writer.add_tensor(f"{name}.weight", model.array(tensor), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _describe(writer: Any, spec: ModelSpec, normal: Any) -> None:
    writer.add_name("twin")
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(spec.seq_len)
    writer.add_embedding_length(spec.dim)
    writer.add_block_count(spec.n_layers)
    writer.add_feed_forward_length(spec.hidden_dim)
    writer.add_head_count(spec.n_heads)
    writer.add_head_count_kv(spec.n_kv_heads)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.norm_epsilon)
    # llama.cpp wants a vocabulary in which every byte has a token; a byte-level one with made-up words for the rest
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + number) for number in range(256 - len(letters))]
    words = letters + [f"word{number}" for number in range(spec.vocab_size - len(letters))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([normal] * spec.vocab_size)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
