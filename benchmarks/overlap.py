"""What computing a prompt in parts saves on a slow network: two nodes in network namespaces, with the wire between them made slow.

    python benchmarks/overlap.py --model F.m [--delay-ms 2] [--mbit 200] [--prompt 256] [--rounds 3]        (as root)

Root and worker each live in a namespace of their own, a third one joins them. There a relay stands in for the wire: it passes bytes on
at the given rate, and each only after the given delay, in both directions. (Not every kernel has netem.) The same prompt is computed in
turn overlapped; in the same parts, each made to wait for its rows before the next is computed (compute + transfer); whole, without parts.
"""

import argparse
import contextlib
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dairllm import cli
from dairllm.cluster.tensor_pass import TensorPass

PORT = 9990
MODES = ("overlapped", "waiting", "whole")
HERE, THERE, WIRE = "dairllm-here", "dairllm-there", "dairllm-wire"
WORKER, RELAY = "10.77.2.2", "10.77.1.1"


class Line:
    """One direction of the wire."""

    def __init__(self, source: socket.socket, target: socket.socket, delay: float, rate: float) -> None:
        self.source, self.target, self._delay, self._rate = source, target, delay, rate
        self._free, self._travelling = 0.0, deque[tuple[float, bytes]]()

    def read(self, now: float) -> bool:
        data = self.source.recv(1 << 16)  # what one part of a batch sends arrives as a whole anyway
        self._free = max(self._free, now) + len(data) / self._rate
        self._travelling.append((self._free + self._delay, data))
        return bool(data)

    @property
    def has_room(self) -> bool:
        """No more is on the way than the wire holds, and a router's small buffer."""
        return len(self._travelling) < 64

    @property
    def due(self) -> float:
        return self._travelling[0][0] if self._travelling else float("inf")

    def deliver(self, now: float) -> None:
        while self.due <= now:
            _, data = self._travelling.popleft()
            if data:
                self.target.sendall(data)
            else:
                self.target.shutdown(socket.SHUT_WR)


def relay(delay: float, rate: float) -> None:
    """Serve one connection after the other. A wire does not wait for a processor."""
    os.nice(-15)
    listener = socket.create_server((RELAY, PORT))
    while True:
        root, _ = listener.accept()
        worker = socket.create_connection((WORKER, PORT))
        for end in (root, worker):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = [Line(root, worker, delay, rate), Line(worker, root, delay, rate)]
        open_lines = list(lines)
        with contextlib.suppress(OSError):
            while open_lines or any(line.due < float("inf") for line in lines):
                wait = max(0.0, min(line.due for line in lines) - time.monotonic())
                sources = [line.source for line in open_lines if line.has_room]
                ready, _, _ = select.select(sources, [], [], min(wait, 1.0))
                now = time.monotonic()
                open_lines = [line for line in open_lines if line.source not in ready or line.read(now)]
                for line in lines:
                    line.deliver(time.monotonic())
        root.close()
        worker.close()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def namespaces() -> Iterator[None]:
    for name in (HERE, WIRE, THERE):
        ip("netns", "add", name)
    try:
        for name, net, near, far in ((HERE, "10.77.1", "2", "1"), (THERE, "10.77.2", "2", "1")):
            ip("link", "add", "end", "netns", name, "type", "veth", "peer", "name", name, "netns", WIRE)
            ip("-n", name, "addr", "add", f"{net}.{near}/24", "dev", "end")
            ip("-n", WIRE, "addr", "add", f"{net}.{far}/24", "dev", name)
            for space, device in ((name, "end"), (name, "lo"), (WIRE, name)):
                ip("-n", space, "link", "set", device, "up")
        yield
    finally:
        for name in (HERE, WIRE, THERE):
            ip("netns", "del", name)


@contextlib.contextmanager
def running(name: str, command: list[str], **environment: str) -> Iterator[None]:
    """A program in a namespace, until the block ends; begins when it listens."""
    inside = ["ip", "netns", "exec", name]
    log = subprocess.DEVNULL
    with subprocess.Popen([*inside, *command], stdout=log, stderr=log, env={**os.environ, **environment}) as process:
        try:
            deadline = time.monotonic() + 120
            while str(PORT) not in subprocess.run([*inside, "ss", "-ltnH"], capture_output=True, text=True, check=True).stdout:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit(f"did not start: {' '.join(command)}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()


def node(mode: str, words: list[str]) -> None:
    """Be `dairllm WORDS`, whose parts wait where that is the mode."""
    if mode == "waiting":
        exchange = TensorPass._exchange

        async def exchange_and_wait(self: TensorPass, *arguments: Any) -> None:
            await exchange(self, *arguments)
            await self._settle(arguments[1])

        TensorPass._exchange = exchange_and_wait  # type: ignore[method-assign, assignment] # for this measurement alone
    sys.argv = ["dairllm", *words]
    cli.main()


def prefill_seconds(options: argparse.Namespace, mode: str) -> float:
    word = str(mode != "whole").lower()
    program = [sys.executable, __file__, "--node", mode]
    ids = ",".join(str(7 * place % 1000 + 3) for place in range(options.prompt))
    worker = [*program, "worker", "--host", WORKER, "--threads", "1"]
    root = [*program, "generate", "--model", str(options.model), "--prompt-ids", ids, "--steps", "2", "--threads", "1", "--json"]
    root += ["--workers", f"{RELAY}:{PORT}", "--max-seq-len", str(options.prompt + 8)]
    with running(THERE, worker, DAIRLLM_WORKER__OVERLAP=word, DAIRLLM_METRICS__ENABLED="false"):
        command = ["ip", "netns", "exec", HERE, *root]
        done = subprocess.run(
            command, env={**os.environ, "DAIRLLM_ENGINE__OVERLAP": word}, stdout=subprocess.PIPE, text=True, check=True, timeout=600
        )
    speed: float = json.loads(done.stdout)["prefill_tokens_per_second"]
    return int(options.prompt) / speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--delay-ms", type=float, default=2.0)
    parser.add_argument("--mbit", type=float, default=200.0)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--relay", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.relay:
        relay(options.delay_ms / 1000, options.mbit * 1e6 / 8)
        return
    if options.model is None:
        parser.error("--model is needed")
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    relay_command = [sys.executable, __file__, "--relay", "--delay-ms", str(options.delay_ms), "--mbit", str(options.mbit)]
    with namespaces(), running(WIRE, relay_command):
        for number in range(options.rounds):
            for mode in MODES:
                found[mode].append(prefill_seconds(options, mode))
            print(f"{number + 1}: " + ", ".join(f"{mode} {found[mode][-1]:.2f} s" for mode in MODES), flush=True)
    for mode in MODES[1:]:
        ratios = sorted(on / off for on, off in zip(found["overlapped"], found[mode], strict=True))
        print(f"overlapped / {mode}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--node"]:
        node(sys.argv[2], sys.argv[3:])
    else:
        main()
