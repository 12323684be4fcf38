"""What a token costs when part of the weights is read from the disk for it, against the pure speed of reading.

    python benchmarks/paging.py --model F.m [--percent 25 50 70 100] [--threads 2] [--tokens 8] [--rounds 3] [--cgroup]

At p %: the memory limit is the plan's fixed part and p % of the weights that a token reads. In each round the missing blocks are read once
by themselves, in the way and with the readers that were chosen, then tokens are generated; medians of all rounds. With --cgroup (as root,
control groups of version 1) the process lives in a group of that limit, where page cache counts.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue

import uvloop

from dairllm import machine
from dairllm.config import MemoryAmount
from dairllm.engine.executor import Executor
from dairllm.engine.paging import PagingSettings
from dairllm.engine.paging_window import open_window
from dairllm.engine.program import Program
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import build_graph
from dairllm.graph.types import NetworkConfig, NodeConfig
from dairllm.net.compute import Compute
from dairllm.nodes.local import LocalNode, default_sync
from dairllm.nodes.memory_plan import MemoryPlan, plan_memory

GROUPS = Path("/sys/fs/cgroup/memory")
RING = 16


def plan(model: ModelFile, limit: str) -> MemoryPlan:
    def build(seq_len: int, rows: int) -> tuple[NetworkConfig, NodeConfig]:
        sync = default_sync(model.spec.weight_type)
        network, (node,) = build_graph(replace(model.spec, seq_len=seq_len), 1, sync, rows)
        return network, node

    return plan_memory(model, build, MemoryAmount.parse(limit), max_seq_len=model.spec.seq_len, rows=(32,))


def read_seconds(model: ModelFile, blocks: list[int], way: str, readers: int, block_bytes: int) -> float:
    """All blocks through a ring, by so many threads."""
    window, waiting = open_window(way, model.path, model.stamp, block_bytes), SimpleQueue[int]()
    for block in blocks:
        waiting.put(block)

    def read() -> None:
        held: list[int] = []
        while True:
            try:
                held.append(waiting.get_nowait())
            except Empty:
                break
            window.load(held[-1])
            if len(held) > RING // readers:
                window.release(held.pop(0))
        for block in held:
            window.release(block)

    threads = [threading.Thread(target=read) for _ in range(readers)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begun
    window.close()
    return took


async def measure(options: argparse.Namespace) -> None:
    executor = Executor(options.threads).start()
    compute: Compute[Program] = Compute(executor, math.inf)
    compute.open()
    with ModelFile.open(options.model, max_seq_len=256) as model:
        found = plan(model, f"{options.limit}B")
        paging = None
        if found.room_blocks is not None:
            paging = PagingSettings(found.room_blocks, options.policy, options.way, options.readers, found.needs.block_bytes)
        node = LocalNode(model, compute, n_threads=options.threads, rows=32, paging=paging)
        await node.open()
        missing = found.missing
        seconds, reads, digest, token, position = [], [], hashlib.sha256(), 5, 0
        for _ in range(options.rounds):
            if node.way is not None:
                pager = node._own.compute._pager  # type: ignore[union-attr] # who else knows what is read for each token
                order = dict.fromkeys(block for step in pager.steps for block in step.blocks)
                blocks = [block for block in order if block not in pager.blocks.kept]
                missing = len(blocks) * found.needs.block_bytes
                took = read_seconds(model, blocks, node.way.way, node.way.readers, found.needs.block_bytes)
                reads.append(len(blocks) * found.needs.block_bytes / took)
            for number in range(options.tokens):
                begun = time.perf_counter()
                logits = await node.feed([token], position, logits=True)
                if number:  # the first finds a ring that the pure reads have left cold
                    seconds.append(time.perf_counter() - begun)
                assert logits is not None  # noqa: S101 - they were asked for
                digest.update(logits.tobytes())
                token, position = (token * 7 + 3) % model.spec.vocab_size, position + 1
        speed = statistics.median(reads) if reads else 0.0
        result = {
            "limit_mib": options.limit >> 20,
            "peak_mib": machine.peak_rss_bytes() >> 20,
            "missing_mb": round(missing / 1e6),
            "way": "in place" if node.way is None else f"{node.way.way}, {node.way.readers} readers",
            "read_gb_s": round(speed / 1e9, 2),
            "token_ms": round(statistics.median(seconds) * 1e3, 1),
            "of_reading": round(statistics.median(seconds) * speed / missing, 2) if missing else None,
            "bits": digest.hexdigest()[:12],
        }
        print(json.dumps(result), flush=True)
        await node.close()
    compute.close()
    executor.close()


def forget(path: Path) -> None:
    """Have the page cache forget a file: what others left there would be read too fast, and charged to them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(options: argparse.Namespace, percent: int, fixed: int, weights: int) -> None:
    """In a process of its own, and a control group of its own where that is asked for."""
    limit = fixed + weights * percent // 100 + (weights // 10 if percent == 100 else 0)
    words = ["--model", str(options.model), "--limit", str(limit), "--threads", str(options.threads), "--tokens", str(options.tokens)]
    words += ["--rounds", str(options.rounds), "--way", options.way, "--policy", options.policy]
    words += ["--readers", str(options.readers)] if options.readers else []
    group = GROUPS / f"dairllm-bench-{os.getpid()}" if options.cgroup else None
    if group is not None:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))

    forget(options.model)

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=False, preexec_fn=enter)
        peak = f", group {int((group / 'memory.max_usage_in_bytes').read_text()) >> 20} MiB" if group is not None else ""
    finally:
        if group is not None:
            group.rmdir()
    print(f"{percent} %: {done.stdout.strip() or f'ended with {done.returncode}'}{peak}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--percent", type=int, nargs="+", default=[25, 50, 70, 100])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", default="auto")
    parser.add_argument("--readers", type=int)
    parser.add_argument("--policy", default="pinned")
    parser.add_argument("--cgroup", action="store_true")
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.limit is not None:
        uvloop.run(measure(options))
        return
    with ModelFile.open(options.model, max_seq_len=256) as model:
        found = plan(model, "100%")
    print(f"fixed part {found.fixed >> 20} MiB, weights of a token {found.weights >> 20} MiB")
    for percent in options.percent:
        run(options, percent, found.fixed, found.weights)


if __name__ == "__main__":
    main()
