"""A worker that hangs or goes is noticed, named, and looked for, and the others are left alone meanwhile."""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dairllm.cluster.cluster import Cluster
from dairllm.cluster.cluster_history import ClusterHistory
from dairllm.cluster.first_to_leave import LAST_TO_LEAVE
from dairllm.config import RootDeadlines, WorkerAddress
from dairllm.engine.program import Program
from dairllm.errors import NetworkError, RemoteProtocolError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.types import FloatType
from dairllm.runtime.compute import Compute
from dairllm.runtime.pass_clock import FEW, FLOOR_SECONDS
from tests.api.serving import write_model
from tests.cluster.clusters import MakeCluster
from tests.commands.node_process import ServeProcess, WorkerProcess

SPEC = small_spec(weight_type=FloatType.F32, n_heads=3, n_kv_heads=3, dim=96, hidden_dim=192, vocab_size=384)
on_uvloop = pytest.mark.asyncio(loop_factories=["uvloop"])
"""Those that wait out a silence; tests/net/test_transport.py has silence on both."""

GUARD_SECONDS = 120
"""For a whole test on a busy machine."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_random_model(tmp_path / "m.m", SPEC)
    return tmp_path / "m.m"


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Worker processes, which can be stopped and killed."""
    made: list[WorkerProcess] = []

    def start(*arguments: str) -> WorkerProcess:
        made.append(WorkerProcess(tmp_path / f"worker-{len(made)}.log", *arguments))
        return made[-1]

    yield start
    for one in made:
        one.process.send_signal(signal.SIGCONT)
        one.end()


async def port_of(worker: WorkerProcess) -> int:
    return await asyncio.to_thread(lambda: worker.port)


async def feed_some(cluster: Cluster, passes: int = FEW) -> None:
    for position in range(passes):
        await cluster.feed([4], position, logits=True)


@on_uvloop
@pytest.mark.parametrize("place", [0, 1])
async def test_a_worker_that_hangs_in_a_pass_is_noticed_in_seconds_and_named(
    make_worker: Any, make_cluster: MakeCluster, start_worker: Any, path: Path, place: int
) -> None:
    hanging, healthy = start_worker(), await make_worker()
    ports = [healthy.port]
    ports.insert(place, await port_of(hanging))
    cluster = make_cluster(path, ports)
    async with asyncio.timeout(GUARD_SECONDS):
        await cluster.open()
        await feed_some(cluster)
        hanging.process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        told = rf"worker 127\.0\.0\.1:{ports[place]} \(node {place + 1}\), inference, position {FEW}: .* was silent for 5s; expecting "
        with pytest.raises(NetworkError, match=told):
            await cluster.feed([4], FEW, logits=True)
        assert FLOOR_SECONDS <= time.monotonic() - begun < 50
        await cluster.close()
        begun = time.monotonic()
        while healthy.metrics.sessions_running:  # noqa: ASYNC110 - a metric, which nobody can wait for
            await asyncio.sleep(0.01)
        assert time.monotonic() - begun < 30, "it does not go on to wait for the one that hangs, with its root gone"
        again = make_cluster(path, [healthy.port])
        await again.open()
        await feed_some(again, 1)


async def test_a_number_of_seconds_means_that_number(make_cluster: MakeCluster, start_worker: Any, path: Path) -> None:
    worker = start_worker()
    cluster = make_cluster(path, [await port_of(worker)], exchange="700ms")
    async with asyncio.timeout(GUARD_SECONDS):
        await cluster.open()
        await feed_some(cluster)
        worker.process.send_signal(signal.SIGSTOP)
        with pytest.raises(NetworkError, match="was silent for 700ms"):
            await cluster.feed([4], FEW, logits=True)


@on_uvloop
@pytest.mark.parametrize("place", [0, 1])
async def test_a_worker_that_gives_up_because_another_hangs_is_not_blamed(
    make_worker: Any, make_cluster: MakeCluster, start_worker: Any, path: Path, place: int
) -> None:
    """The healthy one is less patient than the root, and has left when the root gives the other one up."""
    hanging, healthy = start_worker(), await make_worker(deadlines={"exchange": "300ms"})
    ports = [healthy.port]
    ports.insert(place, await port_of(hanging))
    cluster = make_cluster(path, ports, exchange="4s")
    async with asyncio.timeout(GUARD_SECONDS):
        await cluster.open()
        await feed_some(cluster)
        hanging.process.send_signal(signal.SIGSTOP)
        with pytest.raises(NetworkError, match=rf"^worker 127\.0\.0\.1:{ports[place]} \(node {place + 1}\), .* was silent for 4s"):
            await cluster.feed([4], FEW, logits=True)
    assert healthy.metrics.sessions == {"NetworkError": 1}


@pytest.mark.parametrize("place", [0, 1])
async def test_a_worker_that_is_killed_is_named_in_its_own_words(
    make_worker: Any, make_cluster: MakeCluster, start_worker: Any, path: Path, place: int
) -> None:
    """Nothing of a healthy worker, that lost it too, stands in the message."""
    mortal, healthy = start_worker(), await make_worker()
    ports = [healthy.port]
    ports.insert(place, await port_of(mortal))
    cluster = make_cluster(path, ports)
    async with asyncio.timeout(GUARD_SECONDS):
        await cluster.open()
        await feed_some(cluster)
        mortal.process.kill()
        with pytest.raises((NetworkError, RemoteProtocolError)) as raised:
            await feed_some(cluster, 200)
    message = str(raised.value)
    assert message.startswith(f"worker 127.0.0.1:{ports[place]} (node {place + 1}), inference, position ")
    assert str(healthy.port) not in message
    assert f"node {2 - place}" not in message


async def test_who_leaves_because_of_another_leaves_after_it(make_worker: Any, make_root: Any, start_worker: Any, path: Path) -> None:
    healthy, mortal = await make_worker(), start_worker()
    root = make_root(path, [healthy])
    root.workers.append(("127.0.0.1", await port_of(mortal)))
    async with asyncio.timeout(GUARD_SECONDS):
        await root.begin()
        await root.feed([1, 2, 3], 0)
        mortal.process.kill()
        left: dict[int, float] = {}

        async def watch(index: int) -> None:
            with contextlib.suppress(ConnectionError):
                while await root.streams[index][0].read(1 << 16):
                    pass
            left[index] = time.monotonic()

        watching = [asyncio.create_task(watch(index)) for index in (0, 1)]
        row = bytes(4 * 96)
        root.say(0, b"\x03\0\0\0\x01\0\0\0" + row + row)  # position 3, one row: X, then the root's slice of ZQ
        await asyncio.wait(watching)
    assert left[0] - left[1] > LAST_TO_LEAVE
    assert healthy.metrics.sessions.total() == 1


# Looked for


@pytest.fixture
def nobody() -> Iterator[int]:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def cluster_of(model: ModelFile, compute: Compute[Program], history: ClusterHistory, *ports: int, **deadlines: str) -> Cluster:
    """One more opening of the same cluster."""
    workers = [WorkerAddress("127.0.0.1", port) for port in ports]
    return Cluster(model, workers, compute, n_threads=1, history=history, deadlines=RootDeadlines.model_validate(deadlines))


@pytest.mark.parametrize("place", [0, 1])
async def test_while_one_worker_is_missing_the_others_are_not_called(
    make_worker: Any, compute: Compute[Program], start_worker: Any, path: Path, nobody: int, place: int
) -> None:
    healthy = await make_worker()
    ports = [healthy.port]
    ports.insert(place, nobody)
    history = ClusterHistory()
    address = WorkerAddress("127.0.0.1", nobody)
    with ModelFile.open(path) as model:
        async with asyncio.timeout(GUARD_SECONDS):
            for _ in range(4):
                cluster = cluster_of(model, compute, history, *ports)
                with pytest.raises(NetworkError, match=rf"^worker 127.0.0.1:{nobody} \(node {place + 1}\) cannot be reached"):
                    await cluster.open()
                await cluster.close()
                assert history.absent == {address}
            while healthy.metrics.sessions_running:  # noqa: ASYNC110 - a metric, which nobody can wait for
                await asyncio.sleep(0.01)
            assert healthy.metrics.sessions == {"finished": 1}, "the first time nobody knew"
            assert not healthy.metrics.refused
            worker = start_worker()
            ports[place] = await port_of(worker)
            history.missed([WorkerAddress("127.0.0.1", ports[place])])
            cluster = cluster_of(model, compute, history, *ports)
            await cluster.open()
            assert not history.absent
            await feed_some(cluster, 2)
            await cluster.close()


async def test_a_worker_that_hangs_is_heard_of_before_others_are_called(
    make_worker: Any, compute: Compute[Program], start_worker: Any, path: Path
) -> None:
    """Its system still takes connections."""
    healthy, hanging = await make_worker(), start_worker()
    ports = healthy.port, await port_of(hanging)
    history = ClusterHistory()
    with ModelFile.open(path) as model:
        async with asyncio.timeout(GUARD_SECONDS):
            cluster = cluster_of(model, compute, history, *ports, exchange="500ms")
            await cluster.open()
            await feed_some(cluster)
            hanging.process.send_signal(signal.SIGSTOP)
            with pytest.raises(NetworkError, match=f":{ports[1]} "):
                await cluster.feed([4], FEW, logits=True)
            await cluster.close()
            served = healthy.metrics.sessions.total()
            for _ in range(2):
                cluster = cluster_of(model, compute, history, *ports, answer="300ms")
                with pytest.raises(NetworkError, match=rf"^worker 127.0.0.1:{ports[1]} \(node 2\), greeting: .* was silent for 300ms"):
                    await cluster.open()
                await cluster.close()
            assert healthy.metrics.sessions.total() - served <= 1, "that of the pass that failed"
            assert healthy.metrics.sessions["finished"] == 0, "no empty session"
            hanging.process.send_signal(signal.SIGCONT)
            while True:
                cluster = cluster_of(model, compute, history, *ports)
                with contextlib.suppress(NetworkError, RemoteProtocolError):
                    await cluster.open()
                    break
                await cluster.close()
            await feed_some(cluster, 2)
            await cluster.close()


def test_a_server_says_which_worker_hangs_and_leaves_the_other_alone(start_worker: Any, tmp_path: Path) -> None:
    """As an operator sees it: what is running, what is lost, and quiet logs until it is back."""
    model = write_model(tmp_path)
    write_random_model(model, small_spec(n_heads=3, n_kv_heads=3, dim=96, hidden_dim=192, vocab_size=320))
    hanging, healthy = start_worker(), start_worker()
    addresses = f"127.0.0.1:{hanging.port},127.0.0.1:{healthy.port}"
    server = ServeProcess(
        tmp_path / "serve.log",
        *("--model", str(model), "--workers", addresses),
        environment={
            f"DAIRLLM_DEADLINES__{key}": value for key, value in (("RECONNECT", "100ms"), ("RECOVERY", "100ms"), ("ANSWER", "2s"))
        },
    )
    try:
        server.wait_for("ready")
        body = {"prompt": "one", "max_tokens": 10}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        assert "dairllm_pass_running_seconds 0.0" in httpx.get(f"{server.url}/metrics").text
        hanging.process.send_signal(signal.SIGSTOP)
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=120) as answer:
            while True:
                ready = httpx.get(f"{server.url}/readyz").json()
                if ready.get("pass_running_seconds", 0) > 1:
                    break
                time.sleep(0.02)
            assert ready["status"] == "ok"
            metrics = httpx.get(f"{server.url}/metrics").text
            (running,) = [line for line in metrics.splitlines() if line.startswith("dairllm_pass_running_seconds ")]
            assert float(running.split()[1]) > 1
            told = answer.read().decode()
        assert f"worker 127.0.0.1:{hanging.port} (node 1), " in told
        lost = server.wait_for("model lost")["reason"]
        assert lost.startswith(f"worker 127.0.0.1:{hanging.port} (node 1), inference, position ")
        assert "was silent for 5s" in lost
        server.wait_for("model not available")
        said, heard = server.text(), healthy.text().count("root connected")
        time.sleep(5)  # two attempts more
        assert server.text() == said, "told once"
        assert healthy.text().count("root connected") == heard == 1, "only the one that hangs is called"
        hanging.process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + GUARD_SECONDS
        while httpx.get(f"{server.url}/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        assert server.stop()[0] == 0
    finally:
        server.end()
