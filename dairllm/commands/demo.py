"""`dairllm demo`: a small real model answers a question on this machine."""

import asyncio
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from dairllm import machine
from dairllm.commands.demo_model import demo_model
from dairllm.commands.progress import COMPILING, waiting
from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.engine.sampler import Sampler
from dairllm.formats.model_file import ModelFile
from dairllm.net.compute import Compute
from dairllm.net.runner import Steps, in_thread
from dairllm.net.runner import run as run_on_loop
from dairllm.nodes.answer import Answer
from dairllm.nodes.generation import Generation
from dairllm.nodes.local import LocalNode
from dairllm.text.chat import render_chat
from dairllm.text.tokenizer import Tokenizer
from dairllm.units import format_size

__all__ = ["run"]

QUESTION = "What is the capital of Japan?"

_MAX_SEQ_LEN = 1024
_STEPS = 128
_PATIENCE_SECONDS = 10.0


def run(*, threads: int, kernels: str) -> None:
    """Fetch and convert the model where that has not been done yet, ask it a question, stream the answer, show figures.

    Raises:
        DairllmError: one clear line, what to do included.
    """
    model = demo_model()
    sys.stdout.write(f"SmolLM2-135M-Instruct, 135 million parameters, on this machine alone\n\n> {QUESTION}\n")
    sys.stdout.flush()
    figures: list[tuple[str, str]] = []
    run_on_loop(lambda: _answer(model, threads, kernels, figures), service=False)
    _show(figures)


async def _answer(path: Path, threads: int, kernels: str, figures: list[tuple[str, str]]) -> None:
    """Ask and stream; adds what the table shows."""
    tokenizer = Tokenizer.load(path.with_suffix(".t"))
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.encode(render_chat(tokenizer.chat_template, messages, bos=tokenizer.bos_text, eos=tokenizer.eos_text))
    executor = Executor(threads, kernels)
    compute: Compute[Program] = Compute(executor, math.inf)

    async def end_threads() -> None:
        compute.close()
        await asyncio.to_thread(executor.close)

    with ModelFile.open(path, max_seq_len=_MAX_SEQ_LEN) as file:
        node = LocalNode(file, compute, n_threads=threads)
        async with Steps(_PATIENCE_SECONDS) as steps:
            before = time.perf_counter()
            with waiting(COMPILING):
                await steps.start("kernels", lambda: in_thread("kernels", executor.start), end_threads)
            compute.open()
            await steps.start("node", node.open, node.close)
            ready = time.perf_counter() - before
            generation = Generation(node, Sampler(0.0, 1.0, 0), prompt, _STEPS, tokenizer.eos_ids)
            async for piece in Answer(generation, tokenizer).pieces():
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n\n")
            figures += [
                ("memory, at most", format_size(machine.peak_rss_bytes())),
                ("model file", format_size(file.nbytes)),
                ("start", f"{ready:.1f} s"),
                (f"prompt, {len(prompt)} tokens", f"{generation.prefill_tokens_per_second:.0f} tokens/s"),
                (f"generation, {len(generation.ids)} tokens", f"{generation.decode_tokens_per_second:.0f} tokens/s"),
                ("kernels", f"{executor.form}, {threads} {'threads' if threads > 1 else 'thread'}"),
            ]


def _show(rows: Iterable[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)
