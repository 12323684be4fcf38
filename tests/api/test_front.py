"""What every request meets before it is understood: its name, its host, its address, its connection, the page that sends it."""

import asyncio
import contextlib
import re
import socket
from typing import Any

import httpx
import pytest
import structlog

from dairllm.api.connection import BoundedConnection
from dairllm.api.health import HealthServer
from dairllm.telemetry import Readiness, WorkerMetrics
from tests.api.conftest import Serve
from tests.api.serving import Serving, dialled
from tests.patience import PATIENCE

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"prompt": "on", "max_tokens": 3}
PAGE = "https://chat.example"


def client_of(serving: Serving, **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=serving.url, headers=headers, timeout=PATIENCE)


# The name of a request.


async def test_every_answer_has_a_name(serve: Serve) -> None:
    async with serve() as serving, client_of(serving) as client:
        for method, path, body, status in (
            ("POST", COMPLETIONS, BODY, 200),
            ("POST", COMPLETIONS, {**BODY, "stream": True}, 200),
            ("POST", COMPLETIONS, {}, 400),
            ("GET", "/nowhere", None, 404),
            ("GET", COMPLETIONS, None, 405),
            ("GET", "/healthz", None, 200),
            ("GET", "/metrics", None, 200),
        ):
            named = await client.request(method, path, json=body, headers={"x-request-id": "trace-7/ü".encode()[:7]})
            assert (named.status_code, named.headers["x-request-id"]) == (status, "trace-7")
            first, second = [(await client.request(method, path, json=body)).headers["x-request-id"] for _ in range(2)]
            assert re.fullmatch("req_[0-9a-f]{24}", first)
            assert first != second


async def test_a_name_that_could_do_harm_is_not_taken(serve: Serve) -> None:
    async with serve() as serving, asyncio.timeout(PATIENCE):
        for given in (b"", b"two words", b"x" * 129, "ü".encode(), b"\x1b[31m"):
            request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-Id: %b\r\n\r\n" % given
            async with dialled(serving, request) as (reader, _):
                answer = await reader.read()
            assert re.search(rb"\r\nx-request-id: req_[0-9a-f]{24}\r\n", answer), given
            assert not given or given not in answer


async def test_the_log_has_it(serve: Serve) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logged:
        async with serve() as serving, client_of(serving) as client:
            await client.post(COMPLETIONS, json=BODY, headers={"x-request-id": "one"})
            await client.post(COMPLETIONS, json={"prompt": 5}, headers={"x-request-id": "two"})
            await client.get("/v1/models", headers={"x-request-id": "three"})
            await client.post("/v1/embeddings", json={}, headers={"x-request-id": "four"})
    told = [(event["event"], event["request_id"]) for event in logged if "request_id" in event]
    assert told == [("answered", "one"), ("refused", "two"), ("refused", "four")]
    assert [event["status"] for event in logged if event["event"] == "refused"] == [400, 404]


async def test_openais_client_shows_it(serve: Serve) -> None:
    async with serve() as serving:
        answer = await serving.client.completions.create(model="small", prompt="on", max_tokens=3)
    assert str(answer._request_id).startswith("req_")


# The host that is meant.


OURS = (
    "localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000", "10.0.0.7:8000", "[fe80::1]",
    "models.localhost:80", "ai.example", "AI.example:443", socket.gethostname(),
)  # fmt: skip
NOT_OURS = (
    "attacker.example", "attacker.example:8123", "localhost.attacker.example", "127.0.0.1.attacker.example", "xlocalhost", "x"
)  # fmt: skip


async def test_another_host_is_refused_on_a_loopback_address(serve: Serve) -> None:
    async with serve(hosts=["ai.example"]) as serving, client_of(serving) as client:
        for host in OURS:
            assert (await client.get("/v1/models", headers={"host": host})).status_code == 200, host
        for host in NOT_OURS:
            for method, path in (("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/metrics")):
                answer = await client.request(method, path, headers={"host": host})
                assert answer.status_code == 421
                error = answer.json()["error"]
                assert error["code"] == "misdirected_request"
                assert error["message"].startswith(f"the host {host!r} is no name of this server")
        assert serving.models.last.fed == []


async def test_who_names_no_host_is_no_browser(serve: Serve) -> None:
    async with serve() as serving, dialled(serving, b"GET /v1/models HTTP/1.0\r\n\r\n") as (reader, _), asyncio.timeout(PATIENCE):
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 421), ("0.0.0.0", 200)])  # noqa: S104 - for the time of a test
async def test_a_workers_health_likewise(host: str, status: int) -> None:
    server = HealthServer(host, 0, Readiness(None), WorkerMetrics())
    port = await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.get("/metrics", headers={"host": "attacker.example"})).status_code == status
        assert (await client.get("/metrics")).status_code == 200
    await server.close()


# The address.


async def test_slashes_too_many(serve: Serve) -> None:
    async with serve() as serving, client_of(serving) as client:
        for path in ("/v1/completions/", "//v1/completions", "/v1//completions//", "///v1/completions"):
            assert (await client.post(f"{serving.url}{path}", json=BODY)).status_code == 200
        for path in ("//v1/models", "/v1/models/", "/v1/models/small/", "//healthz", "/metrics/"):
            assert (await client.get(f"{serving.url}{path}")).status_code == 200


# Web pages.


async def test_a_page_that_sends_unasked_is_not_computed_for(serve: Serve) -> None:
    body = b'{"prompt": "on", "max_tokens": 3}'
    async with serve(cors_origins=[PAGE]) as serving, client_of(serving) as client:
        kinds = ("text/plain", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "application/jsonp", "")
        for kind in kinds:
            for origin in ("https://evil.example", PAGE, "null"):
                answer = await client.post(COMPLETIONS, content=body, headers={"origin": origin, "content-type": kind})
                assert answer.status_code == 415
                assert answer.json()["error"]["code"] == "unsupported_media_type"
        assert serving.models.last.fed == []
        for kind in kinds:
            assert (await client.post(COMPLETIONS, content=body, headers={"content-type": kind})).status_code == 200, "no page"
        headers = {"content-type": "Application/JSON; charset=utf-8", "origin": "https://evil.example"}
        assert (await client.post(COMPLETIONS, content=body, headers=headers)).status_code == 200, "a browser asks first"


ASKING = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


async def test_no_page_may_read_by_default(serve: Serve) -> None:
    async with serve() as serving, client_of(serving) as client:
        asked, posted = await client.options(CHAT, headers=ASKING), await client.post(COMPLETIONS, json=BODY, headers={"origin": PAGE})
    assert (asked.status_code, posted.status_code) == (405, 200)
    assert not any(name.startswith("access-control-") for answer in (asked, posted) for name in answer.headers)


@pytest.mark.parametrize(("origins", "allowed"), [([PAGE, "http://localhost:3000"], PAGE), (["*"], "*")], ids=["some", "all"])
async def test_a_page_that_may(origins: list[str], allowed: str, serve: Serve) -> None:
    async with serve(cors_origins=origins) as serving, client_of(serving, origin=PAGE) as client:
        asked = await client.options(CHAT, headers={**ASKING, "access-control-request-private-network": "true"})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == allowed
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert asked.headers["access-control-allow-headers"] == "authorization,content-type"
        assert asked.headers["access-control-allow-private-network"] == "true"
        for body, status in ((BODY, 200), ({**BODY, "stream": True}, 200), ({}, 400)):
            answer = await client.post(COMPLETIONS, json=body)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == allowed
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
            assert answer.headers["x-request-id"]


async def test_a_page_that_may_not(serve: Serve) -> None:
    async with serve(cors_origins=[PAGE]) as serving, client_of(serving, origin="https://evil.example") as client:
        asked = await client.options(CHAT, headers={**ASKING, "origin": "https://evil.example"})
        assert asked.status_code == 403
        assert asked.json()["error"]["code"] == "origin_not_allowed"
        posted = await client.post(COMPLETIONS, json=BODY)
        assert not any(name == "access-control-allow-origin" for answer in (asked, posted) for name in answer.headers)


# Connections.

IDLE = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Hasty(BoundedConnection):
    head_seconds = 0.2


async def test_a_connection_outlives_the_clients_patience(serve: Serve) -> None:
    """The time for a request's head begins with its first byte, not with the end of the request before."""
    async with serve(connection=Hasty, keep_alive=60.0) as serving, dialled(serving, IDLE) as (reader, writer), asyncio.timeout(PATIENCE):
        assert b" 200 OK" in await reader.readuntil(b'{"status":"ok"}')
        await asyncio.sleep(0.6)  # three times what a head may take
        writer.write(IDLE)
        assert b" 200 OK" in await reader.readuntil(b'{"status":"ok"}')
        writer.write(IDLE[:10])
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(1)


async def test_one_connection_more_takes_the_place_of_the_one_that_has_idled_longest(serve: Serve) -> None:
    async with serve(connections=2) as serving, contextlib.AsyncExitStack() as others, asyncio.timeout(PATIENCE):
        readers = []
        for _ in range(3):
            reader, _writer = await others.enter_async_context(dialled(serving, IDLE))
            assert b" 200 OK" in await reader.readuntil(b'{"status":"ok"}')
            readers.append(reader)
        assert await readers[0].read() == b""
        assert not readers[1].at_eof()


async def test_where_none_idles_one_more_is_told(serve: Serve) -> None:
    async with serve(connections=2) as serving, asyncio.timeout(PATIENCE):
        serving.models.last.gate.clear()
        async with client_of(serving) as client:
            busy = [asyncio.create_task(client.post(COMPLETIONS, json=BODY)) for _ in range(2)]
            await serving.until(lambda: serving.metrics.running + serving.metrics.waiting == 2)
            async with dialled(serving, IDLE) as (reader, _):
                answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b'"code":"overloaded"' in answer
            assert b"retry-after: 1" in answer
            serving.models.last.gate.set()
            assert [answer.status_code for answer in await asyncio.gather(*busy)] == [200, 200]
