"""Workers and servers as processes of their own, for tests."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import openai

from dairllm import machine
from tests.patience import PATIENCE

__all__ = ["IN_TIME", "NodeProcess", "ServeProcess", "WorkerProcess"]

IN_TIME = 8.0
"""Seconds in which a process that was told to stop has stopped, unless it needed its deadline, 10 s by default, to be made to."""

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class NodeProcess:
    """A node that logs JSON to a file; `port` is known once it says so."""

    module: ClassVar = "dairllm"
    command: ClassVar[tuple[str, ...]]
    environment: ClassVar[dict[str, str]]

    def __init__(self, log: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.command, *arguments],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, **self.environment, **(environment or {})},
            )

    def text(self) -> str:
        return self._log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]

    def wait_for(self, event: str, seconds: float = PATIENCE) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in self.lines():
                if line["event"] == event:
                    return line
            assert self.process.poll() is None, self.text()
            time.sleep(0.02)
        raise AssertionError(f"no {event!r} in {self.text()}")

    @property
    def port(self) -> int:
        return int(self.wait_for("listening")["port"])

    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * PAGE_BYTES

    def peak_bytes(self) -> int:
        """The most that it has held."""
        return machine.peak_rss_bytes(self.process.pid)

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Exit code, and seconds that it took."""
        start = time.monotonic()
        self.process.send_signal(signum)
        return self.process.wait(PATIENCE), time.monotonic() - start

    def end(self) -> None:
        """At the end of a test, however that ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)


class WorkerProcess(NodeProcess):
    command = ("worker", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0")
    environment: ClassVar = {"DAIRLLM_WORKER__THREADS": "1"}

    @property
    def metrics_port(self) -> int:
        return int(self.wait_for("health and metrics")["port"])


class ServeProcess(NodeProcess):
    command = ("serve", "--port", "0")
    environment: ClassVar = {"DAIRLLM_ENGINE__THREADS": "1"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE)
