"""Ids from a `.t` file alone are those that distributed-llama's encoder made of the same texts (tests/data/dllama/tokens.json)."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.text.greedy_merging import GreedyMerging, special_ids, stand_in_ids

DATA = Path(__file__).parent.parent / "data" / "dllama"
RECORDED: dict[str, Any] = json.loads((DATA / "tokens.json").read_text(encoding="utf-8"))
TINY = TokenizerFile.read(DATA / "tiny.t")
BYTES = [bytes([value]) for value in range(256)]


def encoder(pieces: list[bytes], scores: list[float], bos_id: int | None = None) -> GreedyMerging:
    return GreedyMerging(pieces, scores, special_ids(pieces, bos_id))


def tiny() -> GreedyMerging:
    return encoder(list(TINY.pieces), list(TINY.scores), TINY.bos_id)


@pytest.mark.parametrize("vector", RECORDED["tiny.t"]["texts"], ids=lambda vector: repr(vector["text"][:20]))
def test_ids_of_the_program(vector: dict[str, Any]) -> None:
    assert tiny().encode(vector["text"].encode()) == vector["ids"]


@pytest.mark.parametrize("vector", RECORDED["tiny.t"]["bytes"], ids=lambda vector: vector["bytes"])
def test_ids_of_the_program_for_bytes_that_are_no_text(vector: dict[str, Any]) -> None:
    assert tiny().encode(bytes.fromhex(vector["bytes"])) == vector["ids"]


@pytest.mark.parametrize("vector", RECORDED["duplicates"]["texts"], ids=lambda vector: vector["text"])
def test_pieces_that_stand_twice(vector: dict[str, Any]) -> None:
    """A vocabulary as SentencePiece makes them: which of two equal pieces the program finds is reproduced, ties of scores too."""
    recorded = RECORDED["duplicates"]
    pieces = [b"<unk>", b"<s>", b"</s>", *BYTES, *map(bytes.fromhex, recorded["pieces"])]
    scores = [0.0] * 259 + recorded["scores"]
    assert encoder(pieces, scores, len(pieces) - 1).encode(vector["text"].encode()) == vector["ids"]


def reference(pieces: list[bytes], scores: list[float], text: bytes) -> list[int]:
    """The definition, quadratic: merge the best pair, the leftmost of equals, until there is none."""
    ids = {piece: token for token, piece in enumerate(pieces)}
    tokens = [ids[bytes([value])] for value in text]
    while True:
        pairs = [(ids.get(pieces[left] + pieces[right]), place) for place, (left, right) in enumerate(pairwise(tokens))]
        mergeable = [(scores[token], -place, token) for token, place in pairs if token is not None]
        if not mergeable:
            return tokens
        _, place, token = max(mergeable)
        tokens[-place : -place + 2] = [token]


vocabularies = st.lists(st.text("abc", min_size=2, max_size=4), max_size=25, unique=True)


@given(vocabularies, st.lists(st.integers(0, 5), min_size=25, max_size=25), st.text("abcd", max_size=60))
def test_merging_is_the_definition(words: list[str], ranks: list[int], text: str) -> None:
    pieces = BYTES + [word.encode() for word in words]
    scores = [0.0] * 256 + [-float(rank) for rank in ranks[: len(words)]]
    assert encoder(pieces, scores).encode(text.encode()) == reference(pieces, scores, text.encode())


@given(st.binary())
def test_pieces_of_ids_are_the_bytes(text: bytes) -> None:
    assert b"".join(TINY.pieces[token] for token in tiny().encode(text)) == text


@pytest.mark.parametrize("text", [b"a" * 100_000, b"th" * 50_000, b"the other cat is here on it. " * 3500], ids=["one", "pair", "prose"])
def test_time_grows_with_the_length_not_its_square(text: bytes) -> None:
    """100 kB; the quadratic way takes minutes. (It takes a tenth of a second: the bound is for a busy machine.)"""
    merging = tiny()
    before = time.process_time()
    merging.encode(text)
    assert time.process_time() - before < 2


def test_one_word_of_100_kilobytes() -> None:
    """Nothing falls apart into stretches here: every pair can merge, four times over."""
    pieces = BYTES + [b"ab" * n for n in (1, 2, 4, 8)]
    merging = encoder(pieces, [-float(token) for token in range(len(pieces))])
    before = time.process_time()
    assert merging.encode(b"ab" * 50_000) == [259] * 6250
    assert time.process_time() - before < 5


def test_special_tokens_from_bos_on() -> None:
    assert special_ids([*BYTES, b"ab", b"<s>", b"</s>"], 257) == {257, 258}


def test_special_tokens_that_come_first() -> None:
    """bos_id 1 there would leave one regular token, which is how the C++ program reads such a file."""
    pieces = [b"<|end|>", b"<|turn|>", *BYTES, b"ab"]
    assert special_ids(pieces, 1) == {0, 1}
    assert stand_in_ids(pieces, 1) == frozenset()


def test_a_last_id_in_place_of_bos() -> None:
    """Written so for the C++ program's sake: an encoder takes it whole as that program does, a reader sees a word."""
    pieces = [b"<|end|>", b"<|turn|>", *BYTES, b"ab"]
    assert special_ids(pieces, 258) == {0, 1, 258}
    assert stand_in_ids(pieces, 258) == {258}
    assert stand_in_ids([*BYTES, b"<s>"], 256) == frozenset(), "where no specials come first, the last id is one"


def test_no_bos_and_no_bytes() -> None:
    assert special_ids([*BYTES, b"ab"], None) == frozenset()
    assert special_ids([b"one", b"two"], None) == frozenset()


def test_bytes_without_a_token_wait_for_one_or_are_left_out() -> None:
    pieces = [b"a", b"\xc3\xa9", b"ab"]
    merging = encoder(pieces, [0.0, 0.0, 0.0])
    assert merging.encode("aéa".encode()) == [0, 1, 0]
    with structlog.testing.capture_logs() as logs:
        assert merging.encode(b"a\xc3xa") == [0, 0]
    assert [(entry["log_level"], entry["n_bytes"]) for entry in logs] == [("warning", 2)]


def test_the_special_token_with_the_lowest_id_wins() -> None:
    pieces = [*BYTES, b"<s>", b"<s>x", b"<s>"]
    assert encoder(pieces, [0.0] * len(pieces), 256).encode(b"<s>x<s>") == [256, ord("x"), 256]


def test_scores_that_forbid_merging() -> None:
    assert encoder([*BYTES, b"ab"], [0.0] * 256 + [-1e10]).encode(b"ab") == [97, 98]
