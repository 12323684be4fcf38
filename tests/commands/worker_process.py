"""A worker as a process of its own, for tests."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_SECONDS = 180  # kernels may have to be compiled first


class WorkerProcess:
    """A worker that logs JSON to a file; `port` and `metrics_port` are known once it says so."""

    def __init__(self, log: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dairllm", "worker", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "DAIRLLM_WORKER__THREADS": "1", **(environment or {})},
            )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]

    def text(self) -> str:
        return self._log.read_text()

    def wait_for(self, event: str, seconds: float = START_SECONDS) -> dict[str, Any]:
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

    @property
    def metrics_port(self) -> int:
        return int(self.wait_for("health and metrics")["port"])

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Exit code, and seconds that it took."""
        start = time.monotonic()
        self.process.send_signal(signum)
        return self.process.wait(30), time.monotonic() - start
