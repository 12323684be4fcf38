"""What is taken is given back, however it ends: 200 clusters that cannot be opened, 200 roots that are lost, workers lost in a pass."""

import asyncio
import contextlib
import gc
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dairllm import machine
from dairllm.cluster.cluster import Cluster
from dairllm.config import RootDeadlines, WorkerAddress
from dairllm.engine.program import Program
from dairllm.errors import NetworkError, RemoteProtocolError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.runtime.compute import Compute
from tests.cluster.conftest import MakeWorker, Recording

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

TIMES = 200
GROWTH_BYTES = 6 << 20
"""Of the process, beyond which something is kept: a session of these models takes some 100 KiB and more."""


class Held(NamedTuple):
    """By this process."""

    descriptors: int
    maps: int
    threads: int
    tasks: int
    resident: int

    @classmethod
    def now(cls) -> "Held":
        machine.give_back_memory()
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        # a loop's own threads come as they are wanted, up to a number, and stay
        threads = sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())
        return cls(len(os.listdir("/proc/self/fd")), maps, threads, len(asyncio.all_tasks()), machine.rss_bytes())

    def check(self, before: "Held") -> None:
        """That no more is held than before: of maps a few, since the C library's heaps come and go."""
        assert self.descriptors <= before.descriptors
        assert self.threads <= before.threads + 1  # one that was waited for may be about to end
        assert self.tasks <= before.tasks
        assert self.maps <= before.maps + TIMES // 10
        assert self.resident - before.resident < GROWTH_BYTES


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """What is held by circles of references counts as held: their end may be hours away."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFile]:
    path = tmp_path_factory.mktemp("leaks") / "m.m"
    write_random_model(path, small_spec(seq_len=512))
    with ModelFile.open(path) as file:
        yield file


async def test_what_an_opening_took(model: ModelFile, compute: Compute[Program]) -> None:
    """The worker is not there, as when it is switched off over night."""
    port = free_port()

    async def attempt() -> None:
        cluster = Cluster(model, [WorkerAddress("127.0.0.1", port)], compute, n_threads=1)
        with pytest.raises(NetworkError):
            await cluster.open()

    for _ in range(20):
        await attempt()
    before = Held.now()
    for _ in range(TIMES):
        await attempt()
    Held.now().check(before)


async def test_what_a_root_took(make_worker: MakeWorker, recording: Recording) -> None:
    """It is reset in the middle of a pass."""
    worker = await make_worker()
    loop = asyncio.get_running_loop()

    async def lose() -> None:
        with socket.socket() as root:
            root.setblocking(False)
            await loop.sock_connect(root, worker.address)
            await loop.sock_sendall(root, recording.said[:-100])
            left = len(recording.answered) // 2
            while left > 0:
                left -= len(await loop.sock_recv(root, left))
            root.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        async with asyncio.timeout(60):
            while worker.worker._serving is not None:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.002)

    for _ in range(20):
        await lose()
    before = Held.now()
    for _ in range(TIMES):
        await lose()
    Held.now().check(before)
    assert worker.metrics.sessions.total() == TIMES + 20
    assert not worker.metrics.sessions["finished"] + worker.metrics.sessions["bug"]


async def test_what_a_cluster_took_that_lost_a_worker(model: ModelFile, compute: Compute[Program], make_worker: MakeWorker) -> None:
    """In the middle of a pass; root and worker are this very process."""
    worker = await make_worker()

    async def lose() -> None:
        cluster = Cluster(model, [WorkerAddress("127.0.0.1", worker.port)], compute, n_threads=1, deadlines=RootDeadlines())
        await cluster.open()
        await cluster.feed([1, 2, 3], 0, logits=True)
        assert worker.worker._root is not None
        asyncio.get_running_loop().call_soon(worker.worker._root.abort)
        with contextlib.suppress(NetworkError, RemoteProtocolError):
            await cluster.feed([4] * 32, 3, logits=True)
        await cluster.close()
        async with asyncio.timeout(60):
            while worker.worker._serving is not None:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.002)

    for _ in range(5):
        await lose()
    before = Held.now()
    for _ in range(TIMES // 5):
        await lose()
    Held.now().check(before)
