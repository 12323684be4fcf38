"""Workers with the model on a disk of their own: the same ids without a byte of weights; and whoever differs is found out."""

import asyncio
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dairllm import machine
from dairllm.cluster.own_model import OwnModel
from dairllm.engine.program import Program
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import build_graph, build_network, build_node
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.references import WeightReference, weight_references
from dairllm.graph.slicing import Axis, Part, Span, deal_shares, equal_shares, nearly_equal_sizes
from dairllm.graph.types import FloatType
from dairllm.protocol.dllama.codec import (
    MARKER,
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
from dairllm.protocol.dllama.references import write_references
from dairllm.runtime.compute import Compute
from tests.cluster.clusters import MakeCluster, ids_of, one_node
from tests.patience import PATIENCE

on_uvloop = pytest.mark.asyncio(loop_factories=["uvloop"])

MIB = 1 << 20
IDS = [(7 * place + 3) % 320 for place in range(37)]
NARROW = small_spec(weight_type=FloatType.F32, n_heads=9, n_kv_heads=3, dim=144, hidden_dim=192, vocab_size=322)
WIDE = small_spec(weight_type=FloatType.F32, n_heads=8, n_kv_heads=4, dim=256, head_dim=32, hidden_dim=1024, vocab_size=320, n_layers=6)


def copied(path: Path, name: str) -> Path:
    return Path(shutil.copyfile(path, path.with_name(name)))


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def events(logged: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [entry for entry in logged if entry["event"] == event]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what a worker counts wakes nobody
            await asyncio.sleep(0.01)


# Under a root of ours


@pytest.mark.parametrize(
    ("spec", "n_nodes", "shares"),
    [
        (NARROW, 2, None),
        (NARROW, 3, "1/64,5/64,3/64"),
        (NARROW, 4, "4/32,2/64,2/32,1/64"),
        (NARROW, 5, None),
        (WIDE, 2, None),
        (WIDE, 3, None),
        (small_spec(Architecture.QWEN3_MOE, n_heads=4, n_kv_heads=2, dim=128, head_dim=32, moe_hidden_dim=96), 2, None),
        (small_spec(Architecture.QWEN3, FloatType.Q80, n_heads=6, n_kv_heads=2, dim=192, head_dim=32, hidden_dim=192), 3, None),
    ],
)
@on_uvloop
async def test_ids_are_the_same_and_no_weights_are_sent(
    make_worker: Any,
    make_cluster: MakeCluster,
    compute: Compute[Program],
    tmp_path: Path,
    spec: ModelSpec,
    n_nodes: int,
    shares: str | None,
) -> None:
    """Equal shares and others, heads that lie apart, classifier slices that end with padding; root after root."""
    write_random_model(tmp_path / "m.m", spec, seed=4)
    if spec.weight_type == FloatType.F32:
        expected = await one_node(tmp_path / "m.m", compute, IDS, 12)
    else:  # partial sums are rounded on the wire: other nodes are the measure
        sent_to = make_cluster(tmp_path / "m.m", [(await make_worker()).port for _ in range(n_nodes - 1)], shares)
        await sent_to.open()
        expected = await ids_of(sent_to, IDS, 12)
        assert all(node.weight_bytes_sent for node in sent_to.nodes[1:])
        await sent_to.close()
    workers = [await make_worker(own=copied(tmp_path / "m.m", f"{number}.m")) for number in range(n_nodes - 1)]
    ports = [worker.port for worker in workers]
    for _ in range(2):
        cluster = make_cluster(tmp_path / "m.m", ports, shares)
        await cluster.open()
        for node in cluster.nodes[1:]:
            assert node.weight_bytes_sent == 0
            assert node.bytes_sent < 64 * 1024
        assert await ids_of(cluster, IDS, 12) == expected
        await cluster.close()
    for worker in workers:
        await until(lambda worker=worker: worker.metrics.sessions == {"finished": 2})
        assert worker.metrics.weight_bytes == 0


def test_even_for_the_largest_models_less_than_a_mebibyte_is_said() -> None:
    """All that is said to a worker before the first control packet, of a model of 405 billion parameters, and one of 128 experts."""
    large = [
        replace(small_spec(), dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, head_dim=128, hidden_dim=53248),
        replace(small_spec(Architecture.QWEN3_MOE), dim=4096, n_layers=94, n_experts=128),
    ]
    for spec, n_nodes in ((large[0], 5), (large[1], 2)):
        shares = deal_shares(spec, nearly_equal_sizes(spec, n_nodes))
        network = build_network(spec, shares, FloatType.Q80)
        for node, share in enumerate(shares[1:], 1):
            graph = build_node(spec, network, node, share)
            said = encode_network(network, MARKER) + write_references(weight_references(spec, share, graph)) + encode_node(graph)
            assert len(said) < MIB


@on_uvloop
async def test_a_worker_with_another_model_is_sent_weights(
    make_worker: Any, make_cluster: MakeCluster, compute: Compute[Program], tmp_path: Path, logged: Any
) -> None:
    """The same header, other weights: neither name nor size tells."""
    write_random_model(tmp_path / "m.m", NARROW, seed=4)
    (tmp_path / "other").mkdir()
    write_random_model(tmp_path / "other" / "m.m", NARROW, seed=5)
    worker = await make_worker(own=tmp_path / "other" / "m.m")
    cluster = make_cluster(tmp_path / "m.m", [worker.port])
    await cluster.open()
    assert cluster.nodes[1].weight_bytes_sent > 0
    assert await ids_of(cluster, IDS, 12) == await one_node(tmp_path / "m.m", compute, IDS, 12)
    assert events(logged, "weights are to be sent")[0]["own_model"] == "another"
    assert events(logged, "weights come over the wire")[0]["reason"] == f"the root's model is another than {tmp_path / 'other' / 'm.m'}"


@on_uvloop
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: os.utime(path, ns=(1, 1)), "has been written to since it was opened"),
        (lambda path: copied(path, "copy").replace(path), "has been replaced since it was opened"),
        (lambda path: path.unlink(), "cannot be found any more"),
    ],
)
async def test_a_worker_whose_file_has_changed_is_sent_weights(
    make_worker: Any, make_cluster: MakeCluster, tmp_path: Path, logged: Any, change: Callable[[Path], object], reason: str
) -> None:
    write_random_model(tmp_path / "m.m", NARROW, seed=4)
    own = copied(tmp_path / "m.m", "own.m")
    worker = await make_worker(own=own)
    first = make_cluster(tmp_path / "m.m", [worker.port])
    await first.open()
    expected = await ids_of(first, IDS, 12)
    assert first.nodes[1].weight_bytes_sent == 0
    await first.close()
    change(own)
    await until(lambda: not worker.metrics.sessions_running)
    cluster = make_cluster(tmp_path / "m.m", [worker.port])
    await cluster.open()
    assert cluster.nodes[1].weight_bytes_sent > 0
    assert await ids_of(cluster, IDS, 12) == expected
    assert reason in events(logged, "the model is not used")[0]["reason"]


@on_uvloop
async def test_workers_of_all_kinds_side_by_side(
    make_worker: Any, make_cluster: MakeCluster, make_proxy: Any, compute: Compute[Program], tmp_path: Path
) -> None:
    """One with the model, one without, one that looks like one of distributed-llama."""
    write_random_model(tmp_path / "m.m", NARROW, seed=4)
    workers = [await make_worker(own=tmp_path / "m.m"), await make_worker(), await make_worker()]
    disguised = await make_proxy(("127.0.0.1", workers[2].port), disguise=True)
    expected = await one_node(tmp_path / "m.m", compute, IDS, 12)
    for order in ([0, 1, 2], [2, 1, 0]):
        ports = [(workers[0].port, workers[1].port, disguised.port)[place] for place in order]
        cluster = make_cluster(tmp_path / "m.m", ports)
        await cluster.open()
        assert [bool(node.weight_bytes_sent) for node in cluster.nodes[1:]] == [place != 0 for place in order]
        assert await ids_of(cluster, IDS, 12) == expected
        await cluster.close()
        for worker in workers:
            await until(lambda worker=worker: not worker.metrics.sessions_running)


# Under a root that always sends weights


@on_uvloop
@pytest.mark.parametrize("arch", [Architecture.LLAMA, Architecture.QWEN3_MOE])
async def test_weights_that_come_all_the_same_are_compared_and_dropped(
    make_worker: Any, make_root: Any, tmp_path: Path, logged: Any, arch: Architecture
) -> None:
    write_random_model(tmp_path / "m.m", small_spec(arch), seed=4)
    worker = await make_worker(own=copied(tmp_path / "m.m", "own.m"))
    found = []
    for running in (worker, await make_worker()):
        root = make_root(tmp_path / "m.m", [running])
        await root.begin()
        found.append((await root.feed([1, 2, 3, 4], 0)).copy())
        await root.stop()
    assert np.array_equal(*found)
    (compared,) = events(logged, "weights compared with the own model")
    assert compared["held"] != compared["size"]  # of the weights, columns that lie apart in the file
    assert compared["size"] != "0B"
    assert worker.metrics.weight_bytes > 0


@on_uvloop
@pytest.mark.parametrize(
    ("arch", "name", "layer", "expert"),
    [
        (Architecture.LLAMA, "block_matmul_w2", 1, 0),
        (Architecture.LLAMA, "block_matmul_q", 0, 0),
        (Architecture.LLAMA, "final_norm", 0, 0),
        (Architecture.LLAMA, "final_matmul_logits", 0, 0),
        (Architecture.QWEN3_MOE, "block_matmul_w3", 1, 6),
        (Architecture.QWEN3_MOE, "block_moe_gate", 0, 0),
    ],
)
async def test_a_byte_that_differs_ends_the_session_and_is_named(
    make_worker: Any, make_root: Any, tmp_path: Path, logged: Any, arch: Architecture, name: str, layer: int, expert: int
) -> None:
    write_random_model(tmp_path / "m.m", small_spec(arch), seed=4)
    own = copied(tmp_path / "m.m", "own.m")
    with ModelFile.open(own) as model:
        tensor = model.tensor(name, layer, expert)
    offset = tensor.offset + tensor.nbytes - 3  # of the second of two nodes
    flip(own, offset)
    worker = await make_worker(own=own)
    root = make_root(tmp_path / "m.m", [worker])
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await root.begin()
    await until(lambda: not worker.metrics.sessions_running)
    (failed,) = events(logged, "session failed")
    assert failed["kind"] == "FormatError"
    assert failed["stage"] == "weights"
    assert failed["error"].startswith(f"{own}, byte {offset}: expected what the root sends of {tensor.label}, found other bytes")


@on_uvloop
async def test_another_models_graph_takes_its_weights_from_the_wire(make_worker: Any, make_root: Any, tmp_path: Path, logged: Any) -> None:
    write_random_model(tmp_path / "m.m", small_spec(weight_type=FloatType.F32), seed=4)
    write_random_model(tmp_path / "own.m", NARROW)
    found = []
    for running in (await make_worker(own=tmp_path / "own.m"), await make_worker()):
        root = make_root(tmp_path / "m.m", [running])
        await root.begin()
        found.append((await root.feed([1, 2, 3, 4], 0)).copy())
        await root.stop()
    assert np.array_equal(*found)
    (told,) = events(logged, "weights come over the wire")
    assert told["reason"].startswith(f"the root's graph is not that of {tmp_path / 'own.m'}: ")


@on_uvloop
async def test_weights_of_ones_own_need_no_memory(make_worker: Any, make_root: Any, tmp_path: Path, logged: Any) -> None:
    """A limit that the graph alone fits into: refused without the model, served with it."""
    write_random_model(
        tmp_path / "m.m", small_spec(weight_type=FloatType.F32, dim=512, hidden_dim=8192, n_heads=8, n_kv_heads=8, n_layers=4)
    )
    weights = (tmp_path / "m.m").stat().st_size // 2
    limits = {"memory": f"{(machine.rss_bytes() + weights * 3 // 4) // MIB}MiB"}
    refusing = make_root(tmp_path / "m.m", [await make_worker(limits=limits)])
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await refusing.begin()
    (failed,) = events(logged, "session failed")
    assert failed["kind"] == "LimitError"
    await refusing.close()
    root = make_root(tmp_path / "m.m", [await make_worker(own=tmp_path / "m.m", limits=limits)])
    await root.begin()
    assert (await root.feed([1, 2, 3], 0)).shape == (3, 320)
    await root.stop()


# Hostile roots


SPEC = small_spec(weight_type=FloatType.F32)
NETWORK, NODES = build_graph(SPEC, 2, FloatType.F32)
REFERENCES = weight_references(SPEC, equal_shares(SPEC, 2)[1], NODES[1])
BEFORE = encode_greeting(Greeting(1, 0, ())) + encode_ack() + encode_network(NETWORK, MARKER)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (encode_node(NODES[1]), "expected references to weights"),
        (write_references(REFERENCES[1:]) + encode_node(NODES[1]), "nothing refers to"),
        (
            write_references([WeightReference(each.name, each.layer, Part(Axis.ROWS, (Span(0, 1 << 31),))) for each in REFERENCES])
            + encode_node(NODES[1]),
            "the root's references to weights: .* are not among them",
        ),
        (
            write_references(REFERENCES) + encode_node(NODES[1]) + encode_weight_header(WeightHeader("final_norm", 0, 0, 4)) + bytes(4),
            "the root sends final_norm of layer 0, though it has referred to all weights",
        ),
        (write_references(()) + encode_node(NODES[1]) + encode_weights_end(), "the root ended the weights; missing "),
    ],
)
@on_uvloop
async def test_a_root_that_misuses_references_loses_its_session(
    make_worker: Any, play: Any, recording: Any, tmp_path: Path, logged: Any, said: bytes, problem: str
) -> None:
    write_random_model(tmp_path / "m.m", SPEC)
    worker = await make_worker(own=tmp_path / "m.m", deadlines=dict.fromkeys(("handshake", "configuration", "weights"), "200ms"))
    async with asyncio.timeout(PATIENCE):
        await play(worker.address, BEFORE + said)
        await until(lambda: not worker.metrics.sessions_running)
    (failed,) = events(logged, "session failed")
    assert failed["kind"] == "RemoteProtocolError"
    assert re.search(problem, failed["error"]), failed["error"]
    assert len(await play(worker.address, recording.said)) == len(recording.answered)  # the next root


@on_uvloop
async def test_spoilt_references_cost_one_session(make_worker: Any, play: Any, recording: Any, tmp_path: Path) -> None:
    """Seeded: some bytes of the references, or of the graph that they are for, are replaced; what follows is then nonsense, or is not."""
    write_random_model(tmp_path / "m.m", SPEC)
    before, allowed = machine.peak_rss_bytes(), machine.rss_bytes() // MIB + 128
    short = dict.fromkeys(("handshake", "configuration", "weights", "exchange"), "50ms")
    worker = await make_worker(own=tmp_path / "m.m", deadlines=short, limits={"memory": f"{allowed}MiB"})
    references, dice = write_references(REFERENCES), random.Random(7)  # noqa: S311 - test data
    after = encode_node(NODES[1]) + encode_weights_end() + encode_control(Control(0, 1)) + bytes(4096)
    for number in range(80):
        said = bytearray(references + after)
        end = len(references) if number % 4 else len(said)
        for _ in range(dice.choice((1, 1, 3))):
            said[dice.randrange(end)] = dice.choice((0, 1, 0x7F, 0xFF, dice.randrange(256)))
        async with asyncio.timeout(PATIENCE):
            await play(worker.address, BEFORE + bytes(said))
            await until(lambda: not worker.metrics.sessions_running)
    assert worker.metrics.sessions["bug"] == 0
    assert worker.metrics.sessions["RemoteProtocolError"] > 40
    assert machine.peak_rss_bytes() < max(before, allowed * MIB) + 64 * MIB
    assert len(await play(worker.address, recording.said)) == len(recording.answered)


def test_a_torn_copy_is_told_at_the_start(tmp_path: Path, logged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dairllm.formats import digest

    monkeypatch.setattr(digest, "WORTH_KEEPING", 1)
    write_random_model(tmp_path / "m.m", SPEC)
    OwnModel.open(tmp_path / "m.m").close()
    flip(tmp_path / "m.m", (tmp_path / "m.m").stat().st_size - 1)
    OwnModel.open(tmp_path / "m.m").close()
    (told,) = events(logged, "the model is not what its digests were made of")
    assert (told["first"], told["tensors"]) == ("final_matmul_logits", 1)
