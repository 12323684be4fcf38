"""What KV caches of F16 and Q80 cost and save beside F32: error on a text, time of a token at several positions, memory a position.

    python benchmarks/kv_cache.py --model F.m [--tokenizer F.t] [--tokens 2000] [--windows 8] [--positions 128 1000 4000] [--rows 1]
                                  [--threads 2] [--rounds 15] [--text FILE]

With a tokenizer: logits of each position of some windows of a text (by default from Python's own documentation of the language, which
comes with it), against those with an F32 cache. As a measure of what such errors are worth, an F32 cache with F32 on the wire between
nodes where the model's own is Q80 (activations are rounded once less). Errors of random models say nothing.

Speed: one program for each type over the same weights, their caches filled by the same tokens, taking turns; medians of pairs. `--rows 256`
measures batches of a prompt that end there.
"""

import argparse
import asyncio
import hashlib
import math
import platform
import pydoc_data.topics
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dairllm.bench.conditions import conditions
from dairllm.bench.idle import wait_until_idle
from dairllm.engine.executor import Executor
from dairllm.engine.memory import Layout
from dairllm.engine.program import Program
from dairllm.engine.weights import FileWeights
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import LOGITS_PIPE, TOKEN_PIPE, build_graph
from dairllm.graph.types import BLOCK_VALUES, FloatType
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import default_sync
from dairllm.runtime.node_program import NodeProgram, open_program
from dairllm.text.tokenizer import Tokenizer

F32, F16, Q80 = FloatType.F32, FloatType.F16, FloatType.Q80
TOPICS = ("execmodel", "import", "try", "attribute-access", "assignment", "objects", "comparisons", "calls", "naming", "strings")
ERROR_ROWS = 64
"""Rows whose logits are in memory at once."""
FILL_ROWS = 256


@asynccontextmanager
async def opened(model: ModelFile, compute: Compute[Program], kind: FloatType, rows: int, sync: FloatType) -> AsyncIterator[NodeProgram]:
    network, (node,) = build_graph(model.spec, 1, sync, rows)
    own = await open_program(network, node, FileWeights(model), compute, n_threads=compute.n_threads, kv_cache=kind, model=model)
    try:
        yield own
    finally:
        await own.close()


async def feed(own: NodeProgram, tokens: Sequence[int], position: int) -> float:
    """Seconds of a pass."""
    own.program.values(TOKEN_PIPE)[: len(tokens), 0] = tokens
    begun = time.perf_counter()
    await own.compute.run(own.program, 0, own.program.n_segments, position, len(tokens))
    return time.perf_counter() - begun


def cache_types(model: ModelFile) -> list[FloatType]:
    return [F32, F16] + [Q80] * (model.spec.head_dim % BLOCK_VALUES == 0)


# ------------------------------------------------------------------------------------------------------------------------------ error
def windows(options: argparse.Namespace) -> list[list[int]]:
    if options.text is None:
        text = "\n".join(pydoc_data.topics.topics[name] for name in TOPICS)
        print(f"text: Python {platform.python_version()}'s topics, {hashlib.sha256(text.encode()).hexdigest()[:12]}")
    else:
        text = options.text.read_text(encoding="utf-8")
    ids = Tokenizer.load(options.tokenizer).encode(text)
    size = options.tokens
    return [ids[begin : begin + size] for begin in range(0, len(ids) - size + 1, size)][: options.windows]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = logits - logits.max(1, keepdims=True)
    values -= np.log(np.exp(values).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return values


async def errors(model: ModelFile, compute: Compute[Program], texts: Sequence[Sequence[int]]) -> None:
    own_sync = default_sync(model.spec.weight_type)
    runs = [(kind.name, kind, own_sync) for kind in cache_types(model)]
    if own_sync != F32:
        runs.append(("F32, wire F32", F32, F32))
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name, _, _ in runs}
    async with AsyncExitStack() as stack:
        owns = [await stack.enter_async_context(opened(model, compute, kind, ERROR_ROWS, sync)) for _, kind, sync in runs]
        for text in texts:
            for begin in range(0, len(text), ERROR_ROWS):
                part, following = text[begin : begin + ERROR_ROWS], text[begin + 1 : begin + ERROR_ROWS + 1]
                plain = None
                for (name, _, _), own in zip(runs, owns, strict=True):
                    await feed(own, part, begin)
                    logits = own.program.values(LOGITS_PIPE)[: len(part)].copy()
                    plain = logits if plain is None else plain
                    found[name].append(figures(plain, logits, following))
    print(
        f"\n{len(texts)} windows of {len(texts[0])} tokens; relative L2 of logits and KL divergence (nats): median, mean, 99 %; "
        "perplexity against F32's, with the standard error of the difference"
    )
    print("| cache | L2 median | mean | 99 % | KL median | mean | 99 % | same greedy token | perplexity | of F32's |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    base = np.concatenate(found["F32"])
    for name, parts in found.items():
        l2, kl, same, loss = np.concatenate(parts).T
        more = (loss - base[:, 3])[~np.isnan(loss)]
        cells = [f"{f(values):.2e}" for values in (l2, kl) for f in (np.median, np.mean, lambda v: np.quantile(v, 0.99))]
        ratio = f"{100 * math.expm1(more.mean()):+.3f} % ± {100 * more.std() / math.sqrt(len(more)):.3f}"
        print(f"| {name} | {' | '.join(cells)} | {100 * same.mean():.2f} % | {math.exp(np.nanmean(loss)):.4f} | {ratio} |", flush=True)


def figures(plain: NDArray[np.float32], logits: NDArray[np.float32], following: Sequence[int]) -> NDArray[np.float64]:
    """[rows, 4] of relative L2, KL(plain || logits), same greedy token, loss of the token that follows (nan after the last)."""
    p, q = log_softmax(plain), log_softmax(logits)
    l2 = np.linalg.norm(logits - plain, axis=1) / np.linalg.norm(plain, axis=1)
    loss = np.full(len(plain), np.nan)
    loss[: len(following)] = -q[np.arange(len(following)), following]
    return np.stack([l2, np.maximum((np.exp(p) * (p - q)).sum(1, dtype=np.float64), 0.0), plain.argmax(1) == logits.argmax(1), loss], 1)


# ------------------------------------------------------------------------------------------------------------------------------ speed
async def speed(model: ModelFile, compute: Compute[Program], options: argparse.Namespace) -> None:
    kinds, count = cache_types(model), options.rows
    what = "a token" if count == 1 else f"a batch of {count}"
    print(
        f"\n{model.path.name}: {what} that ends at a position, milliseconds; ratios: median (and range) of pairs with F32 of the same round"
    )
    print("| position | F32 ms | " + " | ".join(f"{kind.name} / F32" for kind in kinds[1:]) + " |")
    print("|---|---|" + "---|" * (len(kinds) - 1))
    async with AsyncExitStack() as stack:
        owns = {
            kind: await stack.enter_async_context(opened(model, compute, kind, max(FILL_ROWS, count), default_sync(model.spec.weight_type)))
            for kind in kinds
        }
        filled = 0
        for position in sorted(options.positions):
            first = max(position - count, 0)
            for begin in range(filled, first, FILL_ROWS):
                for own in owns.values():
                    await feed(own, made_up(begin, min(begin + FILL_ROWS, first)), begin)
            filled = max(first, filled)
            idle = wait_until_idle()
            rounds = []
            for number in range(options.rounds):
                order = kinds[number % len(kinds) :] + kinds[: number % len(kinds)]
                rounds.append({kind: await settled(owns[kind], made_up(first, first + count), first) for kind in order})
            cells = [f"{1e3 * statistics.median(one[F32] for one in rounds):.2f}"]
            for kind in kinds[1:]:
                ratios = sorted(one[kind] / one[F32] for one in rounds)
                cells.append(f"{statistics.median(ratios):.3f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})")
            print(f"| {position} | {' | '.join(cells)} |" + ("" if idle else "  (the machine was not idle)"), flush=True)


def made_up(begin: int, end: int) -> list[int]:
    return [(7 * place * place + 3 * place) % 1000 + 3 for place in range(begin, end)]


async def settled(own: NodeProgram, tokens: Sequence[int], position: int) -> float:
    """Seconds of a pass. The first finds the processor's caches as another program has left them."""
    times = [await feed(own, tokens, position) for _ in range(2 + (len(tokens) == 1))]
    return min(times[1:])


def memory(model: ModelFile) -> Iterator[str]:
    network, (node,) = build_graph(model.spec, 1, default_sync(model.spec.weight_type), 1)
    for kind in cache_types(model):
        layout = Layout(network, node, kind)
        yield f"{kind.name} {layout.cache_bytes // (-(-model.spec.seq_len // 64) * 64)}"


async def measure(options: argparse.Namespace) -> None:
    longest = max([options.tokens if options.tokenizer else 0, *(position + 1 for position in options.positions)])
    with ModelFile.open(options.model, max_seq_len=longest) as model, Executor(options.threads) as executor:
        if longest > model.spec.seq_len:
            raise SystemExit(f"{model.path.name} has a context of {model.spec.seq_len}; {longest} are needed")
        compute: Compute[Program] = Compute(executor, math.inf)
        told = conditions(options.model, executor.form, options.threads, 0)
        print(", ".join(f"{key} {told[key]}" for key in ("date", "processor", "kernels", "threads", "load", "model")))
        print("bytes of the cache a position: " + ", ".join(memory(model)))
        if options.tokenizer is not None:
            await errors(model, compute, windows(options))
        if options.positions:
            await speed(model, compute, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--positions", type=int, nargs="*", default=[128, 1000, 4000])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
