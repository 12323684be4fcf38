"""Text to token ids from a `.t` file alone, where its vocabulary is SentencePiece's (Llama 2,
Mistral): ids are those of llama.cpp.

Such a vocabulary has a token for every byte, which stands for bytes that nothing else can say, and
tokens for characters beside them: "a" stands there twice. So text begins as characters, not as
bytes; those that no token says become their bytes' tokens. The rest is greedy merging by highest
score. A text begins with a space more, and so does what follows a special token: words are written
with the space before them.
"""

from collections.abc import Sequence

from dairllm.formats.token_names import SPACE
from dairllm.text.greedy_merging import GreedyMerging

__all__ = ["SentenceMerging", "first_byte_token"]

_SPACE = SPACE.encode()
_ALL_BYTES = [bytes([value]) for value in range(256)]


def first_byte_token(pieces: Sequence[bytes], special: frozenset[int]) -> int | None:
    """The token of byte 0 in a SentencePiece vocabulary, which those of the other bytes follow;
    None for a vocabulary of another kind.

    A `.t` file does not say its kind. In byte-level vocabularies each byte has one token, which may
    be anywhere; longer ones may end within a character, and most real ones have some that do. In
    SentencePiece's all longer tokens are text, and a single byte has a second token where it is a
    character of its own.
    """
    zeros = (token for token, piece in enumerate(pieces) if piece == b"\0")
    first = next((token for token in zeros if list(pieces[token : token + 256]) == _ALL_BYTES), None)
    if first is None:
        return None
    others = [token for token in range(len(pieces)) if not first <= token < first + 256 and token not in special]
    if not any(len(pieces[token]) == 1 for token in others):
        return None
    try:
        for token in others:
            pieces[token].decode()
    except UnicodeDecodeError:
        return None
    return first


class SentenceMerging(GreedyMerging):
    """Encoder made of a SentencePiece vocabulary's pieces and scores.

    Args:
        pieces: the bytes of every token, by id.
        scores: the score of every token, by id.
        special: ids that are taken whole where the text spells them out, and never come of a merge.
        first_byte: the token of byte 0.
    """

    def __init__(self, pieces: Sequence[bytes], scores: Sequence[float], special: frozenset[int], first_byte: int) -> None:
        of_bytes = range(first_byte, first_byte + 256)
        ids = {pieces[token]: token for token in reversed(range(len(pieces))) if token not in of_bytes and token not in special}
        super().__init__(pieces, scores, special, ids)
        self._of_byte = [token if token >= 0 else of_bytes[value] for value, token in enumerate(self._single)]

    def _split(self, text: bytes, start: int, end: int, tokens: list[int]) -> int:
        """Append the tokens of text[start:end]'s characters, and of a space before them. All can be
        said; U+2581 is a space.
        """
        if start == end:
            return 0
        segment = b" " + text[start:end].replace(_SPACE, b" ")
        if segment.isascii():
            tokens += [self._of_byte[value] for value in segment]
            return 0
        for character in segment.decode("utf-8", "surrogateescape"):
            said = character.encode("utf-8", "surrogateescape")
            token = self._ids.get(said, -1)
            tokens += [token] if token >= 0 else [self._of_byte[value] for value in said]
        return 0
