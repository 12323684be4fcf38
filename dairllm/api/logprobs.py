"""Scores of tokens, as OpenAI's two forms of answers have them."""

from collections.abc import Sequence
from typing import Any

from dairllm.serving.logprobs import TokenScore
from dairllm.text.stream_decoder import UNKNOWN_PIECE
from dairllm.text.tokenizer import Tokenizer

__all__ = ["CompletionLogprobs", "chat_logprobs"]

_LEAST = -9999.0
"""For what cannot be at all: JSON has no infinity, and OpenAI's API says this number."""


def chat_logprobs(scores: Sequence[TokenScore], tokenizer: Tokenizer) -> dict[str, Any]:
    """`logprobs` of a choice of `/v1/chat/completions`, or of one of its chunks."""

    def named(token: int, logprob: float) -> dict[str, Any]:
        piece = _piece(tokenizer, token)
        return {"token": piece.decode("utf-8", "replace"), "logprob": max(logprob, _LEAST), "bytes": list(piece)}

    content = [
        named(one.token, one.logprob) | {"top_logprobs": list(map(named, one.top_ids.tolist(), one.top_logprobs.tolist()))}
        for one in scores
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`logprobs` of a choice of `/v1/completions`: of its whole, or chunk after chunk.

    Args:
        tokenizer: of the model.
        begun: characters of the choice that no token is of.
    """

    def __init__(self, tokenizer: Tokenizer, begun: int = 0) -> None:
        self._tokenizer, self._offset = tokenizer, begun
        self._decoder = tokenizer.decoder()

    def prompt(self, ids: Sequence[int], scores: Sequence[TokenScore | None], *, unwritten: int) -> dict[str, Any]:
        """Of a prompt's tokens, the first of which has no score; the first `unwritten` of them are none of its text."""
        shown = self._tokenizer.decoder(show_special=True)
        widths = [0 if place < unwritten else len(shown.feed(token)) for place, token in enumerate(ids)]
        return self._form(ids, scores, widths)

    def answer(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """Of the next tokens of an answer."""
        ids = [one.token for one in scores]
        return self._form(ids, scores, [len(self._decoder.feed(token)) for token in ids])

    def _form(self, ids: Sequence[int], scores: Sequence[TokenScore | None], widths: Sequence[int]) -> dict[str, Any]:
        offsets = []
        for width in widths:
            offsets.append(self._offset)
            self._offset += width
        return {
            "tokens": [self._name(token) for token in ids],
            "token_logprobs": [None if one is None else max(one.logprob, _LEAST) for one in scores],
            "top_logprobs": [None if one is None else self._top(one) for one in scores],
            "text_offset": offsets,
        }

    def _top(self, one: TokenScore) -> dict[str, float]:
        """By text, the best first; the token itself is always among them."""
        best = [*zip(one.top_ids.tolist(), one.top_logprobs.tolist(), strict=True), (one.token, one.logprob)]
        found: dict[str, float] = {}
        for token, logprob in best:
            found.setdefault(self._name(token), max(logprob, _LEAST))
        return found

    def _name(self, token: int) -> str:
        """A token's text; of a part of a character its bytes, since others have the same text."""
        piece = _piece(self._tokenizer, token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _piece(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.pieces[token] if token < len(tokenizer.pieces) else UNKNOWN_PIECE
