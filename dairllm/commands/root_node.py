"""What computes for a root, by its settings: the model's file, the plan of memory, this machine alone or a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dairllm import machine
from dairllm.cluster.cluster_history import ClusterHistory
from dairllm.cluster.weight_sender import SENDING_BYTES
from dairllm.commands.asked_too_much import tell_context, tell_threads
from dairllm.config import MemoryAmount, RootSettings
from dairllm.engine.located_weights import LocatedWeights
from dairllm.engine.weights import Weights
from dairllm.errors import ConfigError, GraphError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import N_BATCHES, build_graph, build_network, build_node
from dairllm.graph.references import weight_references
from dairllm.graph.slicing import Share, deal_shares, nearly_equal_sizes, parse_shares
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig
from dairllm.paging.needs import PagingSettings
from dairllm.runtime.local_node import LocalNode, default_sync
from dairllm.runtime.memory_plan import MemoryPlan, plan_memory, possible_limit, program_bytes
from dairllm.runtime.pass_clock import PassClock
from dairllm.runtime.prepared_share import find_share
from dairllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dairllm.cluster.cluster import Cluster
    from dairllm.engine.program import Program
    from dairllm.runtime.compute import Compute

__all__ = ["plan_of", "planned_model", "root_node", "sync_of", "template_bytes"]


@contextmanager
def planned_model(
    settings: RootSettings, tokenizer: Path | None, *, serves: bool = False
) -> Iterator[tuple[ModelFile, Tokenizer | None, MemoryPlan]]:
    """The model's file, open, with the context that the plan has room for; its tokenizer, which the plan counts; and the plan.

    Args:
        serves: it is a server, which keeps a process for the chat template, and several conversations.

    Raises:
        ConfigError: no model is named, or the tokenizer is another model's.
        FormatError: a file is not what it should be.
        GraphError: the model cannot be computed, or not shared so.
        LimitError: it cannot be computed within the memory limit.
    """
    if settings.model.file is None:
        raise ConfigError("no model: name its file with --model, or as model.file in the configuration")
    path = Path(settings.model.file)
    tell_threads(settings.engine.n_threads)
    with ModelFile.open(path, max_seq_len=settings.model.max_seq_len) as model:
        tell_context(settings.model.max_seq_len, model.spec)
        words = None if tokenizer is None else Tokenizer.load(tokenizer)
        if words is not None and words.vocab_size > model.spec.vocab_size:
            raise ConfigError(
                f"the tokenizer knows {words.vocab_size} tokens, the model {model.spec.vocab_size}: they do not belong together"
            )
        machine.give_back_memory()  # of what reading the vocabulary took
        runtime = program_bytes() + (template_bytes(words) if serves else 0)
        limit, peak = possible_limit(settings.limits.memory), machine.peak_rss_bytes()
        conversations = settings.server.most_conversations if serves else 1
        plan = plan_of(settings, model, limit=limit, runtime=runtime, peak=peak, conversations=conversations)
        if plan.seq_len == model.spec.seq_len:
            yield model, words, plan
            return
    with ModelFile.open(path, max_seq_len=plan.seq_len) as model:
        yield model, words, plan


def template_bytes(tokenizer: Tokenizer | None) -> int:
    """Of a server's process for its model's chat template; 0 where there is none."""
    if tokenizer is None or tokenizer.chat_template is None:
        return 0
    from dairllm.text.chat_renderer import PROCESS_BYTES  # not for `generate`

    return PROCESS_BYTES


def plan_of(
    settings: RootSettings,
    model: ModelFile,
    node: int = 0,
    *,
    limit: MemoryAmount | None = None,
    runtime: int | None = None,
    peak: int = 0,
    told: dict[Path, str] | None = None,
    conversations: int = 1,
) -> MemoryPlan:
    """The plan of a node of the cluster that the settings describe, by default of the root. Raises as `planned_model`.

    Args:
        limit: in place of the settings'.
        runtime: what its process holds beside model and caches; this process', as it is now, and what is to come, if None.
        peak: what it has held at most until now: a limit below that is broken already.
        told: what the log was told of prepared shares, as `find_share` has it.
        conversations: the most that are to have a KV cache each; a node of a cluster has one.
    """
    runtime = program_bytes() if runtime is None else runtime
    n_threads, n_nodes, sync = settings.engine.n_threads, len(settings.cluster.workers) + 1, sync_of(settings, model)
    limit, chosen = limit or settings.limits.memory, settings.model.max_seq_len
    kv_cache = FloatType[settings.engine.kv_cache.upper()]
    shares = _shares(settings, model, n_nodes)
    if n_nodes == 1:

        def alone(seq_len: int, rows: int) -> tuple[NetworkConfig, NodeConfig]:
            network, (only,) = build_graph(replace(model.spec, seq_len=seq_len), 1, sync, rows)
            return network, only

        return plan_memory(
            model, alone, limit, n_threads=n_threads, max_seq_len=chosen, kv_cache=kv_cache, runtime=runtime, start=peak - runtime,
            conversations=conversations,
        )  # fmt: skip

    def shared(seq_len: int, rows: int) -> tuple[NetworkConfig, NodeConfig]:
        spec = replace(model.spec, seq_len=seq_len)
        network = build_network(spec, shares, sync, rows)
        return network, build_node(spec, network, node, shares[node])

    _, graph = shared(model.spec.seq_len, N_BATCHES)
    references = weight_references(model.spec, shares[node], graph)
    prepared = find_share(model, references, told=told)

    def weigh(graph: NodeConfig) -> tuple[Weights, Weights]:
        strided, packed = (LocatedWeights(model, graph, references, prepared, packed=packed) for packed in (False, True))
        return strided, packed

    sending = len(settings.cluster.workers) * SENDING_BYTES if node == 0 else 0
    return plan_memory(
        model, shared, limit, n_threads=n_threads, weigh=weigh, max_seq_len=chosen, rows=(N_BATCHES,), kv_cache=kv_cache,
        runtime=runtime, start=max(sending, peak - runtime),
    )  # fmt: skip


def root_node(
    settings: RootSettings,
    model: ModelFile,
    compute: "Compute[Program]",
    plan: MemoryPlan,
    clock: PassClock | None = None,
    history: ClusterHistory | None = None,
) -> "LocalNode | Cluster":
    """What computes, not yet open.

    Args:
        clock: of its passes.
        history: of a cluster that is opened again and again.

    Raises:
        GraphError: the model cannot be computed, or not shared so.
        ConfigError: workers and shares are not the same number.
    """
    n_threads, workers, sync = settings.engine.n_threads, settings.cluster.workers, sync_of(settings, model)
    kv_cache = FloatType[settings.engine.kv_cache.upper()]
    paging = None if plan.budget_blocks is None else PagingSettings.chosen(settings.paging, plan.budget_blocks, plan.needs.block_bytes)
    if not workers:
        return LocalNode(
            model,
            compute,
            n_threads=n_threads,
            sync=sync,
            rows=plan.rows,
            kv_cache=kv_cache,
            paging=paging,
            clock=clock,
            conversations=plan.conversations,
        )
    from dairllm.cluster.cluster import Cluster

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
        clock=clock,
        history=history,
    )


def sync_of(settings: RootSettings, model: ModelFile) -> FloatType:
    """What crosses the wire between nodes, by the settings."""
    chosen = settings.engine.sync
    return default_sync(model.spec.weight_type) if chosen == "auto" else FloatType[chosen.upper()]


def _shares(settings: RootSettings, model: ModelFile, n_nodes: int) -> tuple[Share, ...]:
    if settings.cluster.shares is None:
        return deal_shares(model.spec, nearly_equal_sizes(model.spec, n_nodes))
    sizes = parse_shares(settings.cluster.shares)
    if len(sizes) != n_nodes:
        raise ConfigError(f"shares for {len(sizes)} nodes, but there are {n_nodes}: this one, which comes first, and the workers")
    try:
        return deal_shares(model.spec, sizes)
    except GraphError as error:
        raise ConfigError(str(error)) from error
