"""`dairllm generate`: continue a prompt, on this machine or with workers."""

import asyncio
import dataclasses
import json
import math
import secrets
import select
import sys
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, nullcontext
from typing import TYPE_CHECKING, Any

from dairllm import machine
from dairllm.commands.generate_options import GenerateOptions
from dairllm.commands.logits_file import LogitsFile
from dairllm.commands.plan_text import plan_lines, read_mode_line, reading
from dairllm.commands.progress import COMPILING, byte_bar, waiting
from dairllm.commands.root_node import planned_model, root_node
from dairllm.config import RootSettings, Sampling
from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.errors import ConfigError
from dairllm.formats.model_file import ModelFile
from dairllm.net.runner import Steps, in_thread
from dairllm.net.runner import run as run_on_loop
from dairllm.runtime.compute import BRIEF_SECONDS, Compute
from dairllm.runtime.memory_plan import MemoryPlan
from dairllm.serving.adjustments import Adjustments
from dairllm.serving.generation import Generation, check_prompt
from dairllm.serving.sampler import Sampler
from dairllm.serving.text_stream import Answer
from dairllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dairllm.cluster.cluster import Cluster
    from dairllm.runtime.local_node import LocalNode

__all__ = ["run", "say"]

_PIECE = 1024
"""Characters of a write: at most 4096 bytes, which a pipe that can take any takes at once."""


def run(options: GenerateOptions) -> None:
    """Generate, streaming the text to stdout, or one JSON object at the end.

    Raises:
        DairllmError: files, settings, workers or the computation; one clear line.
        SystemExit: a signal cut it short.
    """
    with planned_model(options.root, options.tokenizer) as (model, tokenizer, plan):
        prompt_ids = _prompt_ids(options, tokenizer)
        check_prompt(prompt_ids, vocab_size=model.spec.vocab_size, seq_len=model.spec.seq_len)
        if not options.json and _is_of_interest(plan, options.root):
            _note(plan_lines(plan))
        shutdown = options.root.deadlines.shutdown
        run_on_loop(lambda: _generate(options, model, plan, tokenizer, prompt_ids), service=False, shutdown=shutdown)


def _is_of_interest(plan: MemoryPlan, settings: RootSettings) -> bool:
    """Whether the plan is shown unasked: it holds something back, or somebody set a limit or wants to know more than usual."""
    chosen = settings.limits.memory != RootSettings().limits.memory
    return plan.budget_blocks is not None or chosen or settings.log.level in ("debug", "info")


def _note(lines: Iterable[str]) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))


def _prompt_ids(options: GenerateOptions, tokenizer: Tokenizer | None) -> list[int]:
    if options.prompt_ids is not None:
        return list(options.prompt_ids)
    if tokenizer is None or options.prompt is None:
        raise ConfigError("a prompt needs a tokenizer")
    if not options.chat:
        return tokenizer.encode_prompt(options.prompt)
    if tokenizer.chat_template is None:
        raise ConfigError(f"{options.tokenizer} has no chat template: --chat cannot be used with this model")
    with tokenizer.chat_renderer() as renderer:
        return tokenizer.encode(renderer.render([{"role": "user", "content": options.prompt}]))


async def _generate(
    options: GenerateOptions, model: ModelFile, plan: MemoryPlan, tokenizer: Tokenizer | None, prompt_ids: list[int]
) -> None:
    """From checks that need neither kernels nor workers to the last word."""
    settings = options.root
    executor, workers = Executor(settings.engine.n_threads, settings.engine.kernels), settings.cluster.workers
    # Without workers nothing else needs the loop: all is computed on this very thread, without two awakenings a pass.
    compute: Compute[Program] = Compute(executor, BRIEF_SECONDS if workers else math.inf)
    node = root_node(settings, model, compute, plan)

    async def end_threads() -> None:
        compute.close()
        await in_thread("kernels", executor.close)

    with LogitsFile(options.logits, model.spec.vocab_size) if options.logits else nullcontext() as logits:
        async with Steps(settings.deadlines.shutdown + 2.0) as steps:
            with waiting(COMPILING):
                await steps.start("kernels", lambda: in_thread("kernels", executor.start), end_threads)
            compute.open()
            with byte_bar("making the cluster") if workers else nullcontext() as progress:
                await steps.start("nodes", lambda: node.open(progress), node.close)
            if node.paging is not None and not options.json:
                _note([read_mode_line(node.paging.read_mode, executor.n_threads)])
            generation = Generation(
                node,
                _sampler(options.sampling, prompt_ids),
                prompt_ids,
                options.sampling.steps,
                () if options.ignore_eos or tokenizer is None else tokenizer.eos_ids,
                logits.append if logits else None,
            )
            text = await _stream(generation, tokenizer, quiet=options.json)
            if (cut := _cut(generation, options)) is not None:
                _note([cut])
            elif generation.finish_reason == "stop" and _is_chat_missed(text, options, tokenizer):
                _note(["[the model said nothing: it knows a chat format, which is asked for by --chat]"])
            if sys.stderr.isatty() and not options.json:
                _note([_speed_line(generation)])
            if options.json:
                await say(json.dumps(_report(generation, text, node, executor, plan)) + "\n")


def _sampler(sampling: Sampling, prompt_ids: list[int]) -> Sampler:
    adjustments = Adjustments(
        prompt_ids,
        repetition=sampling.repetition_penalty,
        frequency=sampling.frequency_penalty,
        presence=sampling.presence_penalty,
    )
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    return Sampler(sampling.temperature, sampling.top_p, seed, top_k=sampling.top_k, min_p=sampling.min_p, adjustments=adjustments)


def _cut(generation: Generation, options: GenerateOptions) -> str | None:
    """What to say where the answer ends before the model has finished. Nothing where its end was not looked for, or JSON says it."""
    if options.json or generation.finish_reason != "length":
        return None
    n_ids, context = len(generation.ids), generation.model.seq_len
    if n_ids == options.sampling.steps:
        return None if options.ignore_eos else f"[cut after {n_ids} {'token' if n_ids == 1 else 'tokens'}: --steps]"
    return f"[cut after {n_ids} tokens: the context of {context} tokens is full, the prompt included]"


def _is_chat_missed(text: str, options: GenerateOptions, tokenizer: Tokenizer | None) -> bool:
    """Whether a model that was taught to answer messages ended a bare text without a word."""
    knows = tokenizer is not None and tokenizer.chat_template is not None
    return knows and not (text.strip() or options.chat or options.json)


def _speed_line(generation: Generation) -> str:
    """What somebody at a terminal wants to know after an answer."""
    prompt = f"{len(generation.prompt_ids)} tokens of prompt at {generation.prefill_tokens_per_second:.1f} tokens/s"
    if len(generation.ids) < 2:  # nothing came after the first
        return f"[{prompt}]"
    return f"[{prompt}, {len(generation.ids)} generated at {generation.decode_tokens_per_second:.1f} tokens/s]"


async def _stream(generation: Generation, tokenizer: Tokenizer | None, *, quiet: bool) -> str:
    """The generated text; said as it comes unless `quiet`. Without a tokenizer the ids are said, and there is no text."""
    answer = None if tokenizer is None else Answer(generation, tokenizer)
    async with aclosing(_numbers(generation) if answer is None else answer.pieces()) as pieces:
        async for piece in pieces:
            if not quiet:
                await say(piece)
    if not quiet:
        await say("\n")
    return "" if answer is None else answer.text


async def _numbers(generation: Generation) -> AsyncGenerator[str, None]:
    async with aclosing(generation.run()) as ids:
        async for token in ids:
            yield f"{token} "


async def say(text: str) -> None:
    """Write to stdout. Where whoever reads it lags behind, this waits as a task does, so that a signal is heard."""
    for first in range(0, len(text), _PIECE):
        while not select.select([], [sys.stdout], [], 0)[1]:  # noqa: ASYNC110 - the loop cannot watch a plain file, which stdout may be
            await asyncio.sleep(0.05)
        sys.stdout.write(text[first : first + _PIECE])
        sys.stdout.flush()


def _report(generation: Generation, text: str, node: "LocalNode | Cluster", executor: Executor, plan: MemoryPlan) -> dict[str, Any]:
    own, *others = [dataclasses.asdict(report) for report in node.nodes]
    paging = node.paging
    return {
        "prompt_ids": list(generation.prompt_ids),
        "ids": generation.ids,
        "text": text,
        "finish_reason": generation.finish_reason,
        "seed": generation.sampler.seed,
        "prefill_tokens_per_second": round(generation.prefill_tokens_per_second, 3),
        "decode_tokens_per_second": round(generation.decode_tokens_per_second, 3),
        "peak_rss_bytes": machine.peak_rss_bytes(),
        **{name: own[name] for name in ("bytes_sent", "bytes_received", "weight_bytes_sent")},
        "weight_bytes_read": 0 if paging is None else paging.metrics.bytes,
        "paging": None
        if paging is None
        else dataclasses.asdict(paging.metrics) | reading(paging.read_mode, plan) | paging.configuration._asdict(),
        "memory_plan": plan.figures(),
        "nodes": [own | {"kernels": executor.form, "threads": executor.n_threads}, *others],
    }
