"""Nodes that find their share in a file of its own: the same ids, and no other bytes are read."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dairllm import machine
from dairllm.cluster.cluster import Cluster
from dairllm.cluster.own_model import OwnModel
from dairllm.commands import prepare
from dairllm.config import WorkerAddress
from dairllm.engine.located_weights import LocatedWeights
from dairllm.engine.program import Program
from dairllm.errors import EngineError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.formats.share_file import ShareFile, share_path
from dairllm.graph.build import build_graph, build_network, build_node
from dairllm.graph.plan import token_plan
from dairllm.graph.references import weight_references
from dairllm.graph.slicing import deal_shares, nearly_equal_sizes, parse_shares
from dairllm.graph.types import FloatType
from dairllm.paging.needs import PagingNeeds, PagingSettings, weights_needs
from dairllm.protocol.dllama.events import NodeReceived
from dairllm.runtime.compute import Compute
from dairllm.runtime.prepared_share import find_share
from dairllm.serving.generation import Generation
from dairllm.serving.sampler import Sampler
from dairllm.units import parse_size
from tests.cluster.conftest import Log

on_uvloop = pytest.mark.asyncio(loop_factories=["uvloop"])

MIB = 1 << 20
IDS = [(7 * place + 3) % 320 for place in range(40)]
SPEC = small_spec(weight_type=FloatType.F32, dim=512, n_heads=8, n_kv_heads=4, head_dim=64, hidden_dim=2048, n_layers=3, seq_len=128)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 MiB of weights."""
    path = tmp_path_factory.mktemp("shares") / "m.m"
    write_random_model(path, SPEC, seed=7)
    return path


@pytest.fixture
def path(made: Path) -> Iterator[Path]:
    """The model, with no share beside it."""
    yield made
    for other in made.parent.glob("m.m.share-*"):
        other.unlink()


@contextlib.asynccontextmanager
async def paged_root(path: Path, port: int, compute: Compute[Program]) -> AsyncIterator[tuple[ModelFile, Cluster]]:
    """With room for little of its share, and the model that it has open."""
    with ModelFile.open(path) as model:
        needs = needs_of(model, 0, "4/1024,4/1024")
        paging = PagingSettings(needs.streaming_blocks_min + 2, "pinned", "buffered", 1, needs.block_bytes)
        cluster = Cluster(model, [WorkerAddress("127.0.0.1", port)], compute, n_threads=1, paging=paging)
        await cluster.open()
        try:
            yield model, cluster
        finally:
            await cluster.close()


def needs_of(model: ModelFile, node: int, shares: str) -> PagingNeeds:
    """With the share that lies beside the model, if one does."""
    dealt = deal_shares(model.spec, parse_shares(shares))
    network = build_network(model.spec, dealt, FloatType.F32)
    graph = build_node(model.spec, network, node, dealt[node])
    references = weight_references(model.spec, dealt[node], graph)
    return weights_needs(network, graph, LocatedWeights(model, graph, references, find_share(model, references)))


async def answer(path: Path, port: int, compute: Compute[Program], shares: str, room: float | None) -> tuple[list[int], int]:
    """Ids of a cluster of two whose root has room for so much of its share; bytes that the root reads."""
    with ModelFile.open(path) as model:
        needs = needs_of(model, 0, shares)
        paging = None
        if room is not None:
            blocks = needs.streaming_blocks_min + int((needs.blocks_total - needs.streaming_blocks_min) * room)
            paging = PagingSettings(blocks, "pinned", "mmap", 1, needs.block_bytes)
        cluster = Cluster(model, [WorkerAddress("127.0.0.1", port)], compute, n_threads=1, sizes=parse_shares(shares), paging=paging)
        try:
            await cluster.open()
            ids = [token async for token in Generation(cluster, Sampler(0.0, 1.0, 0), IDS, 12).run()]
            assert cluster.nodes[0].weight_bytes_sent == 0
            return ids, 0 if cluster.paging is None else cluster.paging.metrics.bytes
        finally:
            await cluster.close()


@on_uvloop
@pytest.mark.parametrize("shares", ["4/1024,4/1024", "5/1088,3/960"])
async def test_the_same_ids_with_fewer_bytes(make_worker: Any, compute: Compute[Program], logged: Log, path: Path, shares: str) -> None:
    """Of a root and a worker that page, and of a root that does not; also where the worker's heads lie apart."""
    limits = {"memory": f"{machine.rss_bytes() + 34 * MIB}B"}
    worker = await make_worker(own=path, limits=limits, paging={"io_mode": "mmap", "readers": 1})
    expected, before = await answer(path, worker.port, compute, shares, 0.4)
    prepare.run(path, shares=shares)
    with ModelFile.open(path) as model:
        for node in (0, 1):
            size = share_path(path, node, 2).stat().st_size
            assert 0 <= needs_of(model, node, shares).blocks_total * 2 * MIB - size < 4 * MIB
    found, after = await answer(path, worker.port, compute, shares, 0.4)
    assert found == expected
    assert after < 0.85 * before
    first, second = (parse_size(entry["weights"]) for entry in logged if entry["event"] == "memory plan")
    assert second < first or shares.startswith("5")  # heads that lie apart were in memory before
    used = [entry["share"] for entry in logged if entry["event"] == "weights are read from the prepared share"]
    assert {Path(name).name for name in used} == {"m.m.share-0-of-2", "m.m.share-1-of-2"}
    assert (await answer(path, worker.port, compute, shares, None))[0] == expected


@on_uvloop
async def test_a_share_of_a_model_that_was_replaced_is_passed_over(
    make_worker: Any, compute: Compute[Program], logged: Log, path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "m.m"
    write_random_model(other, SPEC, seed=8)
    prepare.run(other, nodes=2)
    for node in (0, 1):
        share_path(other, node, 2).rename(share_path(path, node, 2))
    share_path(path, 0, 3).write_bytes(b"dairllm share 1\n, and then nothing")
    worker = await make_worker(own=path)
    shares = "4/1024,4/1024"
    ids, _ = await answer(path, worker.port, compute, shares, 0.5)
    told = [entry for entry in logged if entry["event"] == "a prepared share is not used"]
    assert any("it was made of another model than" in entry["reason"] and entry["share"].endswith("share-1-of-2") for entry in told)
    assert any("m.m.share-0-of-3" in entry["reason"] for entry in told)
    for node in (0, 1):
        share_path(path, node, 2).unlink()
    assert (await answer(path, worker.port, compute, shares, 0.5))[0] == ids


@on_uvloop
async def test_a_share_that_is_cut_while_it_is_paged(make_worker: Any, compute: Compute[Program], path: Path) -> None:
    prepare.run(path, nodes=2, only=0)
    worker = await make_worker(own=path)
    async with paged_root(path, worker.port, compute) as (_, cluster):
        await cluster.feed(IDS[:3], 0, logits=True)
        with share_path(path, 0, 2).open("r+b") as file:
            file.truncate(3 * MIB)
        with pytest.raises(EngineError, match=r"m\.m\.share-0-of-2 had \d+ bytes when it was opened and has 3145728 now"):
            await cluster.feed(IDS[3:4], 3, logits=True)


@on_uvloop
async def test_a_model_that_is_written_to_while_its_share_is_paged(make_worker: Any, compute: Compute[Program], tmp_path: Path) -> None:
    """Rows of the embedding still come from it."""
    path = tmp_path / "m.m"
    write_random_model(path, SPEC, seed=7)
    prepare.run(path, nodes=2, only=0)
    worker = await make_worker(own=path)
    async with paged_root(path, worker.port, compute) as (model, cluster):
        with path.open("r+b") as file:
            file.seek(model.tensor("embedding").offset)
            file.write(b"other")
        with pytest.raises(EngineError, match=r"m\.m has been written to since it was opened"):
            await cluster.feed(IDS[:1], 0, logits=True)


@pytest.mark.parametrize("n_nodes", [2, 4])
def test_a_worker_of_a_root_of_distributed_llama_finds_its_share(path: Path, n_nodes: int) -> None:
    """Such a root says nothing but the graph; its nodes have equal shares."""
    prepare.run(path, nodes=n_nodes)
    network, nodes = build_graph(SPEC, n_nodes, FloatType.F32)
    own = OwnModel.open(path)
    for node in nodes[1:]:
        found = own.weights(NodeReceived(network, node, token_plan(network, node)), b"", own.identity)
        assert found is not None
        for weights in found:
            assert isinstance(weights.matmul_file, ShareFile)
            assert weights.matmul_file.path == share_path(path, node.node, n_nodes)
            assert weights.nbytes == 0
    own.close()


def test_only_the_very_share_will_do(path: Path) -> None:
    prepare.run(path, nodes=2)
    with ModelFile.open(path) as model:
        for shares, there in (("4/1024,4/1024", True), ("4/1056,4/992", False), ("6/1024,2/1024", False)):
            dealt = deal_shares(SPEC, parse_shares(shares))
            graph = build_node(SPEC, build_network(SPEC, dealt, FloatType.F32), 1, dealt[1])
            assert (find_share(model, weight_references(SPEC, dealt[1], graph)) is not None) == there
        dealt = deal_shares(SPEC, nearly_equal_sizes(SPEC, 4))
        graph = build_node(SPEC, build_network(SPEC, dealt, FloatType.F32), 1, dealt[1])
        assert find_share(model, weight_references(SPEC, dealt[1], graph), lambda: pytest.fail("asked though there is none")) is None
