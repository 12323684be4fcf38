"""A SentencePiece vocabulary, by its `tokenizer.json` and from the `.t` alone: ids are sentencepiece's (tests/data/sentence_piece.json)."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dairllm.formats.gguf import GgufFile
from dairllm.formats.gguf_vocabulary import read_vocabulary
from dairllm.formats.random_model import byte_vocabulary
from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.text.greedy_merging import special_ids
from dairllm.text.sentence_merging import SentenceMerging, first_byte_token
from dairllm.text.tokenizer import Tokenizer

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent.parent / "data" / "sentence_piece.json").read_text(encoding="utf-8"))
BYTES = [bytes([value]) for value in range(256)]
USER_DEFINED = [4 if token in (3, 4) else kind for token, kind in enumerate(RECORDED["types"])]
"""The types, where <start_of_turn> and <end_of_turn> are taken whole."""


def write(folder: Path, types: list[int], **metadata: bool) -> Path:
    """The vocabulary's GGUF file becomes a `.t` and a `tokenizer.json`; returns the `.t`."""
    writer = gguf.GGUFWriter(folder / "v.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(RECORDED["tokens"])
    writer.add_token_scores(list(map(float, RECORDED["scores"])))
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    for name, value in metadata.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with GgufFile.open(folder / "v.gguf") as file:
        vocabulary = read_vocabulary(file, 512)
    assert vocabulary.json is not None
    (folder / "tokenizer.json").write_text(vocabulary.json, encoding="utf-8")
    vocabulary.file.write(folder / "v.t")
    return folder / "v.t"


def wrong(tokenizer: Tokenizer, texts: dict[str, list[int]]) -> dict[str, list[int]]:
    found = {text: tokenizer.encode(text) for text in texts}
    return {text: ids for text, ids in found.items() if ids != texts[text]}


@pytest.mark.parametrize("encoder", ["tokenizer.json", ".t"])
def test_ids_are_those_of_sentencepiece(tmp_path: Path, encoder: str) -> None:
    path = write(tmp_path, USER_DEFINED)
    if encoder == ".t":
        path.with_name("tokenizer.json").unlink()
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encoder == encoder
    assert not wrong(tokenizer, RECORDED["ids"] | RECORDED["user_defined"])
    assert tokenizer.encode("Hello the world") == [426, 496, 369, 383, 288, 324, 275, 435, 437]


def test_normal_tokens_are_not_taken_whole(tmp_path: Path) -> None:
    """As many files have it: <end_of_turn> is no special token there, and no merges lead to it."""
    tokenizer = Tokenizer.load(write(tmp_path, RECORDED["types"]))
    assert not wrong(tokenizer, RECORDED["ids"])
    assert 4 not in tokenizer.encode("a<end_of_turn>")


def test_no_space_before_the_first_word(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, USER_DEFINED, add_space_prefix=False))
    assert tokenizer.decode(tokenizer.encode("the")) == "the"
    assert tokenizer.encode(" Hello the world") == [426, 496, 369, 383, 288, 324, 275, 435, 437]


@pytest.mark.parametrize("encoder", ["tokenizer.json", ".t"])
def test_a_space_after_a_special_token(tmp_path: Path, encoder: str) -> None:
    path = write(tmp_path, USER_DEFINED)
    if encoder == ".t":
        path.with_name("tokenizer.json").unlink()
    tokenizer = Tokenizer.load(path)
    the = tokenizer.encode("the")
    assert tokenizer.encode("<s>the</s>the<end_of_turn>") == [1, *the, 2, *the, 4]
    assert tokenizer.encode("<s>") == [1]
    assert tokenizer.encode("") == []


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path, USER_DEFINED)
    path.with_name("tokenizer.json").unlink()
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode(b"a\xff\xc3 ".decode("utf-8", "surrogateescape"))
    assert ids == [*tokenizer.encode("a"), 5 + 0xFF, 5 + 0xC3, 426]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<")))
def test_text_comes_back_with_a_space_before_it(text: str) -> None:
    pieces = [b"<unk>", *BYTES, b" ", b"a", "é".encode(), b" a", "aé".encode()]
    merging = SentenceMerging(pieces, [-float(token) for token in range(len(pieces))], frozenset({0}), 1)
    ids = merging.encode(text.encode())
    plain = text.replace("▁", " ")
    assert b"".join(pieces[token] for token in ids).decode() == (f" {plain}" if plain else "")
    assert not any(pieces[token] in (b"a", b" ") and token <= 256 for token in ids), "a byte token for what another token says"


def test_which_vocabularies_are_sentencepieces() -> None:
    special = frozenset({0})
    assert first_byte_token([b"<s>", *BYTES, b" ", b"a"], special) == 1
    assert first_byte_token([b"<s>", *BYTES, b" a", b"ab"], special) is None, "no byte is a character of its own"
    assert first_byte_token([b"<s>", *BYTES, b" ", b"a\xc3"], special) is None, "a token ends within a character"
    assert first_byte_token([b"<s>", *reversed(BYTES), b" ", b"a"], special) is None
    assert first_byte_token([b" ", b"a", *BYTES], frozenset()) == 2
    for file in (byte_vocabulary(400), TokenizerFile.read(Path(__file__).parent.parent / "data" / "dllama" / "tiny.t")):
        assert first_byte_token(file.pieces, special_ids(file.pieces, file.bos_id)) is None
