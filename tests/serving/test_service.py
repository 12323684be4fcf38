"""The service without HTTP: a model's life from the first attempt to the goodbye, and what becomes of requests meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from dairllm.engine.executor import Executor
from dairllm.errors import ConfigError, DairllmError, EngineError, NetworkError
from dairllm.serving.reply import MOST_UNREAD, AbandonedError, Order, Reply, StalledError
from dairllm.serving.service import QueueFullError, Service, UnavailableError
from dairllm.telemetry import Readiness, ServiceMetrics
from dairllm.text.tokenizer import Tokenizer
from tests.api.serving import FINGERPRINT, Models, write_model
from tests.patience import PATIENCE

PROMPT = tuple(range(40, 60))
BRIEF = Order(PROMPT, 4)
ENDLESS = Order(PROMPT, 4000)


@dataclass
class Serviced:
    service: Service
    models: Models
    readiness: Readiness
    metrics: ServiceMetrics

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.002)

    async def until_ready(self) -> None:
        await self.until(lambda: self.readiness.reason is None)


Make = Callable[..., AbstractAsyncContextManager[Serviced]]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served"))


@pytest.fixture
def make(model_path: Path, executors: list[Executor]) -> Make:
    """A service over the small model, started unless `start` is false; closed in the end."""

    @asynccontextmanager
    async def make(start: bool = True, refusals: tuple[DairllmError, ...] = (), **settings: Any) -> AsyncIterator[Serviced]:
        models = Models(model_path, executors[0])
        models.refusals += refusals
        readiness, metrics = Readiness("connecting"), ServiceMetrics()
        async with models.ready() as opens:
            tokenizer = Tokenizer.load(model_path.with_suffix(".t"))
            settings = {"fingerprint": FINGERPRINT, "queue": 4, "reconnect": 0.01, "recovery": 60.0, "shutdown": 10.0, **settings}
            serviced = Serviced(Service(opens, tokenizer, readiness, metrics, **settings), models, readiness, metrics)
            if start:
                await serviced.service.start()
                if not refusals:
                    await serviced.until_ready()
            try:
                yield serviced
            finally:
                models.gate.set()
                for model in models.opened:
                    model.gate.set()
                await serviced.service.close()

    return make


class Counted:
    """How often a coroutine waits for something."""

    def __init__(self, inner: Coroutine[Any, Any, str]) -> None:
        self._inner = inner
        self.waits = 0

    def __await__(self) -> Generator[Any, Any, str]:
        steps = self._inner.__await__()
        while True:
            try:
                waited_for = next(steps)
            except StopIteration as end:
                return str(end.value)
            self.waits += 1
            yield waited_for

    async def run(self) -> str:
        return await self


async def text_of(reply: Reply) -> str:
    return "".join([piece async for piece in reply.pieces()])


async def what_comes(reply: Reply) -> tuple[list[str], DairllmError | None]:
    """The pieces, and why they end before the end."""
    pieces = []
    try:
        async for piece in reply.pieces():
            pieces.append(piece)
    except DairllmError as error:
        return pieces, error
    return pieces, None


async def test_an_answer(make: Make) -> None:
    async with make() as serviced:
        reply = serviced.service.ask(BRIEF)
        assert await text_of(reply)
        assert (reply.n_ids, reply.finish_reason, reply.cached_tokens, reply.stopped) == (4, "length", 0, None)
        reply.abandon()
        assert reply.stopped is None, "it had ended"


@pytest.mark.parametrize("error", [ConfigError("workers know no Q80"), EngineError("no memory")], ids=lambda error: type(error).__name__)
async def test_what_waiting_does_not_mend_ends_the_service(error: DairllmError, make: Make) -> None:
    async with make(refusals=(error,)) as serviced:
        with pytest.raises(type(error), match=str(error)):
            await serviced.service.ended()
        assert serviced.models.attempts == 1
        with pytest.raises(UnavailableError):
            serviced.service.check()


async def test_a_model_that_was_there_is_waited_for_whatever_is_said(make: Make) -> None:
    """Somebody else may be at work on the other machines."""
    async with make() as serviced:
        serviced.models.last.failure = NetworkError("gone")
        serviced.models.refusals += [ConfigError("workers know no Q80")] * 3
        reply = serviced.service.ask(BRIEF)
        with pytest.raises(UnavailableError, match="workers know no Q80"):  # it is not known whether it will be mended
            await text_of(reply)
        assert reply.beginnings == 1
        await serviced.until_ready()
        assert serviced.models.attempts == 5
        assert await text_of(serviced.service.ask(BRIEF))


async def test_only_a_lost_worker_is_waited_for_by_who_was_being_answered(make: Make) -> None:
    """Those behind him go on, if the model can be opened anew."""
    async with make() as serviced:
        serviced.models.last.failure = EngineError("the disk failed")
        first, second = serviced.service.ask(BRIEF), serviced.service.ask(BRIEF)
        with pytest.raises(UnavailableError, match="the disk failed"):
            await text_of(first)
        assert await text_of(second)
        assert (first.beginnings, second.beginnings) == (1, 1)


async def test_closing_while_requests_wait_for_a_lost_model(make: Make) -> None:
    async with make() as serviced:
        serviced.models.last.failure = NetworkError("gone")
        serviced.models.gate.clear()
        replies = [serviced.service.ask(BRIEF) for _ in range(2)]
        await serviced.until(lambda: serviced.readiness.waiting_until is not None)
        assert serviced.service.waiting(replies[1]) == "waiting, position 2 (the model is being recovered)"
        await serviced.service.close()
        for reply in replies:
            with pytest.raises(UnavailableError, match="shutting down"):
                await text_of(reply)
        assert serviced.readiness.waiting_until is None
        with pytest.raises(UnavailableError, match="shutting down"):
            serviced.service.ask(BRIEF)


async def test_an_answer_that_is_wanted_whole_wakes_its_reader_once(make: Make) -> None:
    async with make() as serviced:
        streamed = await text_of(serviced.service.ask(Order(PROMPT, MOST_UNREAD + 50)))
        reply = serviced.service.ask(Order(PROMPT, MOST_UNREAD + 50), whole=True)
        reading = Counted(reply.text())
        assert await asyncio.ensure_future(reading.run()) == streamed
        assert reading.waits == 1


async def test_closing_finishes_the_pass_in_hand(make: Make) -> None:
    async with make() as serviced:
        model = serviced.models.last
        model.gate.clear()
        running, waiting = serviced.service.ask(ENDLESS), serviced.service.ask(BRIEF)
        await serviced.until(lambda: serviced.metrics.running == 1)
        closing = asyncio.create_task(serviced.service.close())
        with pytest.raises(UnavailableError, match="shutting down"):
            await text_of(waiting)
        with pytest.raises(UnavailableError, match="shutting down"):
            serviced.service.ask(BRIEF)
        assert not model.closed
        model.gate.set()
        pieces, error = await what_comes(running)
        assert isinstance(error, UnavailableError)
        await closing
        assert model.fed == [(0, 20)]
        assert len(pieces) == 1, "the token of that pass"
        assert model.closed
        assert serviced.metrics.requests == {"unavailable": 3}
        await serviced.service.ended()


async def test_closing_waits_for_a_pass_no_longer_than_told(make: Make) -> None:
    async with make(shutdown=0.1) as serviced:
        model = serviced.models.last
        model.gate.clear()
        reply = serviced.service.ask(ENDLESS)
        await serviced.until(lambda: serviced.metrics.running == 1)
        await serviced.service.close()
        assert model.closed
        assert model.fed == []
        with pytest.raises(UnavailableError, match="shutting down"):
            await text_of(reply)


async def test_closing_does_not_wait_for_a_reader(make: Make) -> None:
    async with make() as serviced:
        model = serviced.models.last
        serviced.service.ask(ENDLESS)
        await serviced.until(lambda: len(model.fed) > MOST_UNREAD)
        await serviced.service.close()
        assert model.closed
        assert len(model.fed) < 4000


async def test_closing_while_the_model_is_being_opened(make: Make) -> None:
    async with make(start=False) as serviced:
        serviced.models.gate.clear()
        await serviced.service.start()
        await serviced.until(lambda: serviced.models.attempts == 1)
        await serviced.service.close()
        assert serviced.models.opened == []
        await serviced.service.ended()


async def test_closing_what_was_never_started(make: Make) -> None:
    async with make(start=False) as serviced:
        await serviced.service.close()
        await serviced.service.ended()


async def test_closing_between_attempts(make: Make) -> None:
    async with make(refusals=(NetworkError("away"),) * 2, reconnect=3600.0) as serviced:
        await serviced.until(lambda: serviced.readiness.reason == "away")
        with pytest.raises(UnavailableError, match="away") as refused:
            serviced.service.check()
        assert refused.value.retry_after == 60
        await serviced.service.close()
        assert serviced.models.attempts == 1


async def test_a_prompt_is_given_up_between_two_passes_and_what_was_computed_is_kept(make: Make) -> None:
    async with make() as serviced:
        model = serviced.models.last
        order = Order(tuple(number % 300 for number in range(1000)), 5)
        model.gate.clear()
        reply = serviced.service.ask(order)
        await serviced.until(lambda: serviced.metrics.running == 1)
        reply.abandon()
        with pytest.raises(AbandonedError):
            await text_of(reply)
        model.gate.set()
        again = serviced.service.ask(order)
        text = await text_of(again)
        assert again.cached_tokens == model.n_batches
        assert model.fed[:2] == [(0, model.n_batches), (model.n_batches, model.n_batches)]
        await text_of(serviced.service.ask(BRIEF))
        cold = serviced.service.ask(order)
        assert await text_of(cold) == text
        assert cold.cached_tokens == 0


async def test_a_line_of_some_length(make: Make) -> None:
    async with make(queue=2) as serviced:
        model = serviced.models.last
        model.gate.clear()
        replies = [serviced.service.ask(BRIEF) for _ in range(3)]
        with pytest.raises(QueueFullError, match=r"requests are waiting already \(server.queue\)") as refused:
            serviced.service.ask(BRIEF)
        assert refused.value.retry_after >= 1
        replies[1].abandon()
        replies.append(serviced.service.ask(BRIEF))
        model.gate.set()
        for reply in replies:
            if reply is not replies[1]:
                assert await text_of(reply)
        assert serviced.metrics.requests == {"length": 3, "abandoned": 1, "queue_full": 1}
        assert (serviced.metrics.running, serviced.metrics.waiting) == (0, 0)


async def test_a_model_that_cannot_be_closed_is_forgotten_all_the_same(make: Make) -> None:
    with structlog.testing.capture_logs() as logged:
        async with make() as serviced:
            model = serviced.models.last

            async def refuse() -> None:
                raise NetworkError("no goodbye")

            model.close, closed = refuse, model.close  # type: ignore[method-assign] # a close that fails
            model.trouble = "gone"
            await serviced.until(lambda: serviced.models.attempts == 2)
            await serviced.until_ready()
            assert await text_of(serviced.service.ask(BRIEF))
            await closed()
    assert [event["reason"] for event in logged if event["event"] == "closing the model failed"] == ["no goodbye"]


def reply_of(patience: float = 30.0) -> tuple[Reply, list[Reply]]:
    stopped: list[Reply] = []
    return Reply(BRIEF, stopped.append, patience), stopped


async def test_pieces_that_were_not_read_in_time_come_together() -> None:
    reply, _ = reply_of()
    await reply.put("a")
    await reply.put("b")
    async with aclosing(reply.pieces()) as pieces:
        assert await anext(pieces) == "ab"
        await reply.put("c")
        reply.complete("stop")
        assert [piece async for piece in pieces] == ["c"]
    assert reply.finish_reason == "stop"


async def test_a_reader_that_lags_holds_the_model_up_until_it_reads() -> None:
    reply, stopped = reply_of()
    for _ in range(MOST_UNREAD - 1):
        await reply.put("x")
    full = asyncio.create_task(reply.put("y"))
    await asyncio.sleep(0.01)
    assert not full.done()
    async with aclosing(reply.pieces()) as pieces:
        assert await anext(pieces) == "x" * (MOST_UNREAD - 1) + "y"
    await full
    assert stopped == []


async def test_patience_is_for_all_waits_together() -> None:
    """A reader that reads a little now and then cannot hold the model for ever."""
    reply, stopped = reply_of(patience=0.2)
    reading = reply.pieces()
    rounds = 0
    while reply.stopped is None:
        for _ in range(MOST_UNREAD - 1):
            await reply.put("x")
        full = asyncio.create_task(reply.put("y"))
        await asyncio.wait({full}, timeout=0.05)
        if not full.done():
            await anext(reading)
        await full
        rounds += 1
    assert 2 <= rounds <= 6
    assert stopped == [reply]
    assert isinstance((await what_comes(reply))[1], StalledError)
    await reading.aclose()


async def test_the_first_reason_counts_and_comes_after_what_there_was() -> None:
    reply, stopped = reply_of()
    await reply.put("a")
    reply.stop(NetworkError("first"))
    reply.stop(NetworkError("second"))
    reply.abandon()
    pieces, error = await what_comes(reply)
    assert pieces == ["a"]
    assert str(error) == "first"
    assert stopped == [reply]
