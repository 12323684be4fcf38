import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from dairllm.errors import FormatError
from dairllm.formats.gguf import GgufFile
from dairllm.formats.gguf_vocabulary import Vocabulary, read_vocabulary

MakeGguf = Callable[..., Path]

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = [chr(value) for value in PRINTABLE] + [chr(256 + place) for place in range(256 - len(PRINTABLE))]
"""GPT-2's stand-ins: first those that stand for themselves, then those for the other bytes from 0 on."""

SPECIALS_LAST = [*BYTES, "Ġhi", "hi", "unreachable", "<|begin_of_text|>", "<|eot_id|>", "<tool é>", "[PAD]"]
LAST_TYPES = [1] * 259 + [3, 3, 4, 5]
LAST = {
    "tokenizer.ggml.tokens": SPECIALS_LAST,
    "tokenizer.ggml.token_type": LAST_TYPES,
    "tokenizer.ggml.merges": ["h i", "Ġ hi"],
    "tokenizer.ggml.bos_token_id": 259,
    "tokenizer.ggml.eos_token_id": 260,
    "tokenizer.ggml.add_bos_token": True,
}

SENTENCE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": None,
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *[f"<0x{n:02X}>" for n in range(256)], "▁the", "▁", "a", "é", "<t▁>", "[PAD]"],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 4, 5],
    "tokenizer.ggml.scores": [0.0] * 259 + [-0.1, -1.0, -2.0, -3.0, -4.0, -5.0],
    "tokenizer.ggml.add_bos_token": None,
}


def read(make_gguf: MakeGguf, metadata: dict[str, Any] | None = None, n_rows: int = 1000) -> Vocabulary:
    with GgufFile.open(make_gguf(metadata=metadata or {})) as file:
        return read_vocabulary(file, n_rows)


def test_special_tokens_first(make_gguf: MakeGguf) -> None:
    """As in SmolLM2: the `.t` names its last id as bos_id, so that a distributed-llama root finds text below it."""
    vocabulary = read(make_gguf)
    file = vocabulary.file
    assert not vocabulary.warnings
    assert len(file.pieces) == 268
    assert (file.bos_id, file.add_bos, file.eos_ids) == (267, False, (2, 0))
    assert file.chat_template == "{{ messages[0]['content'] }}"
    assert file.pieces[:3] == (b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>")
    assert sorted(file.pieces[3:259]) == [bytes([value]) for value in range(256)]
    assert file.pieces[259:] == (b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b" world")
    # Scores: merges in their order, bytes 0, what no merge makes never.
    assert file.scores[259:] == tuple(-float(rank) for rank in range(9))
    assert set(file.scores[3:259]) == {0.0}
    assert set(file.scores[:3]) == {-1e10}
    assert file.max_token_length == 13


def test_tokenizer_json_has_the_same_tokens(make_gguf: MakeGguf) -> None:
    for metadata in ({}, LAST):
        vocabulary = read(make_gguf, metadata)
        assert vocabulary.json is not None
        tokenizer = Tokenizer.from_str(vocabulary.json)
        names = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
        assert sorted(names) == list(range(len(vocabulary.file.pieces)))
        added = tokenizer.get_added_tokens_decoder()
        for number, piece in enumerate(vocabulary.file.pieces):
            if number in added:
                assert added[number].content.encode() == piece
            elif piece.isascii():
                assert tokenizer.decode([number], skip_special_tokens=False).encode() == piece
    assert tokenizer.encode("hi hi<tool é><|eot_id|>[PAD]", add_special_tokens=False).ids[:4] == [257, 256, 261, 260]


def test_special_tokens_last(make_gguf: MakeGguf) -> None:
    file = read(make_gguf, LAST).file
    assert (file.bos_id, file.add_bos, file.eos_ids) == (259, True, (260,))
    assert file.pieces[256:] == (b" hi", b"hi", b"unreachable", b"<|begin_of_text|>", b"<|eot_id|>", "<tool é>".encode(), b"[PAD]")
    assert file.scores[256:259] == (-1.0, -0.0, -1e10)


@pytest.mark.parametrize(("metadata", "expected"), [({}, (259, False)), ({"tokenizer.ggml.bos_token_id": 5}, (259, False))])
def test_without_a_bos_the_first_of_the_last_special_tokens_stands_in(
    make_gguf: MakeGguf, metadata: dict[str, Any], expected: tuple[int, bool]
) -> None:
    changes = LAST | {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": False} | metadata
    file = read(make_gguf, changes).file
    assert (file.bos_id, file.add_bos) == expected


def test_llama_3_prompts_begin_with_bos_unless_the_file_says_otherwise(make_gguf: MakeGguf) -> None:
    changes = LAST | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": None}
    assert read(make_gguf, changes).file.add_bos
    assert not read(make_gguf, changes | {"tokenizer.ggml.add_bos_token": False}).file.add_bos


def test_an_unknown_pre_tokenizer_is_a_warning(make_gguf: MakeGguf) -> None:
    vocabulary = read(make_gguf, {"tokenizer.ggml.pre": "tekken"})
    assert vocabulary.json is None
    assert vocabulary.warnings == (
        "no tokenizer.json is written: its pre-tokenizer 'tekken' is not known; "
        "text is tokenized from the .t file alone, which is less exact",
    )
    assert len(vocabulary.file.pieces) == 268


def test_a_missing_pre_tokenizer_is_a_warning(make_gguf: MakeGguf) -> None:
    """Files before May 2024: llama.cpp warns, too. Llama 3's and Qwen's words are cut otherwise than the default."""
    vocabulary = read(make_gguf, {"tokenizer.ggml.pre": None})
    assert vocabulary.json is not None
    (warning,) = vocabulary.warnings
    assert "tokenizer.ggml.pre" in warning
    assert "the pre-tokenizer 'default' is used" in warning
    assert not read(make_gguf, {"tokenizer.ggml.pre": "default"}).warnings


def test_sentence_piece(make_gguf: MakeGguf) -> None:
    vocabulary = read(make_gguf, SENTENCE)
    file = vocabulary.file
    assert file.pieces[:6] == (b"<unk>", b"<s>", b"</s>", b"\0", b"\1", b"\2")
    assert file.pieces[258:] == (b"\xff", b" the", b" ", b"a", "é".encode(), "<t▁>".encode(), b"[PAD]")
    assert file.scores[259] == struct.unpack("<f", struct.pack("<f", -0.1))[0]
    assert (file.bos_id, file.add_bos, file.eos_ids) == (1, True, (2,))
    assert len(vocabulary.warnings) == 1
    assert "a distributed-llama root cannot use the .t file" in vocabulary.warnings[0]
    assert vocabulary.json is not None
    tokenizer = Tokenizer.from_str(vocabulary.json)
    assert tokenizer.encode("a é!<t▁>a", add_special_tokens=False).ids == [260, 261, 260, 262, 0x21 + 3, 263, 260, 261]


def test_a_sentence_piece_vocabulary_that_the_library_does_not_take(make_gguf: MakeGguf) -> None:
    twice = [*SENTENCE["tokenizer.ggml.tokens"][:-1], "a"]
    vocabulary = read(make_gguf, SENTENCE | {"tokenizer.ggml.tokens": twice})
    assert vocabulary.json is None
    assert vocabulary.warnings[0].startswith("no tokenizer.json is written: token 'a' comes twice in its vocabulary; text is tokenized")


def test_sentence_piece_without_bos_suits_distributed_llama(make_gguf: MakeGguf) -> None:
    file = read(make_gguf, SENTENCE | {"tokenizer.ggml.add_bos_token": False}).file
    assert (file.bos_id, file.add_bos) == (263, False)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "a vocabulary of the kind gpt2 or llama.*found bert"),
        ({"tokenizer.ggml.model": None}, "metadata tokenizer.ggml.model"),
        ({"tokenizer.ggml.merges": None}, "metadata tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["h e", "hello"]}, "two tokens and a space between them as merge 1, found 'hello'"),
        ({"tokenizer.ggml.token_type": [1, 1]}, r"as many types as tokens \(268\), found 2"),
        ({"tokenizer.ggml.eos_token_id": 268}, "eos_token_id below 268, found 268"),
        ({"tokenizer.ggml.tokens": ["a", "", "b"], "tokenizer.ggml.token_type": [1, 1, 1]}, "bytes of token 1, found none"),
        (SENTENCE | {"tokenizer.ggml.scores": [float("inf")] * 265}, "a number as the score of token 0, found inf"),
        (SENTENCE | {"tokenizer.ggml.scores": [0.0] * 264 + [float("nan")]}, "a number as the score of token 264, found nan"),
        ({"tokenizer.ggml.token_type": [float("nan")] * 268}, "a list of integers as tokenizer.ggml.token_type, found .nan, nan"),
        ({"tokenizer.ggml.model": "\x1b[2J" * 100}, r"found \\x1b\[2J\\x1b\[2J"),
        (SENTENCE | {"tokenizer.ggml.scores": [0.0]}, r"as many scores as tokens \(265\), found 1"),
    ],
)
def test_what_is_no_vocabulary(make_gguf: MakeGguf, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read(make_gguf, metadata)


def test_more_tokens_than_rows(make_gguf: MakeGguf) -> None:
    with pytest.raises(FormatError, match="from 1 to 267 tokens, the rows of the embedding, found 268"):
        read(make_gguf, n_rows=267)
    assert len(read(make_gguf, n_rows=300).file.pieces) == 268
