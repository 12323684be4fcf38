"""The benches: what each asks of which programs, round after round, one program after the other, each when the processors are idle."""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from dairllm.bench.busy import busy_processes
from dairllm.bench.idle import wait_until_idle
from dairllm.bench.memory_group import MemoryGroup
from dairllm.bench.node import CONTEXT, NodeTask
from dairllm.bench.processes import output
from dairllm.bench.programs import Dairllm, Dllama, LlamaCpp, Speed, Task
from dairllm.bench.pure_read import forget
from dairllm.bench.results import Measured
from dairllm.errors import GraphError
from dairllm.formats.model_file import ModelFile
from dairllm.graph.slicing import equal_shares
from dairllm.paging.needs import Policy

__all__ = ["BENCHES", "Bench"]

_T = TypeVar("_T")

_SENTENCE = "the cat sat on the mat and the other cat is here on it "
_PAGED_PROMPT = 8
_ROWS = (1, 2, 4, 8, 16)
_LARGE_BATCH = 128


@dataclass(frozen=True)
class Bench:
    """What is measured, with what, and how often.

    Attributes:
        model: a `.m` file, with its `.t` beside it.
        ours: this program.
        threads: of a program; the nodes of a cluster divide them.
        kernels: form of ours.
        dllama, llama_cpp: peers, where they are there.
        without_flash: llama.cpp once more.
        positions: where in a context generation is measured.
        prompt: tokens of a prompt.
        steps: ids to generate.
        percents: of the weights that are to fit, for paging.
        nodes: of a cluster.
        policy: of paging.
        patience: seconds to wait for idle processors before each run.
        busy: processes that compute without pause beside each run.
        in_group: whether paging runs in a control group of its limit, page cache included; where llama.cpp is measured it always does.
    """

    model: Path
    ours: Dairllm
    threads: int
    kernels: str = "auto"
    dllama: Dllama | None = None
    llama_cpp: LlamaCpp | None = None
    without_flash: LlamaCpp | None = None
    rounds: int = 3
    positions: tuple[int, ...] = (128,)
    prompt: int = 256
    steps: int = 32
    percents: tuple[int, ...] = (25, 50, 70)
    nodes: int = 2
    policy: Policy = "pinned"
    patience: float = 30.0
    busy: int = 0
    in_group: bool = False

    @cached_property
    def _sentence(self) -> tuple[int, int]:
        """Ids of a sentence by itself, and of each one more."""
        one, two = (len(self.ours.tokenize(self.model.with_suffix(".t"), _SENTENCE * count)) for count in (1, 2))
        return one, two - one

    def task(self, n_prompt: int, steps: int, threads: int | None = None) -> Task:
        """A prompt of about so many ids, the nearest number of sentences."""
        one, more = self._sentence
        text = _SENTENCE * max(1, round((n_prompt - one) / more + 1))
        ids = self.ours.tokenize(self.model.with_suffix(".t"), text)
        return Task(self.model, text, tuple(ids), steps, len(ids) + steps + 8, threads or self.threads)

    def node(self, **more: Any) -> dict[str, Any]:
        """Our node measured from within, all weights in memory; in several rounds, so that passes and pure reads meet the same weather."""
        task = NodeTask(str(self.model), self.threads, self.kernels, rounds=4, **more)
        return self.quietly(partial(_node, task))

    def quietly(self, run: Callable[[], _T]) -> _T:
        """When the processors are idle but for the processes that are to be busy."""
        if self.patience and not wait_until_idle(self.patience):
            sys.stderr.write("(the processors are busy with something else)\n")
        with busy_processes(self.busy):
            return run()

    @property
    def alone(self) -> list[Dairllm | Dllama | LlamaCpp]:
        """Programs that compute a whole model by themselves, ours first."""
        peers = self.dllama, self.llama_cpp, self.without_flash
        return [self.ours, *(program for program in peers if program is not None)]


def _node(task: NodeTask, group: MemoryGroup | None = None) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(output([sys.executable, "-m", "dairllm.bench.node", json.dumps(asdict(task))], group))
    return report


def kernels(bench: Bench) -> Iterator[Measured]:
    """Where the time of one row and of a batch goes, by kind of work; and the speed at which weights are read."""
    rows = (1, _LARGE_BATCH)
    reports = [bench.node(rows=rows, passes=4) for _ in range(bench.rounds)]
    reads = statistics.median(value for report in reports for value in report["read_bytes_per_second"])
    speed = Measured("kernels", "weights read by one row", "GB/s", bound=reads / 1e9)
    speed.samples = [report["weight_bytes"] / _median_seconds(report, 1) / 1e9 for report in reports]
    yield speed
    for count in rows:
        for kind in reports[0]["profile"][str(count)]:
            samples = [report["profile"][str(count)].get(kind, 0.0) * _median_seconds(report, count) * 1e3 for report in reports]
            if statistics.median(samples) > 0.002 * _median_seconds(reports[0], count) * 1e3:
                yield Measured("kernels", f"{kind.replace('_', ' ')}, {count} row{'s' * (count > 1)}", "ms", samples)


def tokens(bench: Bench) -> Iterator[Measured]:
    """Whole tokens: generation at some position, against the speed of reading the weights; and passes of a few rows."""
    found = [Measured("tokens", f"generation at {position}", "tokens/s") for position in bench.positions]
    passes = [Measured("tokens", f"a pass of {rows} row{'s' * (rows > 1)}", "ms") for rows in _ROWS]
    limits = []
    for _ in range(bench.rounds):
        for measured, position in zip(found, bench.positions, strict=True):
            _ask_all(bench, measured, bench.task(position, bench.steps), lambda speed: speed.generation)
        report = bench.node(rows=_ROWS, passes=3)
        limits.append(statistics.median(report["read_bytes_per_second"]) / report["weight_bytes"])
        for measured, rows in zip(passes, _ROWS, strict=True):
            measured.samples.append(_median_seconds(report, rows) * 1e3)
    for measured in found:
        measured.bound = statistics.median(limits)
    passes[0].bound = 1e3 / statistics.median(limits)
    yield from found
    yield from passes


def prompt(bench: Bench) -> Iterator[Measured]:
    """A prompt, all of its rows together."""
    task = bench.task(bench.prompt, 2)
    measured = Measured("prompt", f"prompt of {len(task.ids)}", "tokens/s")
    for _ in range(bench.rounds):
        _ask_all(bench, measured, task, lambda speed: speed.prompt)
    yield measured


def cluster(bench: Bench) -> Iterator[Measured]:
    """Nodes on this machine, each with its part of the threads: what sharing costs, and how others share."""
    count, threads = bench.nodes - 1, max(1, bench.threads // bench.nodes)
    alone, shared = bench.task(bench.prompt, bench.steps), bench.task(bench.prompt, bench.steps, threads)
    nodes = f"{bench.nodes} nodes of {threads} thread{'s' * (threads > 1)}"
    what = [Measured("cluster", f"{name}, {nodes}", "tokens/s") for name in ("prompt", "generation")]
    under = [Measured("cluster", f"{name}, {nodes}, under their root", "tokens/s") for name in ("prompt", "generation")]
    theirs = bench.dllama if _equal_shares(bench) else None
    for _ in range(bench.rounds):
        _add(what, None, bench.quietly(partial(bench.ours.with_workers, shared, bench.ours, count)))
        _add(what, "one node", bench.quietly(partial(bench.ours.run, alone)))
        if theirs is not None:
            _add(what, theirs.name, bench.quietly(partial(theirs.with_workers, shared, theirs, count)))
            _add(under, None, bench.quietly(partial(theirs.with_workers, shared, bench.ours, count)))
            _add(under, "their worker", bench.quietly(partial(theirs.with_workers, shared, theirs, count)))
    yield from what
    yield from under if theirs is not None else ()


def _equal_shares(bench: Bench) -> bool:
    """Whether nodes can have the same share each; distributed-llama knows no other."""
    with ModelFile.open(bench.model) as model:
        try:
            equal_shares(model.spec, bench.nodes)
        except GraphError:
            return False
    return True


def paging(bench: Bench) -> Iterator[Measured]:
    """A memory limit that holds part of the weights: what is missing is read from the disk for every token."""
    task = replace(bench.task(1, bench.steps), context=CONTEXT)
    task = replace(task, ids=task.ids[:_PAGED_PROMPT])
    in_group = bench.in_group or bench.llama_cpp is not None
    for percent in bench.percents:
        measured = Measured("paging", f"a token, {percent} % of the weights in memory", "ms")
        plan = _plan_at(bench, percent)
        limit = plan["limit_bytes"]
        node = NodeTask(
            str(bench.model),
            bench.threads,
            bench.kernels,
            limit,
            rounds=1,
            runtime=plan["runtime_bytes"],
            batch=plan["batch_rows"],
            policy=bench.policy,
        )
        reports = []
        for _ in range(bench.rounds):
            with _limited(limit, in_group) as group:
                reports.append(bench.quietly(partial(_node, node, group)))
            measured.samples.append(_median_seconds(reports[-1], 1) * 1e3)
            if bench.llama_cpp is not None:
                with _limited(limit, in_group) as group:
                    forget(bench.llama_cpp.twin)
                    theirs = bench.quietly(partial(bench.llama_cpp.run, task, group))
                measured.peers.setdefault(bench.llama_cpp.name, []).append(1e3 / theirs.generation)
        with _limited(limit, in_group) as group:
            forget(bench.model)
            speed = bench.quietly(partial(bench.ours.generate, task, limit=limit, group=group))
            held = None if group is None else group.peak
        read = statistics.median(rate for report in reports for rate in report["read_bytes_per_second"])
        fetched = statistics.median(report["read_bytes_a_pass"] for report in reports)
        measured.bound = fetched / read * 1e3
        measured.more = {
            "limit_bytes": limit,
            "peak_rss_bytes": speed.more["peak_rss_bytes"],
            "peak_group_bytes": held,
            "missing_bytes": reports[0]["missing_bytes"],
            "read_bytes_a_token": fetched,
            "weight_bytes_of_a_token": reports[0]["weight_bytes"],
            "read_bytes_per_second": read,
            "io_modes": [report["io_mode"] for report in reports],
            "metrics": reports[-1]["paging"],
            "logits": sorted({report["logits"] for report in reports}),
        }
        if bench.llama_cpp is not None:
            measured.more["first_ids_that_are_the_same"] = _same(speed.more["ids"], theirs.more["ids"])
            measured.more["peer_read_bytes_a_token"] = theirs.more["read_bytes"] // (bench.steps + 1)
        yield measured


def _limited(limit: int, in_group: bool) -> AbstractContextManager[MemoryGroup | None]:
    return MemoryGroup(limit) if in_group else nullcontext()


def _plan_at(bench: Bench, percent: int) -> dict[str, Any]:
    """The plan whose limit is what is needed beside the weights, and so many percent of these: asked for until it stays."""
    plan, limit = bench.ours.plan(bench.model, "100%", CONTEXT), 0
    for _ in range(5):
        fixed = plan["total_bytes"] - plan["resident_weight_bytes"]
        wanted = max(fixed + plan["weight_bytes"] * percent // 100, plan["smallest_limit_bytes"])
        if abs(wanted - limit) < 1 << 20:
            break
        limit = wanted
        plan = bench.ours.plan(bench.model, f"{limit}B", CONTEXT)
    return plan


BENCHES: dict[str, Callable[[Bench], Iterator[Measured]]] = {
    "kernels": kernels,
    "tokens": tokens,
    "prompt": prompt,
    "cluster": cluster,
    "paging": paging,
}


def _ask_all(bench: Bench, measured: Measured, task: Task, figure: Callable[[Speed], float]) -> None:
    """One round of all programs that compute alone."""
    for program in bench.alone:
        value = figure(bench.quietly(partial(program.run, task)))
        (measured.samples if program is bench.ours else measured.peers.setdefault(program.name, [])).append(value)


def _add(measured: list[Measured], peer: str | None, speed: Speed) -> None:
    """Prompt and generation of one run."""
    for each, value in zip(measured, (speed.prompt, speed.generation), strict=True):
        (each.samples if peer is None else each.peers.setdefault(peer, [])).append(value)


def _median_seconds(report: dict[str, Any], rows: int) -> float:
    seconds: list[float] = report["seconds"][str(rows)]
    return statistics.median(seconds)


def _same(ours: list[int], theirs: list[int]) -> int:
    """Ids that are the same from the first on."""
    pairs = list(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
