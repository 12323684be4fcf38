"""Roots of ours for tests, and what one node says alone."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from dairllm.cluster.cluster import Cluster
from dairllm.config import RootDeadlines, WorkerAddress
from dairllm.engine.program import Program
from dairllm.formats.model_file import ModelFile
from dairllm.graph.slicing import parse_shares
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import LocalNode
from dairllm.serving.generation import Generation, Model
from dairllm.serving.sampler import Sampler
from tests.patience import PATIENCE

__all__ = ["MakeCluster", "ids_of", "make_cluster", "one_node"]

MakeCluster = Callable[..., Cluster]


@pytest.fixture
async def make_cluster(compute: Compute[Program]) -> AsyncIterator[MakeCluster]:
    """A root, not opened yet, over a model file and the ports of its workers. All are closed in the end."""
    made: list[tuple[Cluster, ModelFile]] = []

    def make(path: Path, ports: Sequence[int], shares: str | None = None, **deadlines: str) -> Cluster:
        model = ModelFile.open(path)
        workers = [WorkerAddress("127.0.0.1", port) for port in ports]
        sizes = None if shares is None else parse_shares(shares)
        cluster = Cluster(model, workers, compute, n_threads=1, sizes=sizes, deadlines=RootDeadlines.model_validate(deadlines))
        made.append((cluster, model))
        return cluster

    yield make
    for cluster, model in made:
        await cluster.close()
        model.close()


async def ids_of(model: Model, prompt: Sequence[int], steps: int) -> list[int]:
    async with asyncio.timeout(PATIENCE):
        return [token async for token in Generation(model, Sampler(0.0, 1.0, 0), prompt, steps).run()]


async def one_node(path: Path, compute: Compute[Program], prompt: Sequence[int], steps: int) -> list[int]:
    with ModelFile.open(path) as model:
        node = LocalNode(model, compute, n_threads=1)
        await node.open()
        found = await ids_of(node, prompt, steps)
        await node.close()
        return found
