"""Token ids to text, one id at a time, without ever tearing a character.

A token is a run of bytes, and a character may be spread over several tokens (an emoji often is over four). What is given out
ends at a character's end; the bytes of a character that has begun wait for the rest of it.
"""

import codecs
from collections.abc import Sequence

__all__ = ["UNKNOWN_PIECE", "StreamDecoder"]

UNKNOWN_PIECE = "�".encode()
"""What stands for an id that the vocabulary does not have: a model's classifier may be wider than its vocabulary."""


class StreamDecoder:
    """Text of a growing answer. `feed` each id, then `finish` once; after that it is as new.

    Bytes that are no UTF-8 become U+FFFD. The strings that were given out, joined, are what decoding all ids at once gives.

    Args:
        pieces: the bytes of every token, by id.
        hidden: ids that say nothing to the reader (end of turn and the like) and are left out.
    """

    def __init__(self, pieces: Sequence[bytes], hidden: frozenset[int]) -> None:
        self._pieces = pieces
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that `token` completes: none, one or many."""
        if token in self._hidden:
            return ""
        piece = self._pieces[token] if 0 <= token < len(self._pieces) else UNKNOWN_PIECE
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left of a character whose end never came (as U+FFFD), or nothing."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
