"""A worker says what a C++ worker says, and nothing that comes to its door keeps it from serving the next root."""

import asyncio
import contextlib
import re
from typing import Any

import numpy as np
import pytest

from dairllm.graph.types import FloatType
from dairllm.protocol.dllama.codec import Greeting, Peer, encode_greeting
from dairllm.protocol.dllama.worker import Stage
from dairllm.protocol.stream import READ_AHEAD
from tests.cluster.conftest import load_recording
from tests.patience import PATIENCE, until

ACKS = 4 * b"\xaa\xaag\x01"
F32_TOLERANCE = 1e-4
MEAN_TOLERANCE, ROW_TOLERANCE = 0.012, 0.035


def values(kind: FloatType, row: bytes) -> np.ndarray:
    if kind == FloatType.F32:
        return np.frombuffer(row, "<f4")
    blocks = np.frombuffer(row, np.uint8).reshape(-1, 34)
    return (blocks[:, 2:].view(np.int8) * blocks[:, :2].copy().view("<f2").astype(np.float32)).ravel()


def differences(recording: Any, answered: bytes) -> np.ndarray:
    """Relative L2 distance of each row from the C++ worker's."""
    at, found = len(ACKS), []
    for kind, nbytes in recording.rows_answered():
        ours, theirs = values(kind, answered[at : at + nbytes]), values(kind, recording.answered[at : at + nbytes])
        found.append(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        at += nbytes
    assert at == len(recording.answered)
    return np.array(found)


def events(logged: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [entry for entry in logged if entry["event"] == event]


async def serves(worker: Any, recording: Any, play: Any) -> None:
    """The worker answers a recorded root as it should, once the one before is over."""
    async with asyncio.timeout(PATIENCE):
        while worker.metrics.sessions_running:  # noqa: ASYNC110 - a metric, which nobody can wait for
            await asyncio.sleep(0.01)
        answered = await play(worker.address, recording.said)
    assert len(answered) == len(recording.answered)
    assert answered.startswith(ACKS)


async def test_recorded_roots_one_after_the_other(worker: Any, recordings: Any, play: Any) -> None:
    for recording in recordings:
        answered = await play(worker.address, recording.said)
        assert len(answered) == len(recording.answered), recording.name
        assert answered.startswith(ACKS)
        away = differences(recording, answered)
        if recording.name == "llama_f32":
            assert away.max() < F32_TOLERANCE
        else:
            assert away.mean() < MEAN_TOLERANCE, recording.name
            assert np.quantile(away, 0.99) < ROW_TOLERANCE, recording.name
    assert worker.metrics.sessions == {"finished": len(recordings)}
    assert worker.metrics.rows == 64 * len(recordings)
    assert worker.metrics.sessions_running == 0


async def test_a_root_whose_configuration_is_longer_than_what_is_read_ahead(make_worker: Any, logged: Any, play: Any) -> None:
    """64 layers, recorded as far as their weights. All of it has come before the worker looks, as on a busy machine."""
    worker = await make_worker(deadlines={"configuration": "5s"})
    recording = load_recording("deep64")
    assert len(recording.said) > 2 * READ_AHEAD
    async with asyncio.timeout(60):
        assert await play(worker.address, recording.said, hang_up=True) == recording.answered == ACKS[:12]
    (failed,) = events(logged, "session failed")
    assert failed["stage"] == "weights"
    assert "closed the connection; expecting " in failed["error"]


@pytest.mark.parametrize("faults", [{"chunk": 5}, {"chunk": 1000, "pause": 0.001}])
async def test_a_root_over_a_bad_line(worker: Any, recording: Any, play: Any, make_proxy: Any, faults: dict[str, Any]) -> None:
    proxy = await make_proxy(worker.address, **faults)
    whole = await play(worker.address, recording.said)
    assert await play(("127.0.0.1", proxy.port), recording.said) == whole


@pytest.mark.parametrize(
    "said", [b"", b"\0", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-x\r\n", bytes(64), b"\xff" * 64, b"\x16\x03\x01\x02"]
)
async def test_strangers_cost_a_log_line(worker: Any, logged: Any, recording: Any, play: Any, said: bytes) -> None:
    async with asyncio.timeout(PATIENCE):
        assert await play(worker.address, said, hang_up=True) == b""
    await serves(worker, recording, play)
    (refused,) = events(logged, "connection refused")
    assert refused["kind"] == "stranger"
    assert "127.0.0.1" in refused["peer"]
    assert worker.metrics.refused == {"stranger": 1}


async def test_a_silent_stranger_keeps_nobody_out_and_is_sent_away(make_worker: Any, logged: Any, recording: Any, play: Any) -> None:
    worker = await make_worker(deadlines={"handshake": "1s"})
    reader, writer = await asyncio.open_connection(*worker.address)
    await serves(worker, recording, play)
    async with asyncio.timeout(PATIENCE):
        assert await reader.read() == b""
    writer.close()
    (refused,) = events(logged, "connection refused")
    assert refused["reason"] == "it did not introduce itself within 1s"


async def test_a_stranger_who_whispers_is_sent_away_too(make_worker: Any, play: Any, recording: Any) -> None:
    """A byte now and then does not move the deadline of the greeting."""
    worker = await make_worker(deadlines={"handshake": "200ms"})
    reader, writer = await asyncio.open_connection(*worker.address)
    peers = tuple(Peer(f"worker-{number}.a-long-name.invalid", 9990) for number in range(60))
    greeting, said = encode_greeting(Greeting(61, 0, peers)), 0
    with contextlib.suppress(OSError, RuntimeError):  # uvloop's word for writing to what is closed
        while not reader.at_eof() and said < len(greeting):
            writer.write(greeting[said : said + 1])
            said += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    assert await reader.read(1) == b""
    assert said < len(greeting)
    writer.close()


async def test_too_many_strangers_are_sent_away_at_once(make_worker: Any, logged: Any, recording: Any, play: Any) -> None:
    worker = await make_worker(limits={"strangers": 3})
    streams = [await asyncio.open_connection(*worker.address) for _ in range(5)]
    async with asyncio.timeout(PATIENCE):
        assert await streams[3][0].read() == await streams[4][0].read() == b""
    for _, writer in streams:
        writer.close()
    await until(lambda: worker.metrics.refused == {"crowd": 2, "stranger": 3})
    await serves(worker, recording, play)


STAGES = [Stage.GREETING, Stage.GO, Stage.NETWORK, Stage.NODE, Stage.WEIGHTS, Stage.CONTROL, Stage.ROWS]


def into(stage: Stage) -> int:
    """Bytes that lie in the middle of what a stage waits for."""
    return {Stage.GREETING: 2, Stage.GO: 2, Stage.CONTROL: 3}.get(stage, 60)


@pytest.mark.parametrize("stage", STAGES)
async def test_a_root_that_leaves_ends_its_own_session_only(
    worker: Any, logged: Any, recording: Any, play: Any, make_proxy: Any, stage: Stage
) -> None:
    proxy = await make_proxy(worker.address, cut_after=recording.offset_of(stage, into(stage)))
    async with asyncio.timeout(PATIENCE):
        await play(("127.0.0.1", proxy.port), recording.said)
    await serves(worker, recording, play)
    (line,) = events(logged, "connection refused" if stage is Stage.GREETING else "session failed")
    assert "closed the connection; expecting " in line.get("error", line.get("reason"))
    assert line.get("stage", "greeting") == stage.value


@pytest.mark.parametrize("stage", STAGES[1:])
async def test_a_root_that_is_cut_off_ends_its_own_session_only(
    worker: Any, logged: Any, recording: Any, play: Any, make_proxy: Any, stage: Stage
) -> None:
    proxy = await make_proxy(worker.address, reset_after=recording.offset_of(stage, into(stage)))
    async with asyncio.timeout(PATIENCE):
        await play(("127.0.0.1", proxy.port), recording.said)
    await serves(worker, recording, play)
    (line,) = events(logged, "session failed") or events(logged, "connection refused")
    assert "; expecting " in line.get("error", line.get("reason"))


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage is not Stage.CONTROL])
async def test_a_root_that_falls_silent_costs_a_deadline(
    make_worker: Any, logged: Any, recording: Any, play: Any, make_proxy: Any, stage: Stage
) -> None:
    worker = await make_worker(deadlines=dict.fromkeys(("handshake", "mesh", "configuration", "weights", "exchange"), "150ms"))
    proxy = await make_proxy(worker.address, stall_after=recording.offset_of(stage, 2))
    async with asyncio.timeout(PATIENCE):
        await play(("127.0.0.1", proxy.port), recording.said)
    await serves(worker, recording, play)
    if stage is Stage.GREETING:
        assert "did not introduce itself within 150ms" in events(logged, "connection refused")[0]["reason"]
    else:
        (failed,) = events(logged, "session failed")
        assert "was silent for 150ms; expecting " in failed["error"]
        assert failed["stage"] == stage.value


async def test_a_root_that_restarts_need_not_come_twice(worker: Any, recording: Any, play: Any) -> None:
    """The old connection has ended, but its session is still being seen off when the new one introduces itself."""
    _, writer = await asyncio.open_connection(*worker.address)
    writer.write(recording.said[: recording.offset_of(Stage.WEIGHTS, 60)])
    writer.write_eof()
    await asyncio.sleep(0.003)
    async with asyncio.timeout(PATIENCE):
        answered = await play(worker.address, recording.said)
    assert len(answered) == len(recording.answered)
    writer.close()
    assert worker.metrics.sessions == {"RemoteProtocolError": 1, "finished": 1}


async def test_an_idle_root_is_waited_for(make_worker: Any, recording: Any) -> None:
    worker = await make_worker(deadlines=dict.fromkeys(("handshake", "mesh", "configuration", "weights", "exchange"), "100ms"))
    reader, writer = await asyncio.open_connection(*worker.address)
    at = recording.offset_of(Stage.CONTROL)
    writer.write(recording.said[:at])
    await reader.readexactly(16)
    await asyncio.sleep(0.4)
    writer.write(recording.said[at:])
    async with asyncio.timeout(PATIENCE):
        assert len(await reader.read()) == len(recording.answered) - 16
    writer.close()


async def test_a_second_root_is_closed_at_once(worker: Any, logged: Any, recording: Any, play: Any) -> None:
    reader, writer = await asyncio.open_connection(*worker.address)
    writer.write(recording.said[: recording.offset_of(Stage.WEIGHTS)])
    await reader.readexactly(12)
    async with asyncio.timeout(PATIENCE):  # what is not closed at once waits for the first root
        assert await play(worker.address, recording.said) == b""
    (refused,) = events(logged, "connection refused")
    assert refused["reason"].startswith("another root is being served")
    writer.write(recording.said[recording.offset_of(Stage.WEIGHTS) :])
    async with asyncio.timeout(PATIENCE):
        assert len(await reader.read()) == len(recording.answered) - 12
    writer.close()
    assert worker.metrics.refused == {"busy": 1}


async def test_a_graph_beyond_the_memory_allowed_is_refused_with_the_numbers(
    make_worker: Any, logged: Any, recording: Any, play: Any
) -> None:
    worker = await make_worker(limits={"memory": "1MiB"})
    async with asyncio.timeout(PATIENCE):
        assert await play(worker.address, recording.said) == ACKS[:8]
    (failed,) = events(logged, "session failed")
    assert failed["kind"] == "LimitError"
    assert failed["error"].startswith("the memory limit 1MiB is too small: ")
    assert re.search(r"; [\d.]+MiB would do\. A shorter context \(--max-seq-len of the root, now 256\)", failed["error"])


async def test_closing_a_worker_that_waits(make_worker: Any) -> None:
    worker = await make_worker()
    reader, writer = await asyncio.open_connection(*worker.address)
    await asyncio.sleep(0.02)
    async with asyncio.timeout(PATIENCE):
        await worker.worker.close()
        assert await reader.read() == b""
    writer.close()
    with pytest.raises(OSError, match="Connect"):
        await asyncio.open_connection(*worker.address)


@pytest.mark.parametrize("stage", STAGES[1:])
async def test_closing_a_worker_ends_a_session_at_any_stage(make_worker: Any, logged: Any, recording: Any, stage: Stage) -> None:
    worker = await make_worker(deadlines={"shutdown": "100ms"})
    reader, writer = await asyncio.open_connection(*worker.address)
    writer.write(recording.said[: recording.offset_of(stage)])
    acknowledged = {Stage.GO: 1, Stage.NETWORK: 1, Stage.NODE: 2, Stage.WEIGHTS: 3}.get(stage, 4)
    async with asyncio.timeout(PATIENCE):  # other work may keep the processors
        await reader.readexactly(4 * acknowledged)
    await asyncio.sleep(0.1)
    async with asyncio.timeout(PATIENCE):
        await worker.worker.close()
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
    writer.close()
    (stopped,) = events(logged, "session stopped")
    assert stopped["stage"] == stage.value
    assert worker.metrics.sessions == {"stopped": 1}


async def test_closing_a_worker_finishes_the_token_in_hand(make_worker: Any, logged: Any, recording: Any) -> None:
    """The root's rows are held back until the worker has been told to stop."""
    worker = await make_worker()
    reader, writer = await asyncio.open_connection(*worker.address)
    at = recording.offset_of(Stage.ROWS)
    writer.write(recording.said[:at])
    await reader.readexactly(16)
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(worker.worker.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    writer.write(recording.said[at:])
    async with asyncio.timeout(PATIENCE):
        await closing
        rest = b""
        with contextlib.suppress(ConnectionResetError):
            while data := await reader.read(1 << 20):
                rest += data
    writer.close()
    assert len(rest) >= 32 * 2 * 68  # the first batch at least: 32 rows of two slices and more
    (finished,) = events(logged, "session finished")
    assert finished["rows"] == 32
