"""The process that a chat template runs in, seen from outside: started, asked, ended.

Its program is dairllm.text.chat_child. What it says is bytes of bounded length, and every wait for it has an end.
"""

import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

from dairllm.errors import DairllmError
from dairllm.text.chat_child import MAX_PROMPT_BYTES, REPLY, REQUEST, SECONDS
from dairllm.units import format_duration

__all__ = ["ChatProcess", "EndedError"]

_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from dairllm.text.chat_child import main; main()"
_REPLY_SECONDS = 30.0
"""That a reply may take, on a machine that is busy with other things."""
_END_SECONDS = 1.0
"""That a process may take to end by itself, once it has closed its output."""
_MOST_LAST_WORDS = 64 << 10
_LINE = re.compile(rb'File "<chat template>", line (\d+)')
# What a template has freed goes back to the system: the C library would keep much of it.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


class EndedError(Exception):
    """The process ended, or was ended, before it had replied; `str()` is one line that says why, of the template."""


class ChatProcess:
    """From its making until it ends, which whoever owns it makes sure of by `end`.

    Args:
        template: the template's source.

    Raises:
        DairllmError: it cannot be started.

    Attributes:
        pid: its number.
    """

    def __init__(self, template: str) -> None:
        try:
            # a session of its own: an interrupt at the terminal is for this process, with which it ends
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-W", "ignore", "-c", _PROGRAM, *sys.path],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                bufsize=0, start_new_session=True, env=os.environ | _MEMORY,
            )  # fmt: skip
        except OSError as error:
            raise DairllmError(f"the process that renders chat templates cannot be started: {error.strerror or error}") from error
        self._pipes = [pipe for pipe in (self._process.stdin, self._process.stdout, self._process.stderr) if pipe is not None]
        self._in, self._out, self._errors = (pipe.fileno() for pipe in self._pipes)
        for descriptor in self._in, self._out, self._errors:
            os.set_blocking(descriptor, False)
        self.pid = self._process.pid
        self._unsaid = _frame(template.encode("utf-8", "surrogatepass"))

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, variables: bytes) -> tuple[bool, str]:
        """Have the template rendered with a JSON object of variables: whether it was, and the prompt, or why there is none.

        Raises:
            EndedError: it did not live to reply, and has ended.
        """
        until = time.monotonic() + _REPLY_SECONDS
        try:
            self._write(self._unsaid + _frame(variables), until)
            self._unsaid = b""
            rendered, ends, length = REPLY.unpack(self._read(REPLY.size, until))
            text = self._read(min(length, MAX_PROMPT_BYTES), until).decode("utf-8", "surrogatepass")
        except TimeoutError:
            self.end()
            raise EndedError(f"fails: it has not ended after {format_duration(_REPLY_SECONDS)}") from None
        except (OSError, EOFError):
            raise EndedError(self._last_words()) from None
        if ends:
            self.end(_END_SECONDS)
        return rendered, text

    def kill(self) -> None:
        """End it at once, from any thread: whoever asks it learns it. Its owner still calls `end`."""
        self._process.kill()

    def end(self, patience: float = 0.0) -> None:
        """End it where it does not end by itself, and give its pipes back. May be called again."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._process.kill()
        self._process.wait()
        for pipe in self._pipes:
            pipe.close()

    def _last_words(self) -> str:
        """Why it ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        said = b""
        with suppress(OSError):
            said = os.read(self._errors, _MOST_LAST_WORDS)
        self.end()
        found = _LINE.search(said)
        where = "" if found is None else f" (line {int(found[1])})"
        code = self._process.returncode
        if code == -signal.SIGPROF:
            return f"fails{where}: it takes more than {format_duration(SECONDS)}"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"fails{where}: the process that renders it was ended by {how}"

    def _write(self, data: bytes, until: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._in, select.POLLOUT, until)
            with suppress(BlockingIOError):
                view = view[os.write(self._in, view) :]

    def _read(self, length: int, until: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._wait(self._out, select.POLLIN, until)
            with suppress(BlockingIOError):
                part = os.read(self._out, length - len(data))
                if not part:
                    raise EOFError
                data += part
        return bytes(data)

    def _wait(self, descriptor: int, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError


def _frame(body: bytes) -> bytes:
    return REQUEST.pack(len(body)) + body
