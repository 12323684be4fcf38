"""`dairllm plan`: what each node would hold, before anything is loaded."""

import json as json_format
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dairllm.commands.root_node import plan_of
from dairllm.config import RootSettings, load_settings
from dairllm.errors import ConfigError
from dairllm.formats.model_file import ModelFile
from dairllm.nodes.memory_plan import MemoryPlan
from dairllm.units import format_size

__all__ = ["run"]


def run(model: Path, config: Path | None, n_nodes: int | None, flags: Mapping[str, tuple[str, object]], *, json: bool) -> None:
    """Print the plan of this machine alone, or of each node of a cluster, all with the same limit.

    Args:
        n_nodes: nodes of a cluster whose workers need not exist; the settings' own if None.

    Raises:
        LimitError: the limit is too small; has the smallest that works.
        GraphError: the model cannot be shared by so many, or not computed.
        FormatError: it is no whole `.m` file.
    """
    if n_nodes is not None:
        workers = ",".join(f"node-{node}" for node in range(1, n_nodes))
        flags = {**flags, "cluster.workers": ("--nodes", workers or None)}
    settings = load_settings(RootSettings, config, flags=flags)
    if n_nodes is not None and n_nodes < 1:
        raise ConfigError(f"--nodes {n_nodes}: there must be one at least")
    with ModelFile.open(model, max_seq_len=settings.model.max_seq_len) as file:
        plans = [plan_of(settings, file, node) for node in range(len(settings.cluster.workers) + 1)]
    if json:
        json_format.dump({"model": str(model), "nodes": [_object(node, plan) for node, plan in enumerate(plans)]}, sys.stdout)
        sys.stdout.write("\n")
        return
    for node, plan in enumerate(plans):
        if len(plans) > 1:
            sys.stdout.write(f"node {node}{' (the root)' if node == 0 else ''}\n")
        sys.stdout.writelines(f"{line}\n" for line in lines(plan))


def lines(plan: MemoryPlan) -> list[str]:
    """The plan as a table for people."""
    table = plan.table()
    width = max(len(what) for what, _, _ in table)
    return [f"{what:{width}}  {format_size(size):>10}  {remark}" for what, size, remark in table]


def _object(node: int, plan: MemoryPlan) -> dict[str, Any]:
    return {
        "node": node,
        "limit_bytes": plan.limit,
        "smallest_limit_bytes": plan.smallest,
        "total_bytes": plan.total,
        "runtime_bytes": plan.runtime,
        "kv_cache_bytes": plan.kv_cache,
        "buffer_bytes": plan.buffers,
        "weight_bytes": plan.weights,
        "resident_weight_bytes": plan.resident,
        "missing_bytes_a_token": plan.missing,
        "max_seq_len": plan.seq_len,
        "batch_rows": plan.rows,
        "paged": plan.room_blocks is not None,
    }
