"""What computes for a root, by its settings: the model's file, the plan of memory, this machine alone or a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dairllm.config import RootSettings
from dairllm.engine.paging import PagingSettings
from dairllm.errors import ConfigError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import N_BATCHES, build_graph, build_network, build_node
from dairllm.graph.slicing import Share, deal_shares, nearly_equal_sizes, parse_shares
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig
from dairllm.nodes.local import LocalNode, default_sync
from dairllm.nodes.memory_plan import MemoryPlan, plan_memory

if TYPE_CHECKING:
    from dairllm.engine.program import Program
    from dairllm.net.compute import Compute
    from dairllm.nodes.root import Cluster

__all__ = ["plan_of", "planned_model", "root_node"]


@contextmanager
def planned_model(settings: RootSettings) -> Iterator[tuple[ModelFile, MemoryPlan]]:
    """The model's file, open, with the context that the plan has room for; and the plan.

    Raises:
        ConfigError: no model is named.
        FormatError: its file is not what it should be.
        GraphError: it cannot be computed, or not shared so.
        LimitError: it cannot be computed within the memory limit.
    """
    if settings.model.file is None:
        raise ConfigError("no model: name its file with --model, or as model.file in the configuration")
    path = Path(settings.model.file)
    with ModelFile.open(path, max_seq_len=settings.model.max_seq_len) as model:
        plan = plan_of(settings, model)
        if plan.seq_len == model.spec.seq_len:
            yield model, plan
            return
    with ModelFile.open(path, max_seq_len=plan.seq_len) as model:
        yield model, plan


def plan_of(settings: RootSettings, model: ModelFile, node: int = 0) -> MemoryPlan:
    """The plan of a node of the cluster that the settings describe, by default of the root. Raises as `planned_model`."""
    n_nodes, sync = len(settings.cluster.workers) + 1, _sync(settings, model)
    limit, chosen, kv_cache = settings.limits.memory, settings.model.max_seq_len, FloatType[settings.engine.kv_cache.upper()]
    shares = _shares(settings, model, n_nodes)
    if n_nodes == 1:

        def alone(seq_len: int, rows: int) -> tuple[NetworkConfig, NodeConfig]:
            network, (only,) = build_graph(replace(model.spec, seq_len=seq_len), 1, sync, rows)
            return network, only

        return plan_memory(model, alone, limit, max_seq_len=chosen, kv_cache=kv_cache)

    def shared(seq_len: int, rows: int) -> tuple[NetworkConfig, NodeConfig]:
        spec = replace(model.spec, seq_len=seq_len)
        network = build_network(spec, shares, sync, rows)
        return network, build_node(spec, network, node, shares[node])

    return plan_memory(model, shared, limit, share=shares[node], max_seq_len=chosen, rows=(N_BATCHES,), kv_cache=kv_cache)


def root_node(settings: RootSettings, model: ModelFile, compute: "Compute[Program]", plan: MemoryPlan) -> "LocalNode | Cluster":
    """What computes, not yet open.

    Raises:
        GraphError: the model cannot be computed, or not shared so.
        ConfigError: workers and shares are not the same number.
    """
    n_threads, workers, sync = settings.engine.n_threads, settings.cluster.workers, _sync(settings, model)
    kv_cache = FloatType[settings.engine.kv_cache.upper()]
    paging = None if plan.room_blocks is None else PagingSettings.chosen(settings.paging, plan.room_blocks, plan.needs.block_bytes)
    if not workers:
        return LocalNode(model, compute, n_threads=n_threads, sync=sync, rows=plan.rows, kv_cache=kv_cache, paging=paging)
    from dairllm.nodes.root import Cluster

    return Cluster(
        model,
        workers,
        compute,
        n_threads=n_threads,
        sizes=None if settings.cluster.shares is None else parse_shares(settings.cluster.shares),
        sync=sync,
        kv_cache=kv_cache,
        paging=paging,
        overlap=settings.engine.overlap,
        deadlines=settings.deadlines,
        keepalive=settings.keepalive,
    )


def _sync(settings: RootSettings, model: ModelFile) -> FloatType:
    chosen = settings.engine.sync
    return default_sync(model.spec.weight_type) if chosen == "auto" else FloatType[chosen.upper()]


def _shares(settings: RootSettings, model: ModelFile, n_nodes: int) -> tuple[Share, ...]:
    if settings.cluster.shares is None:
        return deal_shares(model.spec, nearly_equal_sizes(model.spec, n_nodes))
    sizes = parse_shares(settings.cluster.shares)
    if len(sizes) != n_nodes:
        raise ConfigError(f"shares for {len(sizes)} nodes, but there are {n_nodes}: this one, which comes first, and the workers")
    return deal_shares(model.spec, sizes)
