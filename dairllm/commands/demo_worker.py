"""A worker of the demonstration's: `dairllm worker` as a process on a free port of the loopback interface, which ends with us."""

import asyncio
import contextlib
import json
import os
import sys
from collections import deque

from dairllm import machine
from dairllm.config import WorkerAddress
from dairllm.errors import NetworkError

__all__ = ["DemoWorker"]

START_SECONDS = 120.0
"""Until it listens. The kernels have been compiled; but a machine may be busy."""
STOP_SECONDS = 3.0
LOG_LINES = 20
LOOPBACK = "127.0.0.1"

# The kernel tells it when the process that started it is gone, however that came about: nobody else will end it. It may be gone already.
_CHILD = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv.pop(1)):
    from dairllm.cli import main
    main()
"""


class DemoWorker:
    """From `start` to `stop`.

    Args:
        threads: compute threads; kernels: their form.
    """

    def __init__(self, *, threads: int, kernels: str) -> None:
        self._words = ["worker", "--host", LOOPBACK, "--port", "0", "--threads", str(threads), "--kernels", kernels]
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._log: deque[str] = deque(maxlen=LOG_LINES)

    async def start(self) -> WorkerAddress:
        """Where it listens, once it does.

        Raises:
            NetworkError: it does not come so far; says why, in its own words.
        """
        listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _CHILD, str(os.getpid()), *self._words, "--log-format", "json", "--log-level", "info",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            env=_environment(), limit=1 << 20,
        )  # fmt: skip
        self._reading = asyncio.create_task(self._read(self._process, listening))
        try:
            async with asyncio.timeout(START_SECONDS):
                return WorkerAddress(LOOPBACK, await listening)
        except TimeoutError:
            raise NetworkError(f"a worker of the demonstration did not start within {START_SECONDS:.0f}s{self.last_words()}") from None

    async def stop(self) -> None:
        """End it: politely, and then in any case."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        if self._reading is not None:
            await asyncio.wait({self._reading})

    @property
    def pid(self) -> int:
        """0 before its start."""
        return 0 if self._process is None else self._process.pid

    @property
    def peak_rss_bytes(self) -> int:
        """The most memory that it has held so far; 0 when it does not run."""
        return machine.peak_rss_bytes(self.pid)

    def last_words(self) -> str:
        """The end of its log, for an error's line; "" where it said nothing."""
        return f"; its log ends: {self._log[-1]}" if self._log else ""

    @property
    def has_ended(self) -> bool:
        return self._process is not None and self._process.returncode is not None

    async def _read(self, process: asyncio.subprocess.Process, listening: "asyncio.Future[int]") -> None:
        """Keep the end of its log, and find its port in it."""
        assert process.stderr is not None  # noqa: S101 - for the type checker: it is a pipe
        async for raw in process.stderr:
            line = raw.decode(errors="replace").strip()
            self._log.append(line)
            if not listening.done() and '"listening"' in line:
                listening.set_result(int(json.loads(line)["port"]))
        code = await process.wait()
        if not listening.done():
            listening.set_exception(NetworkError(f"a worker of the demonstration ended with exit code {code}{self.last_words()}"))


def _environment() -> dict[str, str]:
    """Ours without settings: those are for whoever runs a worker or a root of his own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DAIRLLM_")}
    return kept | {"DAIRLLM_METRICS__ENABLED": "false"}
