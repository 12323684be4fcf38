"""The model, as one generation after the other sees it: it remembers what it was fed, and ends a generation that nobody waits for."""

import asyncio
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.kv_caches import KvCaches
from dairllm.serving.prefix_caches import PrefixCaches
from dairllm.serving.reply import Reply
from dairllm.serving.scoring import ScoringModel
from dairllm.telemetry import Histogram

__all__ = ["HeldModel"]

Result = TypeVar("Result")


class HeldModel:
    """A `Model` over another one, for one reply at a time.

    Args:
        model: nobody else feeds it.
        token_seconds: told the time from one token of an answer to the next.
        fingerprint: of the model and its nodes.
        kv_caches: the model's, each for another text; None where it has one.

    Attributes:
        failure: what a pass ended with that left the model in an unknown state, or None.
    """

    def __init__(self, model: ScoringModel, token_seconds: Histogram, fingerprint: str, kv_caches: KvCaches | None = None) -> None:
        self.seq_len, self.vocab_size, self.n_batches = model.seq_len, model.vocab_size, model.n_batches
        self.fingerprint = fingerprint
        self.failure: BaseException | None = None
        self._model, self._token_seconds, self._kv_caches = model, token_seconds, kv_caches
        self._texts = PrefixCaches(1 if kv_caches is None else kv_caches.count)
        self._reply: Reply | None = None
        self._last_token: float | None = None

    async def serve(self, reply: Reply) -> int:
        """From now on passes are for `reply`. Returns how many tokens of its prompt need not be computed; never all of them, and none of a
        prompt that is scored: what led to its tokens is not kept."""
        self._reply, self._last_token = reply, None
        choice = self._texts.choose(reply.order.prompt_ids, shares=not reply.order.scores_prompt)
        if self._kv_caches is not None:
            try:
                self._kv_caches.use(choice.cache)
            except BaseException:
                self._texts.ids.clear()  # there is no memory for it, so nothing was copied there
                raise
            if choice.source is not None:
                await self._copy(self._kv_caches, choice.source, choice.cache, choice.shared)
        return choice.shared

    async def _copy(self, kv_caches: KvCaches, source: int, target: int, positions: int) -> None:
        try:
            for _ in kv_caches.copy(source, target, positions):
                await asyncio.sleep(0)  # others have their turn
        except BaseException as error:
            self.failure = error  # half of a text would pass for all of it
            raise

    async def feed(self, tokens: Sequence[int], position: int, *, logits: bool) -> NDArray[np.float32] | None:
        """As `Model.feed`.

        Raises:
            DairllmError: why the reply was halted; else what the model raises, which is then kept as `failure`.
        """
        result = await self._hold(tokens, position, self._model.feed(tokens, position, logits=logits))
        if logits:
            now = time.perf_counter()
            if self._last_token is not None:
                self._token_seconds.observe(now - self._last_token)
            self._last_token = now
        return result

    async def feed_rows(self, tokens: Sequence[int], position: int) -> Iterator[NDArray[np.float32]]:
        """As `ScoringModel.feed_rows`. Raises as `feed`."""
        return await self._hold(tokens, position, self._model.feed_rows(tokens, position))

    async def _hold(self, tokens: Sequence[int], position: int, feeding: Coroutine[None, None, Result]) -> Result:
        """Feed, and remember what was fed."""
        if self._reply is not None and self._reply.halted is not None:
            feeding.close()
            raise self._reply.halted
        del self._texts.ids[position:]
        try:
            result = await feeding
        except BaseException as error:
            self.failure = error
            raise
        self._texts.ids.extend(tokens)
        return result
