"""A model as a service: one request at a time, the others wait in a line of bounded length; a model that is lost is found again.

The service owns the model's life. It opens it, tells why it is not there while it is not, and opens it anew when it was lost. Meanwhile
requests wait for it, for so long; the one in hand goes back to the head of the line where nobody has read of its answer yet, else it
fails with the reason. Then all are told the reason, and none is taken until the model is back. Whoever asks learns at once whether he
has a place in line.

Between two requests the model keeps what it has computed, in as many KV caches as it has. A prompt that begins as an earlier text did (a
conversation that goes on) is computed from where they part (dairllm.serving.prefix_caches); since a row's numbers do not
depend on the batch that it was computed in, the answer is the same.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable

import structlog

from dairllm import machine
from dairllm.errors import DairllmError, NetworkError, RefusedError, RemoteProtocolError, without_trace
from dairllm.net.runner import in_thread
from dairllm.serving.fingerprint import Fingerprint
from dairllm.serving.generation import Generation
from dairllm.serving.held_model import HeldModel
from dairllm.serving.link_totals import LinkTotals
from dairllm.serving.open_model import OpenModel
from dairllm.serving.recovery import Recovery
from dairllm.serving.reply import STALL_SECONDS, AbandonedError, Order, Reply, StalledError
from dairllm.serving.scoring import generation_for
from dairllm.serving.text_stream import Answer
from dairllm.telemetry import Readiness, ServiceMetrics
from dairllm.text.tokenizer import Tokenizer
from dairllm.units import format_duration

__all__ = ["OpenModel", "QueueFullError", "Service", "UnavailableError"]

log = structlog.get_logger()
IDLE_LOOK_SECONDS = 1.0
"""How often an idle model is asked whether it is still there."""
LONGEST_RETRY = 60
OF_A_WORKER = (NetworkError, RemoteProtocolError, RefusedError)
"""A worker that is gone may come back. What else fails, a file that was damaged say, is not mended by waiting."""
MOST_BEGINNINGS = 2
"""Of one answer: a request that the model does not survive must not take it from the others again and again."""


class UnavailableError(DairllmError):
    """The model is not there, or was lost; `retry_after` seconds may bring it back."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class QueueFullError(DairllmError):
    """Too many are waiting; in `retry_after` seconds there may be a place."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already (server.queue); try again later")
        self.retry_after = retry_after


class Service:
    """From `start` to `close`.

    Args:
        opens: makes a model that can be used at once; called anew whenever it was lost.
        tokenizer: of the model.
        readiness: told why requests cannot be answered. Its reason at `start` is what is said until the model was first opened.
        metrics: counts what happens.
        fingerprint: of the model, told with each answer.
        queue: requests that may wait.
        reconnect: seconds between attempts to open the model.
        recovery: seconds that requests wait for a model that was lost.
        shutdown: seconds that `close` waits for the pass in hand.
        patience: seconds that an answer may wait for its reader.
    """

    def __init__(
        self,
        opens: Callable[[], Awaitable[OpenModel]],
        tokenizer: Tokenizer,
        readiness: Readiness,
        metrics: ServiceMetrics,
        *,
        fingerprint: Fingerprint,
        queue: int,
        reconnect: float,
        recovery: float,
        shutdown: float,
        patience: float = STALL_SECONDS,
    ) -> None:
        self._opens, self._tokenizer = opens, tokenizer
        self._readiness, self._metrics, self._fingerprint = readiness, metrics, fingerprint
        self._queue, self._reconnect, self._shutdown, self._patience = queue, reconnect, shutdown, patience
        self._line: deque[Reply] = deque()
        self._arrival = asyncio.Event()
        self._at_hand: Reply | None = None
        self._model: OpenModel | None = None
        self._was_open = self._closing = False
        self._life: asyncio.Task[None] | None = None
        self._links = LinkTotals()
        self._last_took = 1.0
        self._recovery = Recovery(readiness, recovery, self._give_up)
        metrics.links = lambda: self._links.over(() if self._model is None else self._model.nodes)

    async def start(self) -> None:
        """Begin to open the model; returns at once."""
        self._life = asyncio.create_task(self._live(), name="service")

    async def ended(self) -> None:
        """Wait until the service is over.

        Raises:
            DairllmError: the model cannot be opened, and waiting would not mend it.
        """
        if self._life is not None:
            await asyncio.wait({self._life})
            if not self._life.cancelled():
                self._life.result()

    async def close(self) -> None:
        """Finish the pass in hand, end all answers, give up the model."""
        self._closing = True
        self._readiness.reason = "shutting down"
        self._recovery.end()
        if self._life is None:
            return
        self._refuse_all()
        if self._model is not None:
            if self._at_hand is not None:
                self._at_hand.halt(self._unavailable())
            self._arrival.set()
            await asyncio.wait({self._life}, timeout=self._shutdown)
        self._life.cancel()
        await asyncio.wait({self._life})

    def check(self, *, again: bool = False) -> None:
        """Whether a request would be taken now.

        Args:
            again: it is one that was taken before, for a further answer: it has its place in any case.

        Raises:
            UnavailableError: the model is not there.
            QueueFullError: the line is full.
        """
        if self._readiness.reason is not None and not self._recovery.running:
            self._metrics.requests["unavailable"] += 1
            raise self._unavailable()
        if not again and len(self._line) + (self._at_hand is not None) > self._queue:
            self._metrics.requests["queue_full"] += 1
            raise QueueFullError(len(self._line), min(LONGEST_RETRY, math.ceil(self._last_took)))

    def ask(self, order: Order, *, whole: bool = False, request_id: str = "", again: bool = False) -> Reply:
        """Take a place in line. Who stops reading the reply must `abandon` it. Raises as `check`.

        Args:
            whole: the answer is read when it is complete.
            request_id: who asks, in the log.
            again: as `check`.
        """
        self.check(again=again)
        reply = Reply(order, self._stopped, self._patience, whole=whole, request_id=request_id)
        self._line.append(reply)
        self._arrival.set()
        self._count()
        return reply

    def waiting(self, reply: Reply) -> str:
        """Where a reply is that has not begun yet, for who asked."""
        if reply is self._at_hand:
            return "waiting, position 0 (the prompt is being computed)"
        position = self._line.index(reply) + 1 if reply in self._line else 0
        return f"waiting, position {position}{' (the model is being recovered)' if self._recovery.running else ''}"

    # The model's life.

    async def _live(self) -> None:
        while not self._closing:
            self._model = model = await self._open()
            try:
                trouble = await self._serve(model)
                if trouble is not None:
                    self._metrics.losses += 1
                    self._lose(trouble)
                    log.warning(
                        "model lost", reason=trouble, waiting=len(self._line), requests_wait=format_duration(self._recovery.seconds)
                    )
            finally:
                self._model = None
                await self._close(model)

    async def _open(self) -> OpenModel:
        """Try until it succeeds. A mistake that waiting does not mend is raised, unless the model has been open before."""
        told = None
        while True:
            try:
                model = await self._opens()
            except DairllmError as error:
                if not (self._was_open or isinstance(error, NetworkError | RemoteProtocolError)):
                    raise
                reason, in_vain = str(error), not isinstance(error, OF_A_WORKER)
            except Exception as error:
                if not self._was_open:
                    raise
                log.exception("opening the model failed by a defect of this program")
                reason, in_vain = _reason(error), True
            else:
                self._was_open = True
                if not self._closing:
                    self._readiness.reason = None
                    self._recovery.end()
                log.info("ready", nodes=len(model.nodes))
                return model
            if reason != told:
                log.warning("model not available", reason=reason, next_attempt_in=format_duration(self._reconnect))
            told = self._readiness.reason = reason
            if in_vain and self._recovery.running:
                self._recovery.end()
                self._refuse_all()
            await asyncio.sleep(self._reconnect)

    async def _close(self, model: OpenModel) -> None:
        self._links.keep(model.nodes)
        try:
            await model.close()
        except DairllmError as error:
            log.warning("closing the model failed", reason=str(error))
        except Exception:
            log.exception("closing the model failed by a defect of this program")
        await in_thread("give back", machine.give_back_memory)

    def _lose(self, reason: str) -> None:
        """The model is not there any more; requests wait for it."""
        if not self._closing:
            self._readiness.reason = reason
            self._recovery.begin()

    def _give_up(self) -> None:
        """It has not come back in time."""
        waited = format_duration(self._recovery.seconds)
        log.warning("requests do not wait any longer", reason=self._readiness.reason, refused=len(self._line), waited=waited)
        self._refuse_all(f"; the model was not back within {waited} (deadlines.recovery)")

    # Requests.

    async def _serve(self, model: OpenModel) -> str | None:
        """Answer one after the other; returns why the model cannot be used any more, or None when the service is being closed."""
        held = HeldModel(model, self._metrics.token_seconds, self._fingerprint.of(model.nodes), model.kv_caches)
        while not self._closing:
            if not self._line:
                self._arrival.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(IDLE_LOOK_SECONDS):
                        await self._arrival.wait()
                if (trouble := model.trouble) is not None:
                    return trouble
                continue
            reply = self._line.popleft()
            try:
                self._at_hand = reply
                self._count()
                await self._answer(held, reply)
            finally:
                self._at_hand = None
                self._count()
            if held.failure is not None:
                reason, held.failure = _reason(held.failure), None  # it knows frames that know `held`, and the model
                return reason
        return None

    async def _answer(self, held: HeldModel, reply: Reply) -> None:
        """All of one answer; whatever goes wrong is the reply's, and is told to its reader."""
        order, begun = reply.order, time.perf_counter()
        generation: Generation | None = None
        reply.beginnings += 1
        reply.fingerprint = held.fingerprint
        try:
            reply.cached_tokens = await held.serve(reply)
            generation = generation_for(reply, held, self._tokenizer.eos_ids)
            answer = Answer(generation, self._tokenizer, order.stop)
            async with contextlib.aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    reply.n_ids = len(generation.ids)
                    await reply.put(piece)
            reply.n_ids = len(generation.ids)
            reply.complete(answer.finish_reason)
        except asyncio.CancelledError:
            reply.stop(self._unavailable())
            raise
        except Exception as error:
            if held.failure is not None:  # the model's, not the request's
                self._lose(_reason(error))
                if isinstance(error, OF_A_WORKER) and self._put_back(reply):
                    return
                reply.stop(self._unavailable())
            if not isinstance(error, DairllmError):
                log.exception("request failed by a defect of this program", request_id=reply.request_id)
            reply.stop(without_trace(error) if isinstance(error, DairllmError) else DairllmError(_reason(error)))
        finally:
            if generation is not None:
                self._record(reply, generation, begun)

    def _put_back(self, reply: Reply) -> bool:
        """To the head of the line, with the whole answer before it, where that can be."""
        if self._closing or reply.beginnings >= MOST_BEGINNINGS or not reply.begin_again():
            return False
        self._line.appendleft(reply)
        self._metrics.begun_again += 1
        return True

    def _record(self, reply: Reply, generation: Generation, begun: float) -> None:
        metrics, n_ids, n_prompt = self._metrics, len(generation.ids), len(reply.order.prompt_ids)
        waited, took = begun - reply.asked_at, time.perf_counter() - begun
        again = reply in self._line
        outcome = "begun again" if again else _outcome(reply)
        self._last_took = took
        if not again:
            metrics.requests[outcome] += 1
        paging = None if self._model is None else self._model.paging
        metrics.paging.follow(None if paging is None else paging.metrics)
        metrics.prompt_tokens += n_prompt
        metrics.cached_tokens += reply.cached_tokens
        metrics.generated_tokens += n_ids
        if n_ids:
            metrics.first_token_seconds.observe(waited + generation.prefill_seconds)
            metrics.prefill_rate = generation.prefill_tokens_per_second
        if n_ids > 1:
            metrics.decode_rate = generation.decode_tokens_per_second
        if reply.finish_reason is not None:
            metrics.request_seconds.observe(waited + took)
        log.info(
            "answered", request_id=reply.request_id, outcome=outcome,
            prompt_tokens=n_prompt, cached_tokens=reply.cached_tokens, generated_tokens=n_ids,
            waited=format_duration(waited), prefill=format_duration(generation.prefill_seconds), took=format_duration(took),
        )  # fmt: skip

    def _stopped(self, reply: Reply) -> None:
        """One that waits leaves the line; the one at hand ends by itself at the next pass."""
        if reply in self._line:
            self._line.remove(reply)
            self._metrics.requests[_outcome(reply)] += 1
            self._count()

    def _refuse_all(self, more: str = "") -> None:
        """Tell all in line that the model is not there."""
        for reply in list(self._line):
            reply.stop(self._unavailable(more))

    def _unavailable(self, more: str = "") -> UnavailableError:
        reason = self._readiness.reason or "the model is not available"
        return UnavailableError(f"{reason}{more}", min(LONGEST_RETRY, math.ceil(self._reconnect)))

    def _count(self) -> None:
        self._metrics.waiting, self._metrics.running = len(self._line), int(self._at_hand is not None)


def _outcome(reply: Reply) -> str:
    """A label for the metrics."""
    if reply.finish_reason is not None:
        return reply.finish_reason
    kinds = ((AbandonedError, "abandoned"), (StalledError, "stalled"), (UnavailableError, "unavailable"))
    return next((label for kind, label in kinds if isinstance(reply.stopped, kind)), "failed")


def _reason(error: BaseException) -> str:
    """What to say of an error to people who cannot read the log."""
    return str(error) if isinstance(error, DairllmError) else f"a defect of this program ({type(error).__name__}); its log says more"
