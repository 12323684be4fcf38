"""The programs that are measured: ours, distributed-llama, llama.cpp. Each is given the same task and tells its own speeds."""

import json
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dairllm.bench.memory_group import MemoryGroup
from dairllm.bench.processes import ProgramError, listening, output

__all__ = ["Dairllm", "Dllama", "LlamaCpp", "Program", "Speed", "Task", "Workers"]

_SUMMARY = re.compile(r"tokens/s:\s*([\d.]+)")


@dataclass(frozen=True, slots=True)
class Task:
    """What to compute.

    Attributes:
        text: a prompt; `ids` is the same, for programs that take ids.
        steps: ids to generate after it.
        context: positions to make room for.
        threads: of each node.
    """

    model: Path
    text: str
    ids: tuple[int, ...]
    steps: int
    context: int
    threads: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of the prompt and of what followed it, and what else the program tells."""

    prompt: float
    generation: float
    more: dict[str, Any]


class Program(Protocol):
    """One that computes a task alone on this machine."""

    name: str

    def run(self, task: Task, group: MemoryGroup | None = None) -> Speed:
        """Start it, in a control group where one is given; raises ProgramError where it fails."""
        ...


class Workers(Protocol):
    """One that has workers."""

    def worker(self, threads: int) -> list[object]:
        """How one is started, but for its port."""
        ...


class Dairllm:
    """This program, by this interpreter.

    Args:
        kernels: form of the kernels.
    """

    name = "dairllm"

    def __init__(self, kernels: str = "auto") -> None:
        self._kernels = kernels

    def run(self, task: Task, group: MemoryGroup | None = None) -> Speed:
        return self.generate(task, group=group)

    def generate(self, task: Task, *, limit: int | None = None, workers: Sequence[str] = (), group: MemoryGroup | None = None) -> Speed:
        """As `run`, within a memory limit in bytes, or with workers."""
        words: list[object] = ["generate", "--model", task.model, "--prompt-ids", ",".join(map(str, task.ids)), "--json"]
        words += ["--steps", task.steps, "--max-seq-len", task.context, "--threads", task.threads, "--kernels", self._kernels]
        words += [] if limit is None else ["--memory-limit", f"{limit}B"]
        words += ["--workers", ",".join(workers)] if workers else []
        report = json.loads(output(_ours(*words), group))
        return Speed(report["prefill_tokens_per_second"], report["decode_tokens_per_second"], report)

    def with_workers(self, task: Task, program: Workers, count: int) -> Speed:
        """As the root of `count` workers of that program."""
        with ExitStack() as stack:
            addresses = [stack.enter_context(listening(program.worker(task.threads))) for _ in range(count)]
            return self.generate(task, workers=addresses)

    def worker(self, threads: int) -> list[object]:
        return _ours("worker", "--host", "127.0.0.1", "--metrics-port", 0, "--threads", threads, "--kernels", self._kernels)

    def plan(self, model: Path, limit: str, context: int) -> dict[str, Any]:
        """What it would hold of a model within a limit: an object of `dairllm plan --json`."""
        plan: dict[str, Any] = json.loads(output(_ours("plan", model, "--memory-limit", limit, "--max-seq-len", context, "--json")))[
            "nodes"
        ][0]
        return plan

    def tokenize(self, tokenizer: Path, text: str) -> list[int]:
        ids: list[int] = json.loads(output(_ours("tokenize", tokenizer, text, "--json")))["ids"]
        return ids


class Dllama:
    """distributed-llama's own program.

    Args:
        path: the binary.
        turbo: whether its nodes poll, which is its default and takes a processor for each.
    """

    name = "distributed-llama"

    def __init__(self, path: Path, *, turbo: bool = True) -> None:
        self._path, self._turbo = path, turbo

    def run(self, task: Task, group: MemoryGroup | None = None) -> Speed:
        return self._inference(task, [], group)

    def with_workers(self, task: Task, program: Workers, count: int) -> Speed:
        """As the root of `count` workers of that program."""
        with ExitStack() as stack:
            addresses = [stack.enter_context(listening(program.worker(task.threads))) for _ in range(count)]
            return self._inference(task, ["--net-turbo", int(self._turbo), "--workers", *addresses], None)

    def worker(self, threads: int) -> list[object]:
        return [self._path, "worker", "--nthreads", threads, "--net-turbo", int(self._turbo)]

    def _inference(self, task: Task, more: list[object], group: MemoryGroup | None) -> Speed:
        words: list[object] = [self._path, "inference", "--model", task.model, "--tokenizer", task.model.with_suffix(".t")]
        words += ["--prompt", task.text, "--steps", len(task.ids) + task.steps, "--nthreads", task.threads, "--temperature", 0]
        words += ["--buffer-float-type", "q80", "--max-seq-len", task.context, *more]
        said = output(words, group)
        found = _SUMMARY.findall(said)
        if len(found) < 2:
            raise ProgramError(f"{self._path} printed no summary of its speeds")
        return Speed(float(found[0]), float(found[1]), {})


class LlamaCpp:
    """llama.cpp, as the package xllamacpp has it.

    Args:
        python: an interpreter that has the package.
        twin: the same weights as a GGUF file (`gguf_twin`).
        flash: whether it may use flash attention.
    """

    def __init__(self, python: Path, twin: Path, *, flash: bool = True) -> None:
        self._python, self.twin, self._flash = python, twin, flash
        self.name = "llama.cpp" if flash else "llama.cpp without flash attention"

    def run(self, task: Task, group: MemoryGroup | None = None) -> Speed:
        words = {"model": str(self.twin), "threads": task.threads, "context": task.context, "prompt_ids": task.ids, "steps": task.steps}
        child = Path(__file__).with_name("llama_cpp_child.py")
        said = output([self._python, child, json.dumps(words | {"in_group": group is not None, "flash": self._flash})], group)
        report = json.loads(said.splitlines()[-1])
        return Speed(report["prompt_tokens_per_second"], report["tokens_per_second"], report)


def _ours(*words: object) -> list[object]:
    return [sys.executable, "-m", "dairllm", *words]
