"""dairllm and distributed-llama in turn, on the same model and prompt: ratios of their speeds.

    python benchmarks/against_dllama.py local   --dllama PATH --model F.m [--threads 2]
    python benchmarks/against_dllama.py worker  --dllama PATH --model F.m [--threads 1]
    python benchmarks/against_dllama.py cluster --dllama PATH --model F.m [--threads 1] [--nodes 2]

local: `dllama inference` and `dairllm generate`, one node. worker: a dllama root with one worker, which is dllama's own and ours in turn.
cluster: our root with our workers, and theirs with theirs, each of `threads`.
Programs run one after the other, A B A B ..., each when the processors are idle; the figures are medians, the ratios those of pairs. The
prompt and the number of ids are the same for both; dllama's own figures are read from what it prints.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

SENTENCE = "the cat sat on the mat and the other cat is here on it "
Speed = tuple[float, float]
"""Prompt tokens a second, generated tokens a second."""


def busy_seconds() -> float:
    fields = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(limit: float = 0.06, patience: float = 60.0) -> None:
    """Until others use less than `limit` of the processors, or patience ends."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = busy_seconds()
        time.sleep(1)
        if (busy_seconds() - before) / os.cpu_count() < limit:
            return
    print("(the processors were not idle)", file=sys.stderr)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def of_dllama(text: str) -> Speed:
    """From the summary that dllama prints at its end."""
    found = re.findall(r"tokens/s:\s*([\d.]+)", text)
    if len(found) < 2:
        raise SystemExit(f"dllama printed no summary:\n{text[-2000:]}")
    return float(found[0]), float(found[1])


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.o = options
        self.tokenizer = options.tokenizer or options.model.with_suffix(".t")
        self.prompt = SENTENCE * options.sentences
        # the same context for both, and what dllama calls steps: prompt and generated ids together
        ids = json.loads(self._run(["tokenize", str(self.tokenizer), self.prompt, "--json"]))["ids"]
        self.n_prompt = len(ids) + 1
        self.context = ["--max-seq-len", str(self.n_prompt + options.steps + 8)]

    def _run(self, arguments: list[str]) -> str:
        return subprocess.run([sys.executable, "-m", "dairllm", *arguments], check=True, capture_output=True, text=True).stdout

    def dllama(self, extra: list[str]) -> Speed:
        command = [self.o.dllama, "inference", "--model", self.o.model, "--tokenizer", self.tokenizer, "--prompt", self.prompt]
        command += ["--steps", str(self.n_prompt + self.o.steps), "--nthreads", str(self.o.threads), "--buffer-float-type", self.o.sync]
        command += ["--temperature", "0", *self.context, *extra]
        wait_until_idle()
        return of_dllama(subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout)

    def dairllm(self, extra: list[str] | None = None) -> Speed:
        wait_until_idle()
        arguments = [
            *(extra or []),
            "--model",
            str(self.o.model),
            "--tokenizer",
            str(self.tokenizer),
            "--prompt",
            self.prompt,
            "--ignore-eos",
        ]
        arguments += ["--steps", str(self.o.steps), "--threads", str(self.o.threads), "--sync", self.o.sync, *self.context, "--json"]
        report = json.loads(self._run(["generate", *arguments]))
        return report["prefill_tokens_per_second"], report["decode_tokens_per_second"]

    @contextmanager
    def workers(self, command: list[str]) -> Iterator[list[str]]:
        """Worker processes, one less than nodes; yields where they listen."""
        with ExitStack() as stack:
            yield [stack.enter_context(self.worker(command)) for _ in range(self.o.nodes - 1)]

    @contextmanager
    def worker(self, command: list[str]) -> Iterator[str]:
        """A worker process; yields where it listens."""
        port = free_port()
        log = subprocess.DEVNULL
        with subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log) as process:
            try:
                deadline = time.monotonic() + 120
                while str(port) not in subprocess.run(["ss", "-ltn"], capture_output=True, text=True, check=True).stdout:
                    if time.monotonic() > deadline or process.poll() is not None:
                        raise SystemExit(f"the worker did not start: {' '.join(command)}")
                    time.sleep(0.2)
                yield f"127.0.0.1:{port}"
            finally:
                process.terminate()

    @property
    def their_command(self) -> list[str]:
        return [str(self.o.dllama), "worker", "--nthreads", str(self.o.threads), "--net-turbo", str(self.o.turbo)]

    @property
    def our_command(self) -> list[str]:
        return [sys.executable, "-m", "dairllm", "worker", "--host", "127.0.0.1", "--threads", str(self.o.threads), "--metrics-port", "0"]

    def their_root(self, workers: list[str]) -> Speed:
        with self.workers(workers) as addresses:
            return self.dllama(["--net-turbo", str(self.o.turbo), "--workers", *addresses])

    def our_root(self, workers: list[str]) -> Speed:
        with self.workers(workers) as addresses:
            return self.dairllm(["--workers", ",".join(addresses)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["local", "worker", "cluster"])
    parser.add_argument("--dllama", type=Path, required=True, help="the program, built")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=2, help="of a cluster, the root included")
    parser.add_argument("--sync", default="q80", choices=["q80", "f32"])
    parser.add_argument("--sentences", type=int, default=6, help="length of the prompt")
    parser.add_argument("--steps", type=int, default=48, help="ids to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turbo", type=int, default=0, help="whether dllama polls (its --net-turbo)")
    bench = Bench(parser.parse_args())
    what: dict[str, tuple[Callable[[], Speed], Callable[[], Speed]]] = {
        "local": (bench.dairllm, partial(bench.dllama, [])),
        "worker": (partial(bench.their_root, bench.our_command), partial(bench.their_root, bench.their_command)),
        "cluster": (partial(bench.our_root, bench.our_command), partial(bench.their_root, bench.their_command)),
    }
    ours, theirs = what[bench.o.what]
    print("dairllm / dllama")
    pairs = []
    for number in range(bench.o.rounds):
        pairs.append((ours(), theirs()))
        a, b = pairs[-1]
        print(f"{number + 1}: prompt {a[0]:.1f} / {b[0]:.1f}, generation {a[1]:.2f} / {b[1]:.2f} tokens/s", flush=True)
    for at, name in enumerate(("prompt", "generation")):
        a, b = (statistics.median(pair[side][at] for pair in pairs) for side in (0, 1))
        ratios = sorted(pair[0][at] / pair[1][at] for pair in pairs)
        spread = f"{ratios[0]:.2f} .. {ratios[-1]:.2f}"
        print(f"{name:10} {a:.2f} / {b:.2f} tokens/s; ratio {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
