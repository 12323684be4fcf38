"""A model that is lost: who asks is told why, and it is found again."""

import asyncio
from typing import Any

import httpx
import openai
import pytest
import structlog

from dairllm.errors import NetworkError, RemoteProtocolError
from dairllm.runtime.node_status import NodeStatus
from tests.api.conftest import Serve
from tests.api.serving import Serving

LOST = "worker 10.0.0.2:9990 (node 1), ready, position 7: the other end closed the connection"
AWAY = "worker 10.0.0.2:9990 (node 1) cannot be reached"


async def complete(serving: Serving, prompt: str = "on", **fields: Any) -> Any:
    return await serving.client.completions.create(model="small", prompt=prompt, **{"max_tokens": 12, **fields})


async def readiness(serving: Serving) -> tuple[int, str | None]:
    async with httpx.AsyncClient(base_url=serving.url) as client:
        answer = await client.get("/readyz")
        assert (await client.get("/healthz")).status_code == 200
    return answer.status_code, answer.json().get("reason")


async def test_before_the_model_is_there(serve: Serve) -> None:
    async with serve(held=True) as serving:
        assert await readiness(serving) == (503, "connecting to nobody")
        with pytest.raises(openai.InternalServerError) as refused:
            await complete(serving)
        error = refused.value
        assert (error.status_code, error.code, error.type) == (503, "service_unavailable", "server_error")
        assert error.body == {"message": "connecting to nobody", "type": "server_error", "param": None, "code": "service_unavailable"}
        assert error.response.headers["retry-after"] == "1"
        assert (await serving.client.models.list()).data
        serving.models.gate.set()
        await serving.until_ready()
        assert await readiness(serving) == (200, None)
        assert (await complete(serving)).choices[0].text


async def test_workers_that_come_late_are_waited_for(serve: Serve) -> None:
    """What is the matter is logged when it changes."""
    refusals = [NetworkError(AWAY)] * 3 + [RemoteProtocolError("worker 10.0.0.2:9990: no worker")] + [NetworkError(AWAY)] * 2
    with structlog.testing.capture_logs() as logged:
        async with serve(refusals=refusals) as serving:
            assert serving.models.attempts == 7
            assert (await complete(serving)).choices[0].text
    told = [event["reason"] for event in logged if event["event"] == "model not available"]
    assert told == [AWAY, "worker 10.0.0.2:9990: no worker", AWAY]


@pytest.mark.parametrize("error", [NetworkError(LOST), RemoteProtocolError(LOST)], ids=lambda error: type(error).__name__)
async def test_a_model_that_is_lost_in_the_middle(error: Exception, serve: Serve) -> None:
    async with serve() as serving:
        healthy = (await complete(serving)).choices[0].text
        model, models = serving.models.last, serving.models
        model.failure, model.fails_in = error, 5
        models.refusals += [NetworkError(AWAY)] * 2
        model.gate.clear()
        tasks = [asyncio.create_task(complete(serving)) for _ in range(5)]
        await serving.until(lambda: serving.metrics.waiting == 4)
        models.gate.clear()
        model.gate.set()
        await serving.until(lambda: serving.readiness.reason is not None and model.closed)
        assert await readiness(serving) == (503, LOST)
        tasks.append(asyncio.create_task(complete(serving)))
        await serving.until(lambda: serving.metrics.waiting == 6)
        assert not any(task.done() for task in tasks)
        models.gate.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.choices[0].text for answer in answers] == [healthy] * 6
        assert answers[0].usage.prompt_tokens_details.cached_tokens == 0, "the new model holds nothing"
        assert len(models.opened) == 2
        assert models.last is not model
        assert (serving.metrics.losses, serving.metrics.begun_again) == (1, 1)
        assert serving.metrics.requests == {"length": 7}
        assert await readiness(serving) == (200, None)


async def test_readiness_says_how_long_requests_wait(serve: Serve) -> None:
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:
        serving.models.gate.clear()
        serving.models.last.trouble = LOST
        await serving.until(lambda: serving.readiness.reason is not None)
        told = (await client.get("/readyz")).json()
        assert told.pop("requests_wait") in ("1m", *(f"{seconds}s" for seconds in range(20, 60)))
        assert told == {"status": "unavailable", "reason": LOST}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_model_that_does_not_come_back_in_time(streamed: bool, serve: Serve) -> None:
    """All that wait are told; whoever comes later is told at once."""
    async with serve(recovery=0.3, reconnect=0.05) as serving:
        model, models = serving.models.last, serving.models
        model.failure = NetworkError(LOST)
        models.refusals += [NetworkError(AWAY)] * 100_000
        late = f"{AWAY}; the model was not back within 300ms (deadlines.recovery)"
        for result in await asyncio.gather(*(complete(serving, stream=streamed) for _ in range(3)), return_exceptions=True):
            if streamed:
                assert not isinstance(result, BaseException)
                with pytest.raises(openai.APIError, match="not back within 300ms") as failed:
                    [chunk async for chunk in result]
                assert failed.value.code == "service_unavailable"
            else:
                assert isinstance(result, openai.InternalServerError), result
                assert (result.status_code, result.code) == (503, "service_unavailable")
                assert late in result.message
        assert serving.metrics.requests == {"unavailable": 3}
        with pytest.raises(openai.InternalServerError) as refused:
            await complete(serving, stream=streamed)
        assert refused.value.status_code == 503
        assert await readiness(serving) == (503, AWAY)
        models.refusals.clear()
        await serving.until_ready()
        assert (await complete(serving)).choices[0].text


async def test_a_request_that_the_model_does_not_survive_is_begun_twice(serve: Serve) -> None:
    """Then it is told, and those behind it are answered."""
    async with serve() as serving:
        models = serving.models
        models.last.failure = NetworkError(LOST)
        models.failures.append(NetworkError(LOST))
        models.last.gate.clear()
        first = asyncio.create_task(complete(serving))
        await serving.until(lambda: serving.metrics.running == 1)
        second = asyncio.create_task(complete(serving, "two"))
        await serving.until(lambda: serving.metrics.waiting == 1)
        models.last.gate.set()
        with pytest.raises(openai.InternalServerError, match="the other end closed"):
            await first
        assert (await second).choices[0].text
        assert len(models.opened) == 3
        assert serving.metrics.requests == {"unavailable": 1, "length": 1}


async def test_who_goes_away_while_the_model_is_recovered_is_forgotten(serve: Serve) -> None:
    async with serve() as serving:
        models = serving.models
        models.last.failure = NetworkError(LOST)
        models.gate.clear()
        tasks = [asyncio.create_task(complete(serving)) for _ in range(2)]
        await serving.until(lambda: serving.metrics.waiting == 2)
        for task in tasks:
            task.cancel()
        await serving.until(lambda: serving.metrics.waiting == 0)
        models.gate.set()
        await serving.until_ready()
        assert serving.metrics.requests == {"abandoned": 2}
        assert models.last.fed == []


async def test_why_it_does_not_come_back_is_told(serve: Serve) -> None:
    async with serve(reconnect=0.05, recovery=1.0) as serving:
        model, models = serving.models.last, serving.models
        model.failure = NetworkError(LOST)
        models.refusals += [NetworkError(AWAY)] * 1000
        with pytest.raises(openai.InternalServerError, match="cannot be reached; the model was not back"):
            await complete(serving)
        assert serving.readiness.reason == AWAY
        with pytest.raises(openai.InternalServerError, match="cannot be reached"):
            await complete(serving)
        models.refusals.clear()
        await serving.until_ready()
        assert (await complete(serving)).choices[0].text


async def test_a_stream_that_has_begun_ends_with_the_reason(serve: Serve) -> None:
    async with serve() as serving:
        model = serving.models.last
        model.failure, model.fails_in = NetworkError(LOST), 8
        stream = await complete(serving, stream=True, max_tokens=100)
        assert (await anext(stream)).choices[0].text
        with pytest.raises(openai.APIError, match="the other end closed") as failed:
            [chunk async for chunk in stream]
        assert failed.value.code == "service_unavailable"
        assert not isinstance(failed.value, openai.APIConnectionError)
        await serving.until_ready()
        assert (await complete(serving)).choices[0].text


async def test_a_stream_that_has_not_begun_waits(serve: Serve) -> None:
    async with serve() as serving:
        healthy = (await complete(serving)).choices[0].text
        serving.models.last.failure = NetworkError(LOST)
        chunks = [chunk async for chunk in await complete(serving, stream=True)]
        assert "".join(chunk.choices[0].text for chunk in chunks) == healthy
        assert serving.metrics.begun_again == 1


async def test_the_events_of_such_a_stream(serve: Serve) -> None:
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:
        model = serving.models.last
        model.failure, model.fails_in = NetworkError(LOST), 30
        answer = await client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "max_tokens": 90, "stream": True}
        )
    assert answer.status_code == 200
    *_, last, done, nothing = answer.text.split("\n\n")
    assert last == f'data: {{"error":{{"message":"{LOST}","type":"server_error","param":null,"code":"service_unavailable"}}}}'
    assert (done, nothing) == ("data: [DONE]", "")


async def test_a_worker_that_goes_away_while_nothing_is_asked(serve: Serve) -> None:
    async with serve() as serving:
        model = serving.models.last
        serving.models.gate.clear()
        model.trouble = "worker 10.0.0.2:9990 (node 1) closed the connection"
        await serving.until(lambda: serving.readiness.reason is not None)
        assert await readiness(serving) == (503, "worker 10.0.0.2:9990 (node 1) closed the connection")
        serving.models.gate.set()
        await serving.until_ready()
        assert len(serving.models.opened) == 2
        assert (await complete(serving)).choices[0].text


async def test_a_defect_is_the_requests_alone(serve: Serve) -> None:
    """It is logged with all that is known; others get no details, and the model, whose state nobody knows, is opened anew."""
    with structlog.testing.capture_logs() as logged:
        async with serve() as serving:
            serving.models.last.failure = ZeroDivisionError("by zero")
            with pytest.raises(openai.InternalServerError, match=r"a defect of this program \(ZeroDivisionError\); its log says more"):
                await complete(serving)
            await serving.until_ready()
            assert (await complete(serving)).choices[0].text
    (event,) = [event for event in logged if event["log_level"] == "error"]
    assert event["exc_info"]


async def test_bytes_of_each_worker_are_added_up_over_all_models(serve: Serve) -> None:
    async with serve() as serving, httpx.AsyncClient(base_url=serving.url) as client:

        async def scraped() -> dict[str, float]:
            lines = (await client.get("/metrics")).text.splitlines()
            return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("dairllm_worker")}

        def report(sent: int, received: int, weights: int) -> tuple[NodeStatus, ...]:
            own, worker = ("", "dairllm"), ("10.0.0.2:9990", "dllama")
            sizes, counts = (2, 1, 64), (sent, received, weights)
            return NodeStatus(0, *own, *sizes, *counts), NodeStatus(1, *worker, *sizes, *counts)  # type: ignore[arg-type] # kinds

        assert await scraped() == {}
        first = serving.models.last
        first.reports = report(10, 20, 30)
        labels = 'address="10.0.0.2:9990"'
        sent, received = (f'dairllm_worker_bytes_total{{{labels},direction="{way}",node="1"}}' for way in ("sent", "received"))
        weights = f'dairllm_worker_weight_bytes_total{{{labels},node="1"}}'
        assert await scraped() == {sent: 10, received: 20, weights: 30}
        first.failure = NetworkError(LOST)
        assert (await complete(serving)).choices[0].text
        assert await scraped() == {sent: 10, received: 20, weights: 30}
        serving.models.last.reports = report(1, 2, 3)
        assert await scraped() == {sent: 11, received: 22, weights: 33}
