"""A request for text and its answer, between the one who reads it and the model that says it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dairllm.errors import DairllmError
from dairllm.serving.adjustments import Adjustments
from dairllm.serving.logprobs import TokenScore
from dairllm.serving.sampler import Sampler

__all__ = ["STALL_SECONDS", "AbandonedError", "Order", "Reply", "StalledError"]

MOST_UNREAD = 256
"""Pieces (about a token each) that may wait for the reader; then the model waits for it."""
STALL_SECONDS = 30.0
"""That the model waits for the reader of one answer, all waits together."""


class AbandonedError(DairllmError):
    """Nobody wants the answer any more."""


class StalledError(DairllmError):
    """Who asked does not read the answer, and others are waiting for the model."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for.

    Attributes:
        prompt_ids: at least one, known to the model, no more than its context.
        steps: most tokens to generate; None: as many as the context has room for.
        temperature, top_p, seed: of the sampler.
        stop: strings at which the answer ends.
        top_k, min_p, repetition_penalty, frequency_penalty, presence_penalty, logit_bias: as `Sampler` and `Adjustments` have them.
        ignore_eos: whether it goes on after an end-of-text id.
        logprobs: how many of the most probable tokens are named in each place, beside the score of the token; None for no scores.
        scores_prompt: whether the prompt's tokens are scored too.
    """

    prompt_ids: Sequence[int]
    steps: int | None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    logprobs: int | None = None
    scores_prompt: bool = False

    def sampler(self) -> Sampler:
        """That chooses the answer's tokens."""
        adjustments = Adjustments(
            self.prompt_ids,
            repetition=self.repetition_penalty,
            frequency=self.frequency_penalty,
            presence=self.presence_penalty,
            bias=self.logit_bias,
        )
        return Sampler(self.temperature, self.top_p, self.seed, top_k=self.top_k, min_p=self.min_p, adjustments=adjustments)


class Reply:
    """An answer on its way: pieces go in at one end, while the other end reads. What is not read holds the model up, for so long.

    Args:
        on_stop: told when it ends before its end.
        whole: it is read when it is complete, by `text`; else piece by piece, by `pieces`.
        patience: seconds that the model waits for the reader, all waits together.

    Attributes:
        order: what was asked for.
        request_id: who asks, in the log.
        fingerprint: of the model that answers, when it has begun.
        cached_tokens: prompt tokens that the model still held from the request before.
        n_ids: tokens generated so far.
        scores: of the answer's tokens so far, and `prompt_scores` of the prompt's, where they were ordered; grown by who answers.
        finish_reason: "stop" or "length" when the answer is complete, else None.
        stopped: why no more of it is wanted or will come, or None.
        halted: why the model is to compute no further pass for it, or None.
        asked_at: time.perf_counter() when it was asked for.
        beginnings: how often the model has begun to answer.
    """

    def __init__(
        self,
        order: Order,
        on_stop: Callable[["Reply"], None],
        patience: float = STALL_SECONDS,
        *,
        whole: bool = False,
        request_id: str = "",
    ) -> None:
        self.order, self.request_id = order, request_id
        self.fingerprint = ""
        self.cached_tokens = self.n_ids = self.beginnings = 0
        self.scores: list[TokenScore] = []
        self.prompt_scores: list[TokenScore | None] = []
        self.finish_reason: str | None = None
        self.stopped: DairllmError | None = None
        self.halted: DairllmError | None = None
        self.asked_at = time.perf_counter()
        self._on_stop = on_stop
        self._whole = whole
        self._unread: list[str] = []
        self._complete = self._has_been_read = False
        self._news, self._read = asyncio.Event(), asyncio.Event()
        self._patience = patience

    # For who reads.

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text, in the pieces in which it comes; what has come in the meantime is one.

        Raises:
            DairllmError: why the answer ends before its end; after the pieces that there were.
        """
        while True:
            await self._anything()
            if self._unread:
                text = "".join(self._unread)
                self._unread.clear()
                self._has_been_read = True
                self._read.set()
                yield text
            elif self.stopped is not None:
                raise self.stopped
            else:
                return

    async def begins(self, seconds: float) -> bool:
        """Whether `pieces` would give something, or end, within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                await self._anything()
        except TimeoutError:
            return False
        return True

    async def text(self) -> str:
        """All of it, when it is complete.

        Raises:
            DairllmError: why there will be no whole answer.
        """
        while not self._complete and self.stopped is None:
            self._news.clear()
            await self._news.wait()
        if self.stopped is not None:
            raise self.stopped
        return "".join(self._unread)

    def abandon(self) -> None:
        """Nobody reads any more; the model is free at the next pass. Of no effect on an answer that has ended."""
        self.stop(AbandonedError("the client went away"))

    # For who answers.

    async def put(self, piece: str) -> None:
        """Add to the answer; waits where too much of it has not been read. It is stopped where that takes too long."""
        self._unread.append(piece)
        if self._whole:
            return  # nobody is to be woken before its end
        self._news.set()
        loop = asyncio.get_running_loop()
        while len(self._unread) >= MOST_UNREAD and self.halted is None:
            self._read.clear()
            begun = loop.time()
            try:
                async with asyncio.timeout(max(0.0, self._patience)):
                    await self._read.wait()
            except TimeoutError:
                self.stop(StalledError("the answer was not read in time, and others wait for the model"))
            self._patience -= loop.time() - begun

    def complete(self, finish_reason: str) -> None:
        """That was all of it."""
        self.finish_reason, self._complete = finish_reason, True
        self._news.set()

    def begin_again(self) -> bool:
        """Forget what there is of the answer, to say it once more. False where its reader has some of it, or wants no more."""
        if self._has_been_read or self._complete or self.halted is not None:
            return False
        self._unread.clear()
        self.cached_tokens = self.n_ids = 0
        return True

    def halt(self, reason: DairllmError) -> None:
        """No further pass is to be computed for it; what the pass in hand gives is still to be put."""
        if self.halted is None:
            self.halted = reason
            self._read.set()

    def stop(self, reason: DairllmError) -> None:
        """No more of it comes; the first reason counts. Of no effect on an answer that has ended."""
        if self.stopped is None and not self._complete:
            self.halt(reason)
            self.stopped = reason
            self._news.set()
            self._on_stop(self)

    async def _anything(self) -> None:
        """Until there is something to read, or the end."""
        while not (self._unread or self._complete or self.stopped is not None):
            self._news.clear()
            await self._news.wait()
