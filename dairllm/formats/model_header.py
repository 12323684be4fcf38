"""The header of a `.m` file: i32 magic, i32 size of the header in bytes, then (i32 key, i32 value) pairs, little-endian.

The format is distributed-llama's; Q80 weights are ours (its C++ program reads F32 and Q40). A header is believed only if every number lies
within bounds that no known model comes near, and all of them agree with each other: sizes, memory and loops follow from them.
"""

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from dairllm.errors import FormatError
from dairllm.formats.file_kind import kind_of
from dairllm.graph.model import Architecture, HiddenAct, ModelSpec
from dairllm.graph.types import BLOCK_VALUES, FloatType, RopeType

__all__ = ["MAX_HEADER_BYTES", "MODEL_MAGIC", "PREFIX_BYTES", "WEIGHT_TYPES", "Header", "HeaderKey", "encode_header", "parse_header"]

MODEL_MAGIC = 0x0A00ABCD
_OLD_MAGICS = (0xABCD00, 0xABCD01)

WEIGHT_TYPES = (FloatType.F32, FloatType.Q40, FloatType.Q80)
"""What matmul weights are stored as; the embedding, the norms and the MoE gate are F32 always."""

_PREFIX = struct.Struct("<ii")  # magic, header size; also the layout of a pair: key, value
PREFIX_BYTES = _PREFIX.size


class HeaderKey(IntEnum):
    VERSION = 0
    ARCH = 1
    DIM = 2
    HIDDEN_DIM = 3
    N_LAYERS = 4
    N_HEADS = 5
    N_KV_HEADS = 6
    N_EXPERTS = 7
    N_ACTIVE_EXPERTS = 8
    VOCAB_SIZE = 9
    SEQ_LEN = 10
    HIDDEN_ACT = 11
    ROPE_THETA = 12
    WEIGHT_TYPE = 13
    ROPE_SCALING_FACTOR = 14
    ROPE_LOW_FREQ_FACTOR = 15
    ROPE_HIGH_FREQ_FACTOR = 16
    ROPE_ORIG_MAX_SEQ_LEN = 17
    ROPE_TYPE = 18
    HEAD_DIM = 19
    NORM_EPSILON = 20
    MOE_HIDDEN_DIM = 21


MAX_HEADER_BYTES = PREFIX_BYTES * (1 + len(HeaderKey))
"""No key may come twice."""

_INT_MAX = 2**31 - 1
_BOUNDS = {
    HeaderKey.VERSION: (0, 0),
    HeaderKey.DIM: (1, 2**20),
    HeaderKey.HIDDEN_DIM: (0, 2**22),
    HeaderKey.N_LAYERS: (1, 1024),
    HeaderKey.N_HEADS: (1, 2**14),
    HeaderKey.N_KV_HEADS: (1, 2**14),
    HeaderKey.N_EXPERTS: (0, 4096),
    HeaderKey.N_ACTIVE_EXPERTS: (0, 4096),
    HeaderKey.VOCAB_SIZE: (1, 2**24),
    HeaderKey.SEQ_LEN: (1, 2**24),
    HeaderKey.ROPE_THETA: (1, _INT_MAX),
    HeaderKey.ROPE_SCALING_FACTOR: (1, 2**16),
    HeaderKey.ROPE_LOW_FREQ_FACTOR: (0, 2**16),
    HeaderKey.ROPE_HIGH_FREQ_FACTOR: (0, 2**16),
    HeaderKey.ROPE_ORIG_MAX_SEQ_LEN: (0, 2**24),
    HeaderKey.HEAD_DIM: (0, 2**14),
    HeaderKey.MOE_HIDDEN_DIM: (0, 2**22),
}
_CHOICES: dict[HeaderKey, dict[int, str]] = {
    HeaderKey.ARCH: {arch: arch.name.lower() for arch in Architecture},
    HeaderKey.HIDDEN_ACT: {act: act.name.lower() for act in HiddenAct},
    HeaderKey.WEIGHT_TYPE: {float_type: float_type.name for float_type in WEIGHT_TYPES},
    HeaderKey.ROPE_TYPE: {rope: rope.name.lower() for rope in RopeType},
    HeaderKey.NORM_EPSILON: {5: "1e-5", 6: "1e-6"},
}
_REQUIRED = (
    HeaderKey.ARCH,
    HeaderKey.DIM,
    HeaderKey.HIDDEN_DIM,
    HeaderKey.N_LAYERS,
    HeaderKey.N_HEADS,
    HeaderKey.N_KV_HEADS,
    HeaderKey.VOCAB_SIZE,
    HeaderKey.SEQ_LEN,
    HeaderKey.WEIGHT_TYPE,
)
_DEFAULTS = {
    HeaderKey.N_EXPERTS: 0,
    HeaderKey.N_ACTIVE_EXPERTS: 0,
    HeaderKey.HIDDEN_ACT: HiddenAct.SILU,
    HeaderKey.ROPE_THETA: 10000,
    HeaderKey.ROPE_SCALING_FACTOR: 1,
    HeaderKey.ROPE_LOW_FREQ_FACTOR: 0,
    HeaderKey.ROPE_HIGH_FREQ_FACTOR: 0,
    HeaderKey.ROPE_ORIG_MAX_SEQ_LEN: 0,
    HeaderKey.ROPE_TYPE: RopeType.LLAMA,
    HeaderKey.HEAD_DIM: 0,
    HeaderKey.NORM_EPSILON: 5,
    HeaderKey.MOE_HIDDEN_DIM: 0,
}
_MAX_EXPERT_BLOCKS = 2**17
"""Experts of all layers together: each is three tensors that are kept track of."""


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; tensors follow from byte `nbytes`."""

    spec: ModelSpec
    nbytes: int


def parse_header(path: str | Path, data: bytes, file_bytes: int) -> Header:
    """Read and check the header of a `.m` file.

    Args:
        path: the file, for messages.
        data: its first `MAX_HEADER_BYTES` bytes, or all where it is shorter.
        file_bytes: its length.

    Raises:
        FormatError: it is no such file, or the header contradicts itself.
    """
    kind = kind_of(Path(path), data)
    if kind is not None and not data.startswith(_PREFIX.pack(MODEL_MAGIC, 0)[:4]):
        raise FormatError(path, None, "a .m model file", kind)
    if len(data) < PREFIX_BYTES:
        raise FormatError(path, 0, f"a .m file's magic and header size ({PREFIX_BYTES} bytes)", f"a file of {file_bytes} bytes")
    magic, nbytes = _PREFIX.unpack_from(data)
    if magic in _OLD_MAGICS:
        raise FormatError(path, 0, f"magic {MODEL_MAGIC:#010x}", f"{magic:#x}, an old .m format that is no longer read")
    if magic != MODEL_MAGIC:
        raise FormatError(path, 0, f"magic {MODEL_MAGIC:#010x} of a .m model file", f"{magic & 0xFFFFFFFF:#010x}")
    if not PREFIX_BYTES <= nbytes <= MAX_HEADER_BYTES or nbytes % PREFIX_BYTES:
        raise FormatError(path, 4, f"a header size that is a multiple of {PREFIX_BYTES} and at most {MAX_HEADER_BYTES}", str(nbytes))
    if len(data) < nbytes:
        raise FormatError(path, len(data), f"a header of {nbytes} bytes", "the end of the file")
    values, offsets = _read_pairs(path, data, nbytes)
    for key in _REQUIRED:
        if key not in values:
            raise FormatError(path, nbytes, f"header key {key.value} ({_name(key)})", "the end of the header")
    for key, value in _DEFAULTS.items():
        values.setdefault(key, value)
    spec = _spec(path, values)
    _check(path, spec, offsets)
    return Header(spec, nbytes)


def encode_header(path: str | Path, spec: ModelSpec) -> bytes:
    """The header that says `spec`. `path` is for messages.

    Raises:
        FormatError: `spec` cannot be said in integers, or would be refused by `parse_header`.
    """
    values = {
        HeaderKey.VERSION: 0,
        HeaderKey.ARCH: spec.arch,
        HeaderKey.DIM: spec.dim,
        HeaderKey.HIDDEN_DIM: spec.hidden_dim,
        HeaderKey.N_LAYERS: spec.n_layers,
        HeaderKey.N_HEADS: spec.n_heads,
        HeaderKey.N_KV_HEADS: spec.n_kv_heads,
        HeaderKey.N_EXPERTS: spec.n_experts,
        HeaderKey.N_ACTIVE_EXPERTS: spec.n_active_experts,
        HeaderKey.VOCAB_SIZE: spec.vocab_size,
        HeaderKey.SEQ_LEN: spec.seq_len,
        HeaderKey.HIDDEN_ACT: spec.hidden_act,
        HeaderKey.ROPE_THETA: _integer(path, "rope theta", spec.rope_theta),
        HeaderKey.WEIGHT_TYPE: spec.weight_type,
        HeaderKey.ROPE_TYPE: spec.rope_type,
        HeaderKey.HEAD_DIM: spec.head_dim,
        HeaderKey.NORM_EPSILON: _epsilon_code(path, spec.norm_epsilon),
    }
    if spec.rope_scaling_factor != 1:
        values[HeaderKey.ROPE_SCALING_FACTOR] = _integer(path, "rope scaling factor", spec.rope_scaling_factor)
        values[HeaderKey.ROPE_LOW_FREQ_FACTOR] = _integer(path, "rope low frequency factor", spec.rope_low_freq_factor)
        values[HeaderKey.ROPE_HIGH_FREQ_FACTOR] = _integer(path, "rope high frequency factor", spec.rope_high_freq_factor)
        values[HeaderKey.ROPE_ORIG_MAX_SEQ_LEN] = spec.rope_orig_max_seq_len
    if spec.moe_hidden_dim:
        values[HeaderKey.MOE_HIDDEN_DIM] = spec.moe_hidden_dim
    nbytes = PREFIX_BYTES * (1 + len(values))
    for key, value in values.items():
        if not -_INT_MAX <= value <= _INT_MAX:
            raise FormatError(path, None, f"{_name(key)} of at most {_INT_MAX}, the largest number of a .m header", str(value))
    data = _PREFIX.pack(MODEL_MAGIC, nbytes) + b"".join(_PREFIX.pack(key, value) for key, value in values.items())
    parse_header(path, data, nbytes)
    return data


def _read_pairs(path: str | Path, data: bytes, nbytes: int) -> tuple[dict[HeaderKey, int], dict[HeaderKey, int]]:
    """Values by key, each within its bounds, and the offset of each."""
    values: dict[HeaderKey, int] = {}
    offsets: dict[HeaderKey, int] = {}
    for at in range(PREFIX_BYTES, nbytes, PREFIX_BYTES):
        number, value = _PREFIX.unpack_from(data, at)
        try:
            key = HeaderKey(number)
        except ValueError:
            raise FormatError(path, at, f"a header key from 0 to {max(HeaderKey).value}", str(number)) from None
        if key in values:
            raise FormatError(path, at, f"each header key once ({_name(key)} stands at byte {offsets[key] - 4})", f"key {number} again")
        if key in _CHOICES and value not in _CHOICES[key]:
            known = ", ".join(f"{number} ({name})" for number, name in _CHOICES[key].items())
            raise FormatError(path, at + 4, f"{_name(key)} that is one of {known}", str(value))
        if key in _BOUNDS:
            low, high = _BOUNDS[key]
            if not low <= value <= high:
                raise FormatError(path, at + 4, f"{_name(key)} {low}" if low == high else f"{_name(key)} from {low} to {high}", str(value))
        values[key], offsets[key] = value, at + 4
    return values, offsets


def _spec(path: str | Path, values: dict[HeaderKey, int]) -> ModelSpec:
    arch = Architecture(values[HeaderKey.ARCH])
    dim, n_heads, head_dim = values[HeaderKey.DIM], values[HeaderKey.N_HEADS], values[HeaderKey.HEAD_DIM]
    if not head_dim:
        if dim % n_heads:
            raise FormatError(path, None, "n_heads that divides dim, since there is no head_dim", f"dim {dim}, n_heads {n_heads}")
        head_dim = dim // n_heads
    return ModelSpec(
        arch=arch,
        dim=dim,
        hidden_dim=values[HeaderKey.HIDDEN_DIM],
        n_layers=values[HeaderKey.N_LAYERS],
        n_heads=n_heads,
        n_kv_heads=values[HeaderKey.N_KV_HEADS],
        head_dim=head_dim,
        vocab_size=values[HeaderKey.VOCAB_SIZE],
        seq_len=values[HeaderKey.SEQ_LEN],
        weight_type=FloatType(values[HeaderKey.WEIGHT_TYPE]),
        hidden_act=HiddenAct(values[HeaderKey.HIDDEN_ACT]),
        norm_epsilon={5: 1e-5, 6: 1e-6}[values[HeaderKey.NORM_EPSILON]],
        rope_type=RopeType(values[HeaderKey.ROPE_TYPE]) if arch == Architecture.LLAMA else RopeType.FALCON,
        rope_theta=float(values[HeaderKey.ROPE_THETA]),
        rope_scaling_factor=float(values[HeaderKey.ROPE_SCALING_FACTOR]),
        rope_low_freq_factor=float(values[HeaderKey.ROPE_LOW_FREQ_FACTOR]),
        rope_high_freq_factor=float(values[HeaderKey.ROPE_HIGH_FREQ_FACTOR]),
        rope_orig_max_seq_len=values[HeaderKey.ROPE_ORIG_MAX_SEQ_LEN],
        n_experts=values[HeaderKey.N_EXPERTS],
        n_active_experts=values[HeaderKey.N_ACTIVE_EXPERTS],
        moe_hidden_dim=values[HeaderKey.MOE_HIDDEN_DIM],
    )


def _check(path: str | Path, spec: ModelSpec, offsets: dict[HeaderKey, int]) -> None:
    """Raise FormatError where numbers that are fine alone contradict each other."""

    def refuse(key: HeaderKey, expected: str, found: str) -> FormatError:
        return FormatError(path, offsets.get(key), expected, found)

    if spec.n_heads % spec.n_kv_heads:
        raise refuse(HeaderKey.N_KV_HEADS, "n_kv_heads that divides n_heads", f"n_heads {spec.n_heads}, n_kv_heads {spec.n_kv_heads}")
    if spec.head_dim % 2 or not spec.head_dim:
        raise refuse(HeaderKey.HEAD_DIM, "an even head_dim (rotary pairs)", str(spec.head_dim))
    if spec.q_dim > _BOUNDS[HeaderKey.HIDDEN_DIM][1]:
        raise refuse(HeaderKey.HEAD_DIM, f"n_heads * head_dim of at most {_BOUNDS[HeaderKey.HIDDEN_DIM][1]}", str(spec.q_dim))
    if spec.arch == Architecture.QWEN3_MOE:
        if not 1 <= spec.n_active_experts <= spec.n_experts:
            found = f"n_experts {spec.n_experts}, n_active_experts {spec.n_active_experts}"
            raise refuse(HeaderKey.N_ACTIVE_EXPERTS, "n_active_experts from 1 to n_experts", found)
        if not spec.moe_hidden_dim:
            raise refuse(HeaderKey.MOE_HIDDEN_DIM, "a moe_hidden_dim, since there are experts", "0 or none")
        if spec.n_layers * spec.n_experts > _MAX_EXPERT_BLOCKS:
            found = f"{spec.n_layers} layers of {spec.n_experts}"
            raise refuse(HeaderKey.N_EXPERTS, f"at most {_MAX_EXPERT_BLOCKS} experts in all layers", found)
    else:
        if spec.n_experts or spec.n_active_experts:
            found = f"n_experts {spec.n_experts}, n_active_experts {spec.n_active_experts}"
            raise refuse(HeaderKey.N_EXPERTS, f"no experts in a model of architecture {spec.arch.name.lower()}", found)
        if not spec.hidden_dim:
            raise refuse(HeaderKey.HIDDEN_DIM, "a hidden_dim", "0")
    if spec.rope_scaling_factor != 1 and not (spec.rope_high_freq_factor > spec.rope_low_freq_factor >= 1 and spec.rope_orig_max_seq_len):
        found = (
            f"factor {spec.rope_scaling_factor:.0f}, low {spec.rope_low_freq_factor:.0f}, "
            f"high {spec.rope_high_freq_factor:.0f}, original length {spec.rope_orig_max_seq_len}"
        )
        raise refuse(HeaderKey.ROPE_SCALING_FACTOR, "rope scaling with high factor > low factor >= 1 and an original length", found)
    if spec.weight_type != FloatType.F32:
        for name, key, width in (
            ("dim", HeaderKey.DIM, spec.dim),
            ("n_heads * head_dim", HeaderKey.N_HEADS, spec.q_dim),
            ("moe_hidden_dim" if spec.n_experts else "hidden_dim", HeaderKey.HIDDEN_DIM, spec.ff_dim),
        ):
            if width % BLOCK_VALUES:
                expected = f"{name} that is a multiple of {BLOCK_VALUES}, the values of a {spec.weight_type.name} block"
                raise refuse(key, expected, str(width))


def _name(key: HeaderKey) -> str:
    return key.name.lower()


def _integer(path: str | Path, what: str, value: float) -> int:
    if not math.isfinite(value) or value != int(value):
        raise FormatError(path, None, f"a {what} that a .m header can say (a whole number)", repr(value))
    return int(value)


def _epsilon_code(path: str | Path, epsilon: float) -> int:
    codes = {1e-5: 5, 1e-6: 6}
    if epsilon not in codes:
        raise FormatError(path, None, "a norm epsilon that a .m header can say (1e-5 or 1e-6)", repr(epsilon))
    return codes[epsilon]
