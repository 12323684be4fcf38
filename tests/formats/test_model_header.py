import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.errors import FormatError
from dairllm.formats.model_header import MAX_HEADER_BYTES, MODEL_MAGIC, HeaderKey, encode_header, parse_header
from dairllm.formats.random_model import small_spec
from dairllm.graph.model import Architecture, HiddenAct, ModelSpec
from dairllm.graph.types import FloatType, RopeType

PATH = Path("some.m")
PAIRS = {
    HeaderKey.VERSION: 0,
    HeaderKey.ARCH: Architecture.LLAMA,
    HeaderKey.DIM: 64,
    HeaderKey.HIDDEN_DIM: 128,
    HeaderKey.N_LAYERS: 2,
    HeaderKey.N_HEADS: 4,
    HeaderKey.N_KV_HEADS: 2,
    HeaderKey.VOCAB_SIZE: 320,
    HeaderKey.SEQ_LEN: 256,
    HeaderKey.WEIGHT_TYPE: FloatType.Q40,
}
MOE = {HeaderKey.ARCH: Architecture.QWEN3_MOE, HeaderKey.N_EXPERTS: 8, HeaderKey.N_ACTIVE_EXPERTS: 2, HeaderKey.MOE_HIDDEN_DIM: 64}


def pack(pairs: list[tuple[int, int]], magic: int = MODEL_MAGIC, size: int | None = None) -> bytes:
    data = b"".join(struct.pack("<ii", *pair) for pair in pairs)
    return struct.pack("<ii", magic, 8 + len(data) if size is None else size) + data


def parse(changes: dict[HeaderKey, int | None] | None = None) -> ModelSpec:
    """The spec of a header that is fine but for `changes`; None leaves a key out."""
    pairs = [(key, value) for key, value in (PAIRS | (changes or {})).items() if value is not None]
    data = pack(pairs)
    return parse_header(PATH, data, len(data)).spec


def refusal(data: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse_header(PATH, data, len(data))
    return caught.value


def test_what_is_not_said_has_a_default() -> None:
    spec = parse()
    assert spec == small_spec()
    assert (spec.hidden_act, spec.rope_type, spec.rope_theta, spec.norm_epsilon) == (HiddenAct.SILU, RopeType.LLAMA, 10000.0, 1e-5)
    assert (spec.head_dim, spec.rope_scaling_factor, spec.n_experts) == (16, 1.0, 0)


def test_a_head_dim_of_zero_is_none() -> None:
    assert parse({HeaderKey.HEAD_DIM: 0}).head_dim == 16


@pytest.mark.parametrize("arch", [Architecture.QWEN3, Architecture.QWEN3_MOE])
def test_qwen3_has_the_falcon_rope_whatever_its_header_says(arch: Architecture) -> None:
    changes = MOE | {HeaderKey.ARCH: arch} if arch == Architecture.QWEN3_MOE else {HeaderKey.ARCH: arch}
    assert parse(changes | {HeaderKey.ROPE_TYPE: RopeType.LLAMA}).rope_type == RopeType.FALCON


@pytest.mark.parametrize("weight_type", [FloatType.F32, FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("arch", list(Architecture))
def test_what_is_encoded_is_parsed(arch: Architecture, weight_type: FloatType) -> None:
    spec = small_spec(arch, weight_type, n_layers=3, hidden_act=HiddenAct.GELU)
    header = parse_header(PATH, data := encode_header(PATH, spec), len(data))
    assert (header.spec, header.nbytes) == (spec, len(data))


def test_rope_scaling_is_encoded() -> None:
    spec = small_spec(
        rope_type=RopeType.LLAMA3_1,
        rope_scaling_factor=32.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_orig_max_seq_len=8192,
    )
    data = encode_header(PATH, spec)
    assert parse_header(PATH, data, len(data)).spec == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 10000.5}, "a rope theta that a .m header can say"),
        ({"rope_theta": float("inf")}, "a rope theta that a .m header can say"),
        ({"rope_theta": float("nan")}, "a rope theta that a .m header can say"),
        ({"rope_theta": 3580165449.0}, "rope_theta of at most 2147483647, the largest number of a .m header, found 3580165449"),
        ({"norm_epsilon": 1e-4}, "a norm epsilon that a .m header can say"),
        ({"rope_scaling_factor": 1.5}, "a rope scaling factor that a .m header can say"),
        ({"vocab_size": 2**40}, "vocab_size of at most 2147483647"),
        ({"dim": 2**30, "n_heads": 2**10}, "dim from 1 to"),
        ({"n_kv_heads": 3}, "n_kv_heads that divides n_heads"),
    ],
)
def test_what_cannot_be_said_is_not_encoded(changes: dict[str, float], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        encode_header(PATH, replace(small_spec(), **changes))


def test_another_file_is_named_as_such() -> None:
    error = refusal(b"GGUF" + bytes(100))
    assert error.path == PATH
    assert f"expected a .m model file, found a GGUF file: dairllm convert {PATH} " in str(error)
    assert "magic 0x0a00abcd of a .m model file, found 0x464f4f47" in str(refusal(b"GOOF" + bytes(100)))


@pytest.mark.parametrize("magic", [0xABCD00, 0xABCD01])
def test_the_old_format_is_named(magic: int) -> None:
    assert "an old .m format that is no longer read" in str(refusal(pack(list(PAIRS.items()), magic=magic)))


def test_truncation_at_every_byte() -> None:
    whole = pack(list(PAIRS.items()))
    for length in range(len(whole)):
        error = refusal(whole[:length])
        assert error.offset is not None
        assert error.offset <= length


@pytest.mark.parametrize("size", [-1, 0, 7, 12, 192, 2**31 - 1])
def test_an_absurd_header_size(size: int) -> None:
    error = refusal(pack(list(PAIRS.items()), size=size))
    assert error.offset == 4
    assert str(size) in error.found


@pytest.mark.parametrize("size", [8, 16, 80])
def test_a_header_size_that_leaves_keys_out(size: int) -> None:
    assert "header key" in refusal(pack(list(PAIRS.items()), size=size)).expected


def test_an_unknown_key() -> None:
    error = refusal(pack([*PAIRS.items(), (22, 1)]))
    assert (error.offset, error.expected, error.found) == (88, "a header key from 0 to 21", "22")


def test_a_key_that_comes_twice() -> None:
    error = refusal(pack([*PAIRS.items(), (HeaderKey.DIM, 128)]))
    assert (error.offset, error.found) == (88, "key 2 again")
    assert "dim stands at byte 24" in error.expected


@pytest.mark.parametrize("key", [key for key in PAIRS if key != HeaderKey.VERSION])
def test_a_missing_key(key: HeaderKey) -> None:
    with pytest.raises(FormatError, match=rf"header key {key.value} \({key.name.lower()}\)"):
        parse({key: None})


@pytest.mark.parametrize("value", [-(2**31), -1, 2**31 - 1])
@pytest.mark.parametrize("key", list(HeaderKey))
def test_absurd_values_are_named_with_their_offset(key: HeaderKey, value: int) -> None:
    if key == HeaderKey.ROPE_THETA and value > 0:
        return  # any positive number will do
    others = [(other, number) for other, number in PAIRS.items() if other != key]
    error = refusal(pack([(key, value), *others]))
    assert error.offset == 12
    assert key.name.lower() in error.expected
    assert error.found == str(value)


def test_f16_weights_are_refused() -> None:
    with pytest.raises(FormatError, match=r"weight_type that is one of 0 \(F32\), 2 \(Q40\), 3 \(Q80\), found 1"):
        parse({HeaderKey.WEIGHT_TYPE: FloatType.F16})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({HeaderKey.N_KV_HEADS: 3}, "n_kv_heads that divides n_heads, found n_heads 4, n_kv_heads 3"),
        ({HeaderKey.N_HEADS: 5, HeaderKey.N_KV_HEADS: 5}, "n_heads that divides dim"),
        ({HeaderKey.HEAD_DIM: 15}, "an even head_dim"),
        ({HeaderKey.N_HEADS: 64, HeaderKey.N_KV_HEADS: 64}, "an even head_dim"),
        ({HeaderKey.HEAD_DIM: 2**14, HeaderKey.N_HEADS: 2**14}, r"n_heads \* head_dim of at most"),
        ({HeaderKey.DIM: 72}, "dim that is a multiple of 32"),
        ({HeaderKey.HIDDEN_DIM: 100}, "hidden_dim that is a multiple of 32"),
        ({HeaderKey.HEAD_DIM: 18}, r"n_heads \* head_dim that is a multiple of 32"),
        ({HeaderKey.HIDDEN_DIM: 0}, "a hidden_dim, found 0"),
        ({HeaderKey.N_EXPERTS: 8, HeaderKey.N_ACTIVE_EXPERTS: 2}, "no experts in a model of architecture llama"),
        (MOE | {HeaderKey.N_ACTIVE_EXPERTS: 9}, "n_active_experts from 1 to n_experts"),
        (MOE | {HeaderKey.N_ACTIVE_EXPERTS: 0}, "n_active_experts from 1 to n_experts"),
        (MOE | {HeaderKey.MOE_HIDDEN_DIM: None}, "a moe_hidden_dim"),
        (MOE | {HeaderKey.MOE_HIDDEN_DIM: 48}, "moe_hidden_dim that is a multiple of 32"),
        (MOE | {HeaderKey.N_EXPERTS: 4096, HeaderKey.N_LAYERS: 1024}, "at most 131072 experts in all layers"),
        ({HeaderKey.ROPE_SCALING_FACTOR: 8}, "rope scaling with high factor > low factor >= 1"),
        (
            {
                HeaderKey.ROPE_SCALING_FACTOR: 8,
                HeaderKey.ROPE_LOW_FREQ_FACTOR: 4,
                HeaderKey.ROPE_HIGH_FREQ_FACTOR: 4,
                HeaderKey.ROPE_ORIG_MAX_SEQ_LEN: 8192,
            },
            "found factor 8, low 4, high 4, original length 8192",
        ),
    ],
)
def test_contradictions(changes: dict[HeaderKey, int | None], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(changes)


def test_f32_weights_need_no_whole_blocks() -> None:
    assert parse({HeaderKey.WEIGHT_TYPE: FloatType.F32, HeaderKey.DIM: 72, HeaderKey.HIDDEN_DIM: 100}).head_dim == 18


@given(st.binary(max_size=MAX_HEADER_BYTES))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_header_or_a_format_error(data: bytes) -> None:
    for candidate in (data, struct.pack("<ii", MODEL_MAGIC, 8 + len(data) // 8 * 8) + data):
        with suppress(FormatError):
            parse_header(PATH, candidate[:MAX_HEADER_BYTES], len(candidate))


UNUSED_ROPE = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_orig_max_seq_len")
"""Not written where there is no scaling."""


@given(st.dictionaries(st.sampled_from(list(HeaderKey)), st.one_of(st.integers(0, 64), st.integers(-(2**31), 2**31 - 1))))
@settings(max_examples=300, deadline=None)
def test_any_values_are_a_header_or_a_format_error(changes: dict[HeaderKey, int]) -> None:
    try:
        spec = parse(changes)
    except FormatError:
        return
    data = encode_header(PATH, spec)
    unused = {} if spec.rope_scaling_factor != 1 else dict.fromkeys(UNUSED_ROPE, 0)
    assert parse_header(PATH, data, len(data)).spec == replace(spec, **unused)
