"""A cluster whose nodes have room for part of their shares, read from their own disks: one node's ids, and no weights over the wire."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dairllm import machine
from dairllm.cluster.cluster import Cluster
from dairllm.config import WorkerAddress
from dairllm.engine.located_weights import LocatedWeights
from dairllm.engine.program import Program
from dairllm.errors import RefusedError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import build_network, build_node
from dairllm.graph.references import weight_references
from dairllm.graph.slicing import ShareSize, deal_shares, parse_shares
from dairllm.graph.types import FloatType
from dairllm.paging.needs import PagingSettings, weights_needs
from dairllm.runtime.compute import Compute
from dairllm.units import parse_size
from tests.cluster.clusters import ids_of, one_node
from tests.cluster.conftest import Log

MIB = 1 << 20
IDS = [(7 * place + 3) % 320 for place in range(40)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 MiB of weights: enough that the fluctuations of a process of tests do not decide whether half of them fit."""
    path = tmp_path_factory.mktemp("paged") / "m.m"
    spec = small_spec(weight_type=FloatType.F32, dim=512, n_heads=8, n_kv_heads=4, head_dim=64, hidden_dim=2048, n_layers=3, seq_len=128)
    write_random_model(path, spec, seed=7)
    return path


def half(model: ModelFile, sizes: Sequence[ShareSize]) -> PagingSettings:
    """Room for half of the root's blocks."""
    shares = deal_shares(model.spec, sizes)
    network = build_network(model.spec, shares, FloatType.F32)
    node = build_node(model.spec, network, 0, shares[0])
    needs = weights_needs(network, node, LocatedWeights(model, node, weight_references(model.spec, shares[0], node)))
    assert needs.blocks_total > needs.streaming_blocks_min + 2
    return PagingSettings((needs.blocks_total + needs.streaming_blocks_min) // 2, "pinned", "mmap", 1, needs.block_bytes)


def room(mib: int) -> dict[str, object]:
    return {"memory": f"{machine.rss_bytes() + mib * MIB}B"}


@pytest.mark.parametrize("shares", ["4/1024,4/1024", "5/1088,3/960"])
async def test_root_and_worker_page_their_shares(make_worker: Any, compute: Compute[Program], logged: Log, path: Path, shares: str) -> None:
    expected = await one_node(path, compute, IDS, 12)
    worker = await make_worker(own=path, limits=room(32), paging={"io_mode": "mmap", "readers": 1})
    with ModelFile.open(path) as model:
        sizes = parse_shares(shares)
        address = WorkerAddress("127.0.0.1", worker.port)
        cluster = Cluster(model, [address], compute, n_threads=1, sizes=sizes, paging=half(model, sizes))
        await cluster.open()
        assert await ids_of(cluster, IDS, 12) == expected
        assert cluster.nodes[0].weight_bytes_sent == 0
        assert cluster.paging is not None
        assert cluster.paging.metrics.bytes > 13 * MIB
        await cluster.close()
    (plan,) = (entry for entry in logged if entry["event"] == "memory plan")
    assert parse_size(plan["in_memory"]) < parse_size(plan["weights"])


async def test_a_worker_with_room_for_no_ring_refuses_and_serves_on(
    make_worker: Any, compute: Compute[Program], logged: Log, path: Path
) -> None:
    """Whoever started the root is told what is missing where, and the other worker is left in good order."""
    poor, other = await make_worker(own=path, limits=room(9)), await make_worker(own=path)
    addresses = [WorkerAddress("127.0.0.1", worker.port) for worker in (poor, other)]
    told = (
        rf"worker 127\.0\.0\.1:{poor.port} \(node 1\) refuses its share: the memory limit \d+B = .* is too small: .*; .* would do\. "
        r"A shorter context \(--max-seq-len of the root, now \d+\) or a smaller share \(--shares\) needs less"
    )
    with ModelFile.open(path) as model:
        for _ in range(2):
            with pytest.raises(RefusedError, match=told):
                await Cluster(model, addresses, compute, n_threads=1).open()
        cluster = Cluster(model, addresses[1:], compute, n_threads=1)
        await cluster.open()
        await cluster.close()
    failed = [entry["kind"] for entry in logged if entry["event"] == "session failed"]
    assert failed == ["LimitError", "LimitError"]
