"""A limit of memory is kept by whole processes: the same ids as without one, and never more than it, by the system's own figures."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dairllm.bench.memory_group import MemoryGroup
from dairllm.errors import ConfigError
from dairllm.formats.random_model import byte_vocabulary, small_spec, write_random_model
from dairllm.graph.types import FloatType
from dairllm.units import parse_size
from tests.commands.node_process import WorkerProcess
from tests.patience import PATIENCE

MIB = 1 << 20
CONTEXT = 160
PROMPT = ",".join(str(7 * place % 300 + 3) for place in range(CONTEXT - 8))
"""Fills the context: all of the KV cache is touched."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """76 MiB of weights."""
    path = tmp_path_factory.mktemp("limited") / "m.m"
    spec = small_spec(weight_type=FloatType.Q40, dim=1024, n_heads=16, n_kv_heads=16, hidden_dim=4096, n_layers=8, seq_len=4096)
    write_random_model(path, spec)
    byte_vocabulary(320).write(path.with_suffix(".t"))
    return path


def plan(model: Path, *words: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "dairllm", "plan", str(model), "--json", *map(str, words)], capture_output=True, check=True, timeout=60
    )
    nodes: list[dict[str, Any]] = json.loads(done.stdout)["nodes"]
    return nodes[-1]


def smallest(model: Path, *words: object) -> int:
    """The least limit that `generate` would take, as it says where it has less; and what one start differs from another by."""
    command = [sys.executable, "-m", "dairllm", "generate", "--model", str(model), "--prompt-ids", "5", "--max-seq-len", str(CONTEXT)]
    command += ["--memory-limit", "20MiB", *map(str, words)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False).stderr
    found = re.search(r"; (\d+MiB) would do", told)
    assert found is not None, told
    return parse_size(found[1]) + MIB


@contextlib.contextmanager
def group_of(limit: int) -> Iterator[MemoryGroup | None]:
    """A control group with the limit, where this machine lets us have one."""
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(MemoryGroup(limit))
        except ConfigError:
            yield None
        else:
            yield group


def generate(model: Path, *words: object, limit: int | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "dairllm", "generate", "--model", str(model), "--prompt-ids", PROMPT, "--steps", "6", "--json"]
    command += ["--max-seq-len", str(CONTEXT), *map(str, words)]
    if limit is not None:
        command += ["--memory-limit", f"{limit}B"]
    with group_of(limit) if limit is not None else contextlib.nullcontext() as group:
        enter = None if group is None else group.enter
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, preexec_fn=enter, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    """By the type of the KV cache. Kernels are compiled by now."""
    return {kind: generate(model, "--kv-cache", kind)["ids"] for kind in ("f32", "f16", "q80")}


@pytest.mark.parametrize(
    ("kind", "threads", "more"), [("f32", 1, 0), ("f32", 4, 0), ("f32", 4, 20 * MIB), ("f16", 2, 0), ("q80", 2, 0), ("q80", 1, 20 * MIB)]
)
def test_a_process_keeps_its_limit_from_the_smallest_on(
    model: Path, expected: dict[str, list[int]], kind: str, threads: int, more: int
) -> None:
    options = ("--kv-cache", kind, "--threads", threads)
    limit = smallest(model, *options) + more
    assert limit <= plan(model, "--max-seq-len", CONTEXT, *options)["smallest_limit_bytes"] + more, "plan counts on a server"
    found = generate(model, *options, limit=limit)
    assert found["ids"] == expected[kind]
    assert found["peak_rss_bytes"] <= limit
    assert found["memory_plan"]["limit_bytes"] == limit
    assert found["memory_plan"]["total_bytes"] <= limit
    assert found["paging"]["bytes"] > found["memory_plan"]["weight_bytes"]
    assert found["paging"]["io_mode"] in ("mmap", "buffered", "direct")


def test_a_limit_below_the_smallest_is_refused_with_one_that_works(model: Path) -> None:
    limit = smallest(model)
    command = [sys.executable, "-m", "dairllm", "generate", "--model", str(model), "--prompt-ids", "5", "--max-seq-len", str(CONTEXT)]
    refused = subprocess.run(
        [*command, "--memory-limit", f"{limit - 4 * MIB}B"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert refused.returncode == 1
    assert f"the memory limit {limit - 4 * MIB}B = " in refused.stderr
    command += ["--memory-limit", f"{limit}B", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert "smallest limit" in done.stderr, "the plan is shown"
    assert "weights are read with " in done.stderr


def test_a_worker_with_the_model_keeps_its_limit(model: Path, expected: dict[str, list[int]], tmp_path: Path) -> None:
    limit = plan(model, "--nodes", 2, "--max-seq-len", CONTEXT, "--threads", 1)["smallest_limit_bytes"] + 4 * MIB
    worker = WorkerProcess(tmp_path / "worker.log", "--model", str(model), "--memory-limit", f"{limit}B")
    try:
        found = generate(model, "--workers", f"127.0.0.1:{worker.port}", "--threads", 1)
        assert len(found["ids"]) == len(expected["f32"])
        assert found["weight_bytes_sent"] == 0
        told = worker.wait_for("memory plan")
        assert told["in_memory"] != told["weights"]
        assert worker.wait_for("paging")["readers"] >= 1
        assert worker.peak_bytes() <= limit
    finally:
        worker.end()


def test_a_limit_beyond_the_machine_is_told(model: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    command = [sys.executable, "-m", "dairllm", "generate", "--model", str(model), "--prompt-ids", "5", "--steps", "1", "--json"]
    done = subprocess.run([*command, "--memory-limit", f"{2 * memory}B"], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert "the memory limit is more than there is" in done.stderr
    assert json.loads(done.stdout)["memory_plan"]["limit_bytes"] <= memory
