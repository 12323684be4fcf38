"""The program of the process that a chat template runs in (dairllm.text.chat_process is its other end).

It reads the template, then one conversation after the other, and writes a reply to each. While a template runs, the process may take so
much processor time and so much memory, and no more:

- Memory beyond the bound is refused by the system, which Python tells the template as a MemoryError.
- Time: a signal ends the process, whatever it is doing. Its last words are a traceback on stderr.

It ends where its input ends: with whoever started it.
"""

import faulthandler
import json
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from struct import Struct

__all__ = ["MAX_PROMPT_BYTES", "MEMORY_BYTES", "REPLY", "REQUEST", "SECONDS", "main"]

SECONDS = 2.0
"""Processor time that one rendering may take."""
MEMORY_BYTES = 64 << 20
"""Memory that one rendering may take beyond what the process has when it begins."""
MAX_PROMPT_BYTES = 16 << 20
"""Of UTF-8. Longer prompts are refused. A context of a million tokens is about four million characters."""
REQUEST = Struct("<I")
"""Bytes that follow: first the template in UTF-8; then JSON, an object of variables for it."""
REPLY = Struct("<??I")
"""Whether it is the prompt, or why there is none; whether the process ends after it; bytes of UTF-8 that follow."""

_KEPT_BYTES = 16 << 20
"""A process that has come to hold so much more than at its start gives place to a new one."""


def main() -> None:
    """Serve stdin and stdout until there is no more to read."""
    from dairllm.text.chat_template import ChatTemplate, failure  # not for who reads the numbers above: jinja2 takes 40 ms of a start

    with suppress(OSError):
        # where memory is short it is this process that the system should end, not the one that waits for it
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # and then it ends, as it would without
    source, template = _read(), None
    start = _size()
    while source is not None and (request := _read()) is not None:
        rendered = True
        try:
            variables = json.loads(request)
            del request
            with _bounds():
                template = template or ChatTemplate(source.decode("utf-8", "surrogatepass"))
                said = template.render(variables, MAX_PROMPT_BYTES)
        except Exception as error:
            rendered, said = False, failure(error, f"{MEMORY_BYTES >> 20} MiB").encode()
            error.__traceback__ = None  # with all that the template had made
        variables = None
        ends = _size() > start + _KEPT_BYTES
        sys.stdout.buffer.write(REPLY.pack(rendered, ends, len(said)))
        sys.stdout.buffer.write(said)
        sys.stdout.buffer.flush()
        if ends:
            return
        del said


@contextmanager
def _bounds() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _size() + MEMORY_BYTES
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _size() -> int:
    """Bytes of this process' address space."""
    return int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()


def _read() -> bytes | None:
    """The body of the next frame; None where there is no more."""
    head = sys.stdin.buffer.read(REQUEST.size)
    if len(head) < REQUEST.size:
        return None
    (length,) = REQUEST.unpack(head)
    body = sys.stdin.buffer.read(length)
    return body if len(body) == length else None
