"""`dairllm demo`: a small real model, shared out to a root and two workers on this machine, answers a question."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dairllm import machine
from dairllm.cluster.cluster import Cluster
from dairllm.commands.demo_model import demo_model
from dairllm.commands.demo_worker import DemoWorker
from dairllm.commands.generate import say
from dairllm.commands.progress import COMPILING, byte_bar, waiting
from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.errors import NetworkError, RemoteProtocolError
from dairllm.formats.model_file import ModelFile
from dairllm.net.runner import Steps, in_thread
from dairllm.net.runner import run as run_on_loop
from dairllm.runtime.compute import Compute
from dairllm.runtime.node_status import NodeStatus
from dairllm.serving.generation import Generation
from dairllm.serving.sampler import Sampler
from dairllm.serving.text_stream import Answer
from dairllm.text.tokenizer import Tokenizer

__all__ = ["run"]

QUESTION = "What is the capital of Japan?"

_WORKERS = 2
"""With the root three nodes: the model's three KV heads are one for each."""
_MAX_SEQ_LEN = 1024
_STEPS = 128
_PATIENCE_SECONDS = 10.0


@dataclass(slots=True)
class _Figures:
    """What the tables show."""

    nodes: Sequence[NodeStatus]
    memory: Sequence[int]
    """The most that each node's process has held, in bytes."""
    others: Sequence[tuple[str, str]]


def run(*, threads: int | None, kernels: str) -> None:
    """Fetch and convert the model where that has not been done yet, ask it a question, stream the answer, show figures.

    Args:
        threads: of each node; None divides the processors among the nodes.

    Raises:
        DairllmError: one clear line, what to do included.
        SystemExit: a signal cut it short.
    """
    model = demo_model()
    if threads is None:
        threads = max(1, machine.processors() // (_WORKERS + 1))
    figures: list[_Figures] = []

    async def ask() -> None:
        await say(f"SmolLM2-135M-Instruct, 135 million parameters, shared out to a root and {_WORKERS} workers\n\n> {QUESTION}\n")
        figures.append(await _ask(model, threads, kernels))

    run_on_loop(ask, service=False, shutdown=_PATIENCE_SECONDS)
    for each in figures:
        _show(each)


async def _ask(path: Path, threads: int, kernels: str) -> _Figures:
    """Start everything, ask, stream, stop everything."""
    tokenizer = Tokenizer.load(path.with_suffix(".t"))
    with tokenizer.chat_renderer() as renderer:
        prompt = tokenizer.encode(renderer.render([{"role": "user", "content": QUESTION}]))
    executor = Executor(threads, kernels)
    compute: Compute[Program] = Compute(executor)
    workers = [DemoWorker(threads=threads, kernels=kernels) for _ in range(_WORKERS)]

    async def end_threads() -> None:
        compute.close()
        await in_thread("kernels", executor.close)

    async def stop_workers() -> None:
        await asyncio.gather(*(worker.stop() for worker in workers))

    with ModelFile.open(path, max_seq_len=_MAX_SEQ_LEN) as file:
        async with Steps(_PATIENCE_SECONDS) as steps:
            begun = time.perf_counter()
            # Before the workers: what is compiled here once they find in the cache.
            with waiting(COMPILING):
                await steps.start("kernels", lambda: in_thread("kernels", executor.start), end_threads)
            compute.open()
            with waiting("starting the workers"):
                addresses = await steps.start("workers", lambda: asyncio.gather(*(worker.start() for worker in workers)), stop_workers)
            cluster = Cluster(file, addresses, compute, n_threads=threads)
            try:
                with byte_bar("sending the workers their weights") as progress:
                    await steps.start("cluster", lambda: cluster.open(progress), cluster.close)
                ready = time.perf_counter() - begun
                generation = Generation(cluster, Sampler(0.0, 1.0, 0), prompt, _STEPS, tokenizer.eos_ids)
                async for piece in Answer(generation, tokenizer).pieces():
                    await say(piece)
            except (NetworkError, RemoteProtocolError) as error:
                ended = [worker for worker in workers if worker.has_ended]
                raise type(error)(f"{error}{ended[0].last_words() if ended else ''}") from None
            await say("\n\n")
            return _Figures(
                cluster.nodes,
                [machine.peak_rss_bytes(), *(worker.peak_rss_bytes for worker in workers)],
                [
                    ("start", f"{ready:.1f} s"),
                    (f"prompt, {len(prompt)} tokens", f"{generation.prefill_tokens_per_second:.0f} tokens/s"),
                    (f"generation, {len(generation.ids)} tokens", f"{generation.decode_tokens_per_second:.0f} tokens/s"),
                    ("kernels", f"{executor.form}, {threads} {'threads' if threads > 1 else 'thread'} a node"),
                ],
            )


def _show(figures: _Figures) -> None:
    from rich.console import Console
    from rich.table import Table

    caption = "FFN: columns of the feed-forward block; memory: at most\nweights, sent, received: between the root and each worker"
    nodes = Table(caption=caption, caption_justify="left")
    nodes.add_column("node", no_wrap=True)
    for title in ("heads", "KV heads", "FFN", "memory", "weights", "sent", "received"):
        nodes.add_column(title, justify="right", no_wrap=True)
    for node, memory in zip(figures.nodes, figures.memory, strict=True):
        sizes = (memory, node.weight_bytes_sent, node.bytes_sent, node.bytes_received)
        shares = (node.heads, node.kv_heads, node.ffn)
        nodes.add_row(f"worker {node.node}" if node.node else "root", *map(str, shares), *map(_about, sizes))
    others = Table(show_header=False)
    for name, value in figures.others:
        others.add_row(name, value)
    console = Console()
    console.print(nodes)
    console.print(others)


def _about(nbytes: int) -> str:
    return f"{nbytes / 2**20:.3g}MiB"
