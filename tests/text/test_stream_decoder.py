"""Decoding one token at a time gives what decoding all of them at once gives, and never half a character."""

from hypothesis import given
from hypothesis import strategies as st

from dairllm.text.stream_decoder import StreamDecoder

PIECES = (
    *(bytes([value]) for value in range(256)),
    "héllo".encode(),
    b" the",
    "😀".encode()[:2],
    "😀".encode()[2:],
    b"\xff\xfe",
    b"<|end|>",
)
END = len(PIECES) - 1


def decode(ids: list[int]) -> str:
    return b"".join(PIECES[token] for token in ids if token != END).decode("utf-8", "replace")


@given(st.lists(st.integers(0, END)))
def test_stream_equals_the_whole(ids: list[int]) -> None:
    decoder = StreamDecoder(PIECES, frozenset({END}))
    assert "".join(map(decoder.feed, ids)) + decoder.finish() == decode(ids)


@given(st.text())
def test_no_character_is_torn(text: str) -> None:
    """Each part ends where a character ends, so no part of valid text has a replacement character that the text has not."""
    decoder = StreamDecoder(PIECES, frozenset())
    parts = [decoder.feed(value) for value in text.encode()]
    assert "".join(parts) == text
    assert all(part in text for part in parts)
    assert decoder.finish() == ""


def test_a_character_waits_for_its_last_byte() -> None:
    decoder = StreamDecoder(PIECES, frozenset())
    assert [decoder.feed(value) for value in "é😀".encode()] == ["", "é", "", "", "", "😀"]


def test_a_hidden_token_does_not_break_a_character() -> None:
    decoder = StreamDecoder(PIECES, frozenset({END}))
    assert [decoder.feed(token) for token in (258, END, 259, END)] == ["", "", "😀", ""]


def test_an_unfinished_character_ends_as_one_replacement() -> None:
    decoder = StreamDecoder(PIECES, frozenset())
    assert decoder.feed(258) == ""
    assert decoder.finish() == "�"
    assert decoder.feed(97) == "a", "after finish it is as new"


def test_invalid_bytes_are_replaced_at_once() -> None:
    assert StreamDecoder(PIECES, frozenset()).feed(260) == "��"


def test_an_id_without_a_piece_is_shown() -> None:
    """A classifier may be wider than the vocabulary."""
    decoder = StreamDecoder(PIECES, frozenset())
    assert decoder.feed(len(PIECES)) == "�"
    assert decoder.feed(-1) == "�"
