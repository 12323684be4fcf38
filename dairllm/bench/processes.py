"""Programs as a user would start them, each in a process of its own."""

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dairllm.bench.memory_group import MemoryGroup
from dairllm.errors import DairllmError

__all__ = ["ProgramError", "listening", "output"]

_START_SECONDS = 120.0
_LONGEST_SECONDS = 1800.0
_SAID = 600
"""Characters of what a failed program said last that an error repeats."""


class ProgramError(DairllmError):
    """A program that was to be measured failed."""


def output(command: Sequence[object], group: MemoryGroup | None = None) -> str:
    """What a program prints on its standard output.

    Args:
        command: program and arguments.
        group: a control group for it to live in.

    Raises:
        ProgramError: it cannot be started, or says that it failed.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(  # noqa: S603 - a program that the user named, our words, no shell
            words,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_LONGEST_SECONDS,
            preexec_fn=None if group is None else group.enter,
        )
    except OSError as error:
        raise ProgramError(f"{words[0]} cannot be started: {error.strerror or error}") from error
    except subprocess.TimeoutExpired as error:
        raise ProgramError(f"{words[0]} was not done after {_LONGEST_SECONDS:.0f} seconds") from error
    if done.returncode:
        raise ProgramError(f"{words[0]} ended with {done.returncode}: {_last(done.stderr) or _last(done.stdout) or 'it said nothing'}")
    return done.stdout


@contextmanager
def listening(command: Sequence[object]) -> Iterator[str]:
    """A program that listens on the port that is added to its arguments, until the block ends; yields its address.

    Raises:
        ProgramError: it cannot be started, or does not listen.
    """
    port = _free_port()
    words = [*map(str, command), "--port", str(port)]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            process = subprocess.Popen(words, stdout=log, stderr=log)  # noqa: S603 - as above
        except OSError as error:
            raise ProgramError(f"{words[0]} cannot be started: {error.strerror or error}") from error
        with process:
            try:
                end = time.monotonic() + _START_SECONDS
                while not _listens(port):
                    if process.poll() is not None or time.monotonic() > end:
                        log.seek(0)
                        raise ProgramError(f"{' '.join(words[:3])} does not listen: {_last(log.read()) or 'it said nothing'}")
                    time.sleep(0.1)
                yield f"127.0.0.1:{port}"
            finally:
                process.terminate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    """Asked of the system: whoever calls a worker to see whether it is there is taken for its root."""
    ending = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        lines = Path(table).read_text(encoding="ascii").splitlines()[1:] if Path(table).exists() else []
        if any(line.split()[1].endswith(ending) and line.split()[3] == "0A" for line in lines):
            return True
    return False


def _last(text: str) -> str:
    """Of what a program said, the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_SAID] if lines else ""
