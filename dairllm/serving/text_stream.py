"""The text of an answer as it becomes certain: whole characters, up to the first stop string."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from dairllm.serving.generation import Generation
from dairllm.text.tokenizer import Tokenizer

__all__ = ["Answer"]


class Answer:
    """What a generation says.

    Args:
        generation: not yet run.
        tokenizer: of its model.
        stop: strings at which it ends; they are no part of it. What may be the beginning of one is held back until it is known.

    Attributes:
        text: all that was given out so far.
        finish_reason: "stop" after an eos id or a stop string, else "length".
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.generation = generation
        self.text = ""
        self.finish_reason = "length"
        self._decoder = tokenizer.decoder()
        self._stops = tuple(word for word in stop if word)
        self._held = ""

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text, piece by piece; whoever stops iterating, or is cancelled, stops the generation between two passes.

        Raises:
            ConfigError: as `Generation.run`.
        """
        async with aclosing(self.generation.run()) as ids:
            async for token in ids:
                stopped = self._take(self._decoder.feed(token))
                if piece := self._release(whole=stopped):
                    yield piece
                if stopped:
                    self.finish_reason = "stop"
                    return
        stopped = self._take(self._decoder.finish())
        self.finish_reason = "stop" if stopped else self.generation.finish_reason
        if piece := self._release(whole=True):
            yield piece

    def _take(self, piece: str) -> bool:
        """Add to what is held back; cut it at a stop string. True if there was one.

        Of several the one that ends first counts: so it makes no difference how the text was divided into pieces.
        """
        self._held += piece
        ends = [(at + len(word), at) for word in self._stops if (at := self._held.find(word)) >= 0]
        if ends:
            self._held = self._held[: min(ends)[1]]
        return bool(ends)

    def _release(self, *, whole: bool) -> str:
        """What is certain of the text held back."""
        certain = len(self._held) if whole else len(self._held) - max((_beginning(self._held, word) for word in self._stops), default=0)
        piece, self._held = self._held[:certain], self._held[certain:]
        self.text += piece
        return piece


def _beginning(text: str, word: str) -> int:
    """How many of the last characters of `text` are the first of `word`."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
