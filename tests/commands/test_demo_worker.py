"""The demonstration's worker: a process with a port, a log and an end."""

import os
import signal

import pytest

from dairllm.commands.demo_worker import DemoWorker
from dairllm.errors import NetworkError


async def test_from_start_to_stop() -> None:
    worker = DemoWorker(threads=1, kernels="auto")
    assert worker.peak_rss_bytes == 0
    address = await worker.start()
    try:
        assert address.host == "127.0.0.1"
        assert address.port > 0
        assert worker.peak_rss_bytes > 50 * 2**20
        assert not worker.has_ended
    finally:
        await worker.stop()
    assert worker.has_ended
    assert worker.peak_rss_bytes == 0
    assert '"shutting down"' in worker.last_words()
    await worker.stop()


async def test_one_that_cannot_start_says_why() -> None:
    worker = DemoWorker(threads=1, kernels="sse")
    with pytest.raises(NetworkError, match=r"^a worker of the demonstration ended with exit code 2; its log ends: .*--kernels"):
        await worker.start()
    await worker.stop()


async def test_one_that_does_not_listen_to_reason_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dairllm.commands.demo_worker.STOP_SECONDS", 0.2)
    worker = DemoWorker(threads=1, kernels="auto")
    await worker.start()
    process = worker.pid
    os.kill(process, signal.SIGSTOP)
    await worker.stop()
    assert worker.has_ended
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


async def test_one_that_was_never_started_is_stopped() -> None:
    await DemoWorker(threads=1, kernels="auto").stop()
