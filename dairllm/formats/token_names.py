"""How vocabularies write a token's bytes as text: GPT-2's stand-ins (byte-level BPE), and SentencePiece's.

Both kinds are found in GGUF files and in `tokenizer.json` files; a `.t` file has the bytes themselves.
"""

__all__ = ["BYTE_OF_CHARACTER", "SPACE", "byte_level_piece", "sentence_piece"]

SPACE = "\u2581"
"""What SentencePiece writes for a space."""


def _byte_characters() -> dict[str, bytes]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    stand_ins = {chr(value): value for value in printable} | {chr(256 + place): value for place, value in enumerate(others)}
    return {character: bytes([value]) for character, value in stand_ins.items()}


BYTE_OF_CHARACTER = _byte_characters()
"""GPT-2's stand-ins: bytes that Latin-1 prints stand for themselves, the others for the characters from 256 on."""

_LATIN_1 = dict.fromkeys(range(0x80, 0x100), 0xFFFF) | {ord(character): value[0] for character, value in BYTE_OF_CHARACTER.items()}
"""For `str.translate`: what stands for a byte becomes the character of that number, what does not is no Latin-1, or is ASCII."""


def byte_level_piece(name: str) -> bytes:
    """Bytes of a token written in stand-ins; a character that stands for no byte is its own UTF-8."""
    try:
        return name.translate(_LATIN_1).encode("latin-1")  # eight times as fast, and true of nearly all
    except UnicodeEncodeError:
        pass
    return b"".join(BYTE_OF_CHARACTER.get(character) or character.encode() for character in name)


def sentence_piece(name: str) -> bytes:
    """Bytes of a token as SentencePiece writes it: U+2581 for a space, <0x0A> for a byte."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return bytes([int(name[3:5], 16)])
        except ValueError:
            pass
    return name.replace(SPACE, " ").encode()
