"""Whatever a root says: no crash, no allocation beyond what was announced and allowed, and the next root is served."""

import asyncio
import random
import struct
from dataclasses import replace
from typing import Any

import pytest

from dairllm import machine
from dairllm.formats.random_model import small_spec
from dairllm.graph.build import build_graph
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig, Size
from dairllm.protocol.dllama.codec import (
    Control,
    Greeting,
    WeightHeader,
    encode_ack,
    encode_control,
    encode_greeting,
    encode_network,
    encode_node,
    encode_weight_header,
    encode_weights_end,
)
from dairllm.protocol.dllama.worker import Stage
from tests.patience import PATIENCE

MIB = 1 << 20
SHORT = dict.fromkeys(("handshake", "mesh", "configuration", "weights", "exchange"), "50ms")
HELLO = encode_greeting(Greeting(1, 0, ())) + encode_ack()


def graph() -> tuple[NetworkConfig, NodeConfig]:
    network, nodes = build_graph(small_spec(weight_type=FloatType.F32), 2, FloatType.F32)
    return network, nodes[1]


async def failure(worker: Any, play: Any, logged: Any, said: bytes) -> dict[str, Any]:
    """How the session ended that these bytes began."""
    async with asyncio.timeout(PATIENCE):
        await play(worker.address, said)
    (failed,) = (entry for entry in logged if entry["event"] == "session failed")
    logged.clear()
    return failed  # type: ignore[no-any-return] # the log is of any type


async def serves(worker: Any, recording: Any, play: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        # Where the processors are busy a short deadline may end a session that is in order: the root comes again.
        heard = b""
        while len(heard) != len(recording.answered):
            while worker.metrics.sessions_running:  # noqa: ASYNC110 - a metric, which nobody can wait for
                await asyncio.sleep(0.01)
            heard = await play(worker.address, recording.said)


def with_pipe(network: NetworkConfig, number: int, size: Size) -> NetworkConfig:
    pipes = list(network.pipes)
    pipes[number] = replace(pipes[number], size=size)
    return replace(network, pipes=tuple(pipes))


async def test_sizes_beyond_all_memory_are_refused_before_they_are_allocated(
    make_worker: Any, play: Any, logged: Any, recording: Any
) -> None:
    worker = await make_worker(deadlines=SHORT)
    network, node = graph()
    await serves(worker, recording, play)
    logged.clear()
    before = machine.peak_rss_bytes()
    huge = Size(FloatType.F32, 1, network.n_batches, 1 << 30)
    buffers = (replace(node.buffers[0], size=huge), *node.buffers[1:])
    for said in (
        HELLO + encode_network(with_pipe(network, 2, huge)) + encode_node(node),
        HELLO + encode_network(network) + encode_node(replace(node, buffers=buffers)),
    ):
        failed = await failure(worker, play, logged, said)
        assert failed["kind"] in ("LimitError", "GraphError")
    await serves(worker, recording, play)
    assert machine.peak_rss_bytes() < before + 64 * MIB


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (WeightHeader("block_matmul_q", 0, 0, 1 << 40), "weight block_matmul_q of layer 0: bytes 0 to 1099511627776 were announced"),
        (WeightHeader("block_matmul_q", 0, 1 << 40, 4), "bytes 1099511627776 to 1099511627780 were announced"),
        (WeightHeader("block_matmul_q", 99, 0, 4), "weight block_matmul_q of layer 99: no op of the configuration has it"),
        (WeightHeader("nothing", 0, 0, 4), "weight nothing of layer 0: no op of the configuration has it"),
    ],
)
async def test_weights_that_do_not_belong_are_refused(
    make_worker: Any, play: Any, logged: Any, recording: Any, weight: WeightHeader, message: str
) -> None:
    worker = await make_worker(deadlines=SHORT)
    network, node = graph()
    failed = await failure(worker, play, logged, HELLO + encode_network(network) + encode_node(node) + encode_weight_header(weight))
    assert message in failed["error"]
    assert failed["stage"] == Stage.WEIGHTS.value
    await serves(worker, recording, play)


async def test_missing_weights_are_named(make_worker: Any, play: Any, logged: Any, recording: Any) -> None:
    worker = await make_worker(deadlines=SHORT)
    network, node = graph()
    failed = await failure(worker, play, logged, HELLO + encode_network(network) + encode_node(node) + encode_weights_end())
    assert failed["error"].startswith("the root ended the weights; missing ")
    assert "the first block_norm_0" in failed["error"] or "the first block_matmul_q of layer 0: 0 of " in failed["error"]
    await serves(worker, recording, play)


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (encode_control(Control(250, 7)), "the root asked for positions 250 to 256; the graph has 256"),
        (struct.pack("<II", 0, 33), "expected"),
        (struct.pack("<II", 0xFFFFFFFF, 1), "expected"),
    ],
)
async def test_positions_and_rows_beyond_the_graph_are_refused(
    make_worker: Any, play: Any, logged: Any, recording: Any, control: bytes, message: str
) -> None:
    worker = await make_worker(deadlines=SHORT)
    failed = await failure(worker, play, logged, recording.said[: recording.offset_of(Stage.CONTROL)] + control)
    assert message in failed["error"]
    await serves(worker, recording, play)


async def test_spoilt_bytes_at_any_place_cost_one_session(make_worker: Any, play: Any, recording: Any) -> None:
    """Seeded: some bytes of a real session are replaced, at every stage; what follows is then nonsense, or is not."""
    allowed = machine.rss_bytes() // MIB + 256
    worker = await make_worker(deadlines=SHORT, limits={"memory": f"{allowed}MiB"})
    await serves(worker, recording, play)
    before = machine.peak_rss_bytes()
    dice = random.Random(5)  # noqa: S311 - test data
    configuration = recording.offset_of(Stage.WEIGHTS)
    for number in range(40):
        said = bytearray(recording.said)
        # most of the structure is in the configuration, most of the bytes are not
        end = configuration if number % 4 else len(said)
        for _ in range(dice.choice((1, 1, 3))):
            said[dice.randrange(end)] = dice.choice((0, 1, 0x7F, 0xFF, dice.randrange(256)))
        async with asyncio.timeout(PATIENCE):
            await play(worker.address, bytes(said))
            while worker.metrics.sessions_running:  # noqa: ASYNC110 - a metric, which nobody can wait for
                await asyncio.sleep(0.005)
    assert worker.metrics.sessions["bug"] == 0
    assert machine.peak_rss_bytes() < max(before, allowed * MIB) + 64 * MIB
    await serves(worker, recording, play)


async def test_random_bytes_after_a_greeting_cost_one_session(make_worker: Any, play: Any, recording: Any) -> None:
    worker = await make_worker(deadlines=SHORT)
    dice = random.Random(6)  # noqa: S311 - test data
    for _ in range(20):
        async with asyncio.timeout(PATIENCE):
            await play(worker.address, HELLO + encode_ack() + dice.randbytes(2000))
    assert worker.metrics.sessions["bug"] == 0
    await serves(worker, recording, play)


async def test_memory_is_flat_over_root_after_root(make_worker: Any, play: Any, recordings: Any) -> None:
    """Roots that finish, and roots that leave in the middle of a weight."""
    worker = await make_worker()

    async def round_of_roots() -> None:
        for recording in recordings[:3]:
            await serves(worker, recording, play)
            await play(worker.address, recording.said[: recording.offset_of(Stage.WEIGHTS, 60)], hang_up=True)

    for _ in range(2):
        await round_of_roots()
    before = machine.rss_bytes()
    for _ in range(5):
        await round_of_roots()
    assert machine.rss_bytes() < before + 3 * MIB
