"""Workers that exchange slices among themselves: the mesh is really used, and strangers in it are told from peers."""

import asyncio
import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dairllm.cluster.cluster import Cluster
from dairllm.config import WorkerAddress
from dairllm.engine.executor import Executor
from dairllm.errors import ConfigError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.types import FloatType
from dairllm.protocol.dllama.codec import Control, Greeting, Peer, encode_ack, encode_control, encode_greeting
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import LocalNode
from tests.patience import PATIENCE

PROMPT = [5, 250, 17, 99, 3, 300, 42, 7]
STEPS = 6


def write(tmp_path: Path, n_nodes: int, weight_type: FloatType) -> Path:
    """A model whose heads, KV heads, width and vocabulary divide by the number of nodes."""
    path = tmp_path / f"{n_nodes}.m"
    write_random_model(
        path,
        small_spec(
            weight_type=weight_type,
            dim=32 * n_nodes,
            n_heads=n_nodes,
            n_kv_heads=n_nodes,
            hidden_dim=64 * n_nodes,
            vocab_size=108 * n_nodes,
        ),
        seed=3,
    )
    return path


async def local_logits(path: Path, tokens: list[int], sync: FloatType, executor: Executor) -> np.ndarray:
    """[len(tokens), vocab], one node, fed one token at a time."""
    rows = []
    with ModelFile.open(path) as model:
        node = LocalNode(model, Compute(executor, math.inf), n_threads=1, sync=sync)
        await node.open()
        for position, token in enumerate(tokens):
            logits = await node.feed([token], position, logits=True)
            assert logits is not None
            rows.append(logits.copy())
        await node.close()
    return np.array(rows)


def away(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)


@pytest.mark.parametrize(("n_nodes", "weight_type"), [(3, FloatType.F32), (4, FloatType.F32), (3, FloatType.Q40), (4, FloatType.Q40)])
async def test_a_cluster_computes_what_one_node_does(
    make_worker: Any, make_root: Any, executors: list[Executor], tmp_path: Path, n_nodes: int, weight_type: FloatType
) -> None:
    path = write(tmp_path, n_nodes, weight_type)
    sync = FloatType.F32 if weight_type == FloatType.F32 else FloatType.Q80
    workers = [await make_worker() for _ in range(n_nodes - 1)]
    async with asyncio.timeout(PATIENCE):
        for _ in range(2):  # root after root
            root = make_root(path, workers, sync)
            await root.begin()
            tokens = list(PROMPT)
            logits = [await root.feed(tokens, 0)]
            for _ in range(STEPS):
                tokens.append(int(np.argmax(logits[-1][-1])))
                logits.append(await root.feed(tokens[-1:], len(tokens) - 1))
            await root.stop()
            await root.close()
    expected = await local_logits(path, tokens, sync, executors[-1])
    distance = away(np.concatenate(logits), expected)
    if weight_type == FloatType.F32:
        assert distance.max() < 1e-4
        assert [int(np.argmax(row)) for row in expected[len(PROMPT) - 1 : -1]] == tokens[len(PROMPT) :]
    else:
        assert distance.mean() < 0.05  # each node's partial sums are rounded on the wire
    for worker in workers:
        assert worker.metrics.sessions == {"finished": 2}
        assert worker.metrics.rows == 2 * (len(PROMPT) + STEPS)
        assert worker.metrics.received["peer"] == worker.metrics.sent["peer"] > 0


async def test_workers_on_addresses_of_their_own(make_worker: Any, make_root: Any, tmp_path: Path) -> None:
    """Each dials from the address that the root knows it by, so the others recognise it."""
    path = write(tmp_path, 3, FloatType.F32)
    workers = [await make_worker(host) for host in ("127.0.0.2", "127.0.0.3")]
    async with asyncio.timeout(PATIENCE):
        root = make_root(path, workers)
        await root.begin()
        await root.feed(PROMPT, 0)
        await root.stop()


async def opened(worker: Any, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(worker.host, worker.port, local_addr=(source, 0))


async def is_closed(reader: asyncio.StreamReader, within: float = PATIENCE) -> bool:
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        async with asyncio.timeout(within):
            return await reader.read() == b""
    return False


async def test_a_stranger_in_the_mesh_stage_is_closed_and_the_mesh_goes_on(
    make_worker: Any, make_root: Any, logged: Any, tmp_path: Path
) -> None:
    path = write(tmp_path, 3, FloatType.F32)
    workers = [await make_worker(), await make_worker()]
    async with asyncio.timeout(PATIENCE):
        root = make_root(path, workers)
        await root.greet()
        reader, writer = await opened(workers[1], "127.0.0.9")  # the second worker waits for the first, of 127.0.0.1
        assert await is_closed(reader)
        writer.close()
        await root.go()
        await root.configure()
        await root.load()
        await root.feed(PROMPT, 0)
        await root.stop()
    (refused,) = (entry for entry in logged if entry["event"] == "connection refused")
    assert refused["reason"] == "another root is being served, and no worker of its list has this address"
    assert refused["peer"].startswith("127.0.0.9:")


@pytest.mark.parametrize("when", ["before the peer", "after the peer"])
async def test_who_speaks_in_the_mesh_stage_gives_its_place_back(
    make_worker: Any, make_root: Any, executors: list[Executor], logged: Any, tmp_path: Path, when: str
) -> None:
    """It comes from an address of the list, takes the place, and speaks while weights are loaded."""
    path = write(tmp_path, 3, FloatType.F32)
    workers = [await make_worker(), await make_worker()]
    async with asyncio.timeout(PATIENCE):
        root = make_root(path, workers)
        await root.greet()
        if when == "before the peer":
            reader, writer = await opened(workers[1])
        await root.go()
        await root.configure()
        if when == "after the peer":
            reader, writer = await opened(workers[1])
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await is_closed(reader)
        writer.close()
        await root.load()
        logits = await root.feed(PROMPT, 0)
        await root.stop()
    expected = await local_logits(path, PROMPT, FloatType.F32, executors[-1])
    assert away(logits, expected).max() < 1e-4
    (refused,) = (entry for entry in logged if entry["event"] == "connection refused")
    assert refused["reason"] == "it spoke before its time: no worker"


async def test_a_second_root_in_the_mesh_stage_is_closed_when_it_speaks(
    make_worker: Any, make_root: Any, recording: Any, play: Any, tmp_path: Path
) -> None:
    workers = [await make_worker(), await make_worker()]
    root = make_root(write(tmp_path, 3, FloatType.F32), workers)
    async with asyncio.timeout(PATIENCE):
        await root.greet()
        assert await play(workers[0].address, recording.said) == b""
        assert await play(workers[1].address, recording.said) == b""
        await root.go()
        await root.configure()
        await root.load()
        await root.stop()


async def test_spare_connections_of_the_mesh_stage_are_closed_when_it_ends(
    make_worker: Any, make_root: Any, logged: Any, tmp_path: Path
) -> None:
    workers = [await make_worker(), await make_worker()]
    root = make_root(write(tmp_path, 3, FloatType.F32), workers)
    async with asyncio.timeout(PATIENCE):
        await root.greet()
        await root.go()
        await root.configure()
        spares = [await opened(workers[1]) for _ in range(9)]
        assert await is_closed(spares[8][0])
        assert not await is_closed(spares[0][0], within=0.2)
        await root.load()
        assert await is_closed(spares[0][0])
        late_reader, late_writer = await opened(workers[1])
        assert await is_closed(late_reader)
        for _, writer in [*spares, (late_reader, late_writer)]:
            writer.close()
        await root.feed(PROMPT, 0)
        await root.stop()
    assert {entry["reason"] for entry in logged if entry["event"] == "connection refused"} == {
        "all workers have connected",
        "another root is being served, and no worker is expected to connect",
    }


async def greet_alone(worker: Any, index: int, *peers: Peer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A root that has only this worker, and tells it of others."""
    reader, writer = await asyncio.open_connection(*worker.address)
    writer.write(encode_greeting(Greeting(len(peers) + 1, index, peers)))
    return reader, writer


async def failure(logged: Any) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE):
        while not (found := [entry for entry in logged if entry["event"] == "session failed"]):  # noqa: ASYNC110 - a list
            await asyncio.sleep(0.01)
    return found[0]  # type: ignore[no-any-return] # the log is of any type


async def test_a_peer_that_does_not_come_costs_a_deadline(make_worker: Any, logged: Any, recording: Any, play: Any) -> None:
    worker = await make_worker(deadlines={"mesh": "150ms"})
    reader, writer = await greet_alone(worker, 1, Peer("127.0.0.1", 7))
    assert await reader.readexactly(4) == encode_ack()
    writer.write(encode_ack())
    assert (await failure(logged))["error"] == "node 1 (127.0.0.1:7) did not connect within 150ms"
    writer.close()
    assert len(await play(worker.address, recording.said)) == len(recording.answered)


async def test_a_peer_that_cannot_be_reached_ends_the_session(make_worker: Any, logged: Any) -> None:
    worker = await make_worker()
    reader, writer = await greet_alone(worker, 0, Peer("127.0.0.1", 1))
    await reader.readexactly(4)
    writer.write(encode_ack())
    assert (await failure(logged))["error"].startswith("node 2 (127.0.0.1:1): 127.0.0.1 port 1 cannot be reached: ")
    writer.close()


async def test_a_peer_without_an_address_ends_the_session(make_worker: Any, logged: Any) -> None:
    worker = await make_worker()
    reader, writer = await greet_alone(worker, 0, Peer("no-such-host.invalid", 1))
    assert await reader.read() == b""
    assert (await failure(logged))["error"].startswith("the name 'no-such-host.invalid' has no address: ")
    writer.close()


async def test_a_peer_that_falls_silent_costs_a_deadline(make_worker: Any, make_root: Any, logged: Any, tmp_path: Path) -> None:
    """The root sets off the first worker alone, so the second never sends its slice."""
    workers = [await make_worker(deadlines={"exchange": "200ms"}) for _ in range(2)]
    async with asyncio.timeout(PATIENCE):
        root = make_root(write(tmp_path, 3, FloatType.F32), workers)
        await root.begin()
        row = 4 * 96
        root.say(0, encode_control(Control(0, 1)) + bytes(row) + bytes(row))  # X, then the root's slice of ZQ
        failed = await failure(logged)
    assert failed["error"].endswith("was silent for 200ms; expecting 384 more of 384 bytes of pipe ZQ, slice 2, rows 0..0")
    assert failed["stage"] == "pipe rows"


async def test_a_peer_that_dies_ends_the_session_and_the_next_root_is_served(
    make_worker: Any, make_root: Any, logged: Any, tmp_path: Path
) -> None:
    path = write(tmp_path, 3, FloatType.F32)
    workers = [await make_worker(deadlines={"exchange": "1s", "shutdown": "50ms"}) for _ in range(2)]
    async with asyncio.timeout(PATIENCE):
        root = make_root(path, workers)
        await root.begin()
        await root.feed(PROMPT, 0)
        await workers[1].worker.close()
        with contextlib.suppress(asyncio.IncompleteReadError, OSError, RuntimeError):
            await root.feed([1], len(PROMPT))
        await root.close()
        failed = await failure(logged)
        assert failed["stage"] == "pipe rows"
        while workers[0].metrics.sessions_running:  # noqa: ASYNC110 - a metric, which nobody can wait for
            await asyncio.sleep(0.01)
        again = make_root(write(tmp_path, 2, FloatType.F32), workers[:1])
        await again.begin()
        await again.feed(PROMPT[:4], 0)
        await again.stop()


async def test_a_session_that_is_given_up_ends_at_once_however_slow_a_worker_is(
    make_worker: Any, make_proxy: Any, executors: list[Executor], tmp_path: Path
) -> None:
    """Goodbyes are said when all have met: who left earlier would be taken for a stranger, and waited for."""
    path = write(tmp_path, 3, FloatType.Q80)
    workers = [await make_worker() for _ in range(2)]
    slow = await make_proxy(workers[1].address, pause=0.05, disguise=True)  # a Q80 model is not for distributed-llama
    with ModelFile.open(path) as model:
        addresses = [WorkerAddress("127.0.0.1", port) for port in (workers[0].port, slow.port)]
        cluster = Cluster(model, addresses, Compute(executors[-1], math.inf), n_threads=1)
        with pytest.raises(ConfigError, match="q80"):
            await cluster.open()
        await cluster.close()
    async with asyncio.timeout(PATIENCE):
        for worker in workers:
            while worker.metrics.sessions != {"finished": 1}:  # noqa: ASYNC110 - a metric, which nobody can wait for
                await asyncio.sleep(0.01)
