"""Names of tokens and the bytes that they stand for."""

import pytest

from dairllm.formats.token_names import BYTE_OF_CHARACTER, byte_level_piece, sentence_piece


def test_every_byte_has_one_stand_in() -> None:
    assert sorted(BYTE_OF_CHARACTER.values()) == [bytes([value]) for value in range(256)]
    assert len(BYTE_OF_CHARACTER) == 256


@pytest.mark.parametrize(
    ("name", "piece"),
    [("Ġthe", b" the"), ("Ċ", b"\n"), ("Ã©", "é".encode()), ("Ā", b"\x00"), ("<s>", b"<s>"), ("中", "中".encode())],
)
def test_byte_level(name: str, piece: bytes) -> None:
    assert byte_level_piece(name) == piece


def test_each_character_by_itself_and_beside_others() -> None:
    for code in range(0x400):
        piece = BYTE_OF_CHARACTER.get(chr(code)) or chr(code).encode()
        assert byte_level_piece(chr(code)) == piece
        assert byte_level_piece(f"aĠ{chr(code)}\x80中") == b"a " + piece + "\x80中".encode()


@pytest.mark.parametrize(
    ("name", "piece"),
    [("▁the", b" the"), ("<0x0A>", b"\n"), ("<0xE9>", b"\xe9"), ("<0xZZ>", b"<0xZZ>"), ("<0x0A>a", b"<0x0A>a"), ("é", "é".encode())],
)
def test_sentence_piece(name: str, piece: bytes) -> None:
    assert sentence_piece(name) == piece
