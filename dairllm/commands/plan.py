"""`dairllm plan`: what each node would hold, before anything is loaded."""

import json as json_format
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dairllm import machine

# A plan counts what the process holds, and a server holds most: what it imports is imported here.
from dairllm.commands import serve as _server  # noqa: F401
from dairllm.commands.asked_too_much import tell_context
from dairllm.commands.generate_options import tokenizer_path
from dairllm.commands.plan_text import plan_lines, reading, reading_lines
from dairllm.commands.root_node import plan_of, template_bytes
from dairllm.config import RootSettings, load_settings
from dairllm.errors import ConfigError
from dairllm.formats.model_file import ModelFile
from dairllm.paging.needs import PagingSettings
from dairllm.paging.read_mode import ReadMode, probe_read_mode
from dairllm.runtime.memory_plan import MemoryPlan, program_bytes
from dairllm.text.tokenizer import Tokenizer

__all__ = ["run"]

_ANOTHER_START = 2 << 20
"""How much more a program may hold at its next start: it depends on what of its libraries is in memory already."""


def run(
    model: Path, config: Path | None, n_nodes: int | None, flags: Mapping[str, tuple[str, object]], *, measure: bool, json: bool
) -> None:
    """Print the plan of this machine alone, or of each node of a cluster, all with the same limit.

    Args:
        n_nodes: nodes of a cluster whose workers need not exist; the settings' own if None.
        measure: read some of the file, and say how long a token will wait for the disk.

    Raises:
        LimitError: the limit is too small; has the smallest that works.
        GraphError: the model cannot be shared by so many, or not computed.
        FormatError: it is no whole `.m` file.
        EngineError: the file cannot be read in the mode that was asked for.
    """
    if n_nodes is not None:
        workers = ",".join(f"node-{node}" for node in range(1, n_nodes))
        flags = {**flags, "cluster.workers": ("--nodes", workers or None)}
    settings = load_settings(RootSettings, config, flags=flags)
    if n_nodes is not None and n_nodes < 1:
        raise ConfigError(f"--nodes {n_nodes}: there must be one at least")
    with ModelFile.open(model, max_seq_len=settings.model.max_seq_len) as file:
        tell_context(settings.model.max_seq_len, file.spec)
        beside = tokenizer_path(model, settings.model.tokenizer, needed=False)
        words = None if beside is None else Tokenizer.load(beside)
        peak = machine.peak_rss_bytes() + _ANOTHER_START
        machine.give_back_memory()
        runtime, of_root = program_bytes() + _ANOTHER_START, template_bytes(words)
        del words
        told: dict[Path, str] = {}
        conversations = settings.server.most_conversations
        plans = [
            plan_of(settings, file, node, runtime=runtime + (0 if node else of_root), peak=peak, told=told, conversations=conversations)
            for node in range(len(settings.cluster.workers) + 1)
        ]
        measured = _measured(settings, file, plans) if measure else {}
    choices = [None if plan.budget_blocks is None else measured.get(plan.needs.block_bytes) for plan in plans]
    if json:
        nodes = [
            {"node": node, **plan.figures(), "reading": None if choice is None else reading(choice, plan)}
            for node, (plan, choice) in enumerate(zip(plans, choices, strict=True))
        ]
        json_format.dump({"model": str(model), "nodes": nodes}, sys.stdout)
        sys.stdout.write("\n")
        return
    for node, (plan, choice) in enumerate(zip(plans, choices, strict=True)):
        if len(plans) > 1:
            sys.stdout.write(f"node {node}{' (the root)' if node == 0 else ''}\n")
        lines = plan_lines(plan) + ([] if choice is None else reading_lines(plan, choice))
        sys.stdout.writelines(f"{line}\n" for line in lines)


def _measured(settings: RootSettings, file: ModelFile, plans: Sequence[MemoryPlan]) -> dict[int, ReadMode]:
    """How this machine reads the file, by the size of blocks; empty where nothing would be read."""
    sizes = dict.fromkeys(plan.needs.block_bytes for plan in plans if plan.budget_blocks is not None)
    paging = PagingSettings.chosen(settings.paging, 0, 0)
    return {size: probe_read_mode(file.path, file.stamp, size, paging.io_mode, paging.readers) for size in sizes}
